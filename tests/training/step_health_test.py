import dataclasses
import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.batches import batch_examples
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.optimizers import AdamW
from codet5p_jax.training.run_folder import RunFolder
from codet5p_jax.training.step_health import (
    BadSteps,
    check_step,
    describe_fault,
    first_health,
    judge_step,
    save_batch,
)
from tests.compiled import cached_train_step
from tests.training import small

ADAMW = AdamW(1e-3, warmup_steps=2, decay_steps=10, weight_decay=0.1)
NAME = 'sequence_to_sequence'
# Losses that were 1.0 +- 0.1, long enough to be compared with.
QUIET = {
    'bad_in_a_row': np.int32(0),
    'losses': {
        NAME: {
            'count': np.int32(100),
            'mean': np.float32(1.0),
            'variance': np.float32(0.01),
        }
    },
}


# The rule.


class Twin:
  """The rule of `BadSteps` in plain NumPy, float64."""

  def __init__(self, rule):
    self.rule = rule
    self.good = {}  # {objective: [count, mean, variance]}
    self.in_a_row = 0

  def step(self, losses, grad_norm):
    """Returns whether the step is good, and the distance to the next limit."""
    is_good = np.isfinite(grad_norm)
    margin = np.inf
    for name, (total, weight) in losses.items():
      if weight == 0:
        continue
      loss = total / weight
      count, mean, variance = self.good.setdefault(name, [0, 0.0, 0.0])
      if not np.isfinite(loss):
        is_good = False
      elif count >= self.rule.spike_after and self.rule.spike_deviations:
        limit = mean + self.rule.spike_deviations * max(
            np.sqrt(variance), 0.01 * abs(mean)
        )
        margin = min(margin, abs(loss - limit))
        if loss > limit:
          is_good = False
    self.in_a_row = 0 if is_good else self.in_a_row + 1
    if is_good:
      for name, (total, weight) in losses.items():
        if weight == 0:
          continue
        count, mean, variance = self.good[name]
        share = max(0.02, 1 / (count + 1))
        distance = total / weight - mean
        self.good[name] = [
            count + 1,
            mean + share * distance,
            (1 - share) * (variance + share * distance**2),
        ]
    return is_good, margin


def random_losses(seed):
  """300 steps of falling losses, some of them nonsense."""
  rng = np.random.default_rng(seed)
  for step in range(300):
    losses = {}
    for name in ('pairs', 'rows'):
      loss = 2 + 3 * math.exp(-step / 80) + rng.normal(0, 0.05)
      # Some beyond what is allowed, some within.
      kind = rng.choice(['usual', 'high', 'nan', 'inf', 'none'],
                        p=[0.9, 0.07, 0.01, 0.01, 0.01])
      weight = float(rng.integers(1, 50))
      loss = {'high': loss + rng.uniform(0.1, 0.8), 'nan': math.nan,
              'inf': math.inf}.get(kind, loss)  # fmt: skip
      weight = 0.0 if kind == 'none' else weight
      losses[name] = (loss * weight if weight else 0.0, weight)
    if step % 3:  # Micro-batches of one objective alone.
      del losses[('pairs', 'rows')[step % 3 - 1]]
    yield losses, math.inf if rng.random() < 0.02 else float(rng.uniform(1, 9))


@pytest.mark.parametrize('deviations', [6.0, 3.0, None, 0.0])
def test_decisions_are_those_of_a_plain_twin(deviations):
  rule = BadSteps(spike_deviations=deviations, spike_after=20)
  twin, health = Twin(rule), first_health(['pairs', 'rows'])
  judge = jax.jit(functools.partial(judge_step, rule))
  decisions = []
  for losses, grad_norm in random_losses(seed=5):
    health, metrics = judge(
        health,
        jax.tree.map(jnp.float32, losses),
        jnp.float32(grad_norm),
    )
    expected, margin = twin.step(losses, grad_norm)
    assert margin > 1e-4, 'no rounding may decide: choose another seed'
    is_bad, _ = metrics['bad_steps']
    assert float(is_bad) == (not expected)
    assert int(health['bad_in_a_row']) == twin.in_a_row
    assert float(metrics['bad_in_a_row'][0]) == twin.in_a_row
    decisions.append(expected)
  for name, (count, mean, variance) in twin.good.items():
    found = health['losses'][name]
    assert int(found['count']) == count
    np.testing.assert_allclose(found['mean'], mean, rtol=1e-5)
    np.testing.assert_allclose(found['variance'], variance, rtol=1e-3)
  # Both sides of the rule were seen.
  spikes = {6.0: (12, 40), 3.0: (12, 80), None: (5, 20), 0.0: (5, 20)}
  least, most = spikes[deviations]
  assert least <= decisions.count(False) <= most, decisions.count(False)


def test_a_spike_is_measured_in_deviations_by_hand():
  rule = BadSteps(spike_after=100)
  for loss, deviations, is_bad in (
      (1.5, 5.0, 0), (1.65, 6.5, 1), (0.2, -8.0, 0)
  ):  # fmt: skip
    losses = {NAME: (jnp.float32(7 * loss), jnp.float32(7))}
    health, metrics = judge_step(rule, QUIET, losses, jnp.float32(1))
    found, _ = metrics[f'{NAME}/loss_deviations']
    np.testing.assert_allclose(found, deviations, rtol=1e-5)
    assert float(metrics['bad_steps'][0]) == is_bad
    assert int(health['losses'][NAME]['count']) == 101 - is_bad
  # 1 % of the mean is the least that counts as a deviation.
  still = {**QUIET, 'losses': {NAME: {
      'count': np.int32(100), 'mean': np.float32(2.0),
      'variance': np.float32(1e-9),
  }}}  # fmt: skip
  _, metrics = judge_step(
      rule, still, {NAME: (jnp.float32(2.1), jnp.float32(1))}, jnp.float32(1)
  )
  np.testing.assert_allclose(
      metrics[f'{NAME}/loss_deviations'][0], 5.0, rtol=1e-4
  )


def test_few_steps_are_no_measure():
  young = {**QUIET, 'losses': {NAME: QUIET['losses'][NAME] | {
      'count': np.int32(99)
  }}}  # fmt: skip
  losses = {NAME: (jnp.float32(50), jnp.float32(1))}
  health, metrics = judge_step(BadSteps(), young, losses, jnp.float32(1))
  assert float(metrics['bad_steps'][0]) == 0
  assert float(metrics[f'{NAME}/loss_deviations'][0]) == 0
  _, metrics = judge_step(BadSteps(), health, losses, jnp.float32(1))
  # The first of them has moved the mean to 1.98 and the variance to 47.
  assert float(metrics['bad_steps'][0]) == 1


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'spike_after': 0}, 'spike_after to be at least 1'),
        ({'max_in_a_row': 0}, 'max_in_a_row to be at least 1'),
        ({'spike_deviations': -1.0}, 'above 0, found -1.0; set SPIKE_DEV'),
    ],
)
def test_a_rule_that_says_nothing_is_refused(fields, message):
  with pytest.raises(UserError, match=message):
    BadSteps(**fields)


# In the step.


def start(config, mesh_shape=(1, 1, 1)):
  count = math.prod(mesh_shape)
  mesh = make_mesh(mesh_shape, jax.devices()[:count])
  train_step = cached_train_step(config, mesh)
  return train_step, small.initial_state(train_step)


def make_steps(train_step, state, batches):
  """Returns the state as NumPy arrays, and the metrics of each step."""
  history = []
  for batch in batches:
    batch = jax.device_put({NAME: batch}, train_step.batch_sharding)
    state, metrics = train_step.step(state, batch)
    history.append({k: float(x) for k, (x, _) in metrics.items()})
  return small.to_numpy(state), history


def poisoned(batch, value=math.nan):
  weights = batch['decoder_loss_weights'].copy()
  weights[0, 5, 2] = value
  return {**batch, 'decoder_loss_weights': weights}


def assert_same_bits(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@dataclasses.dataclass(frozen=True)
class Remembering(type(small.PAIRS)):
  """An objective whose state is the sum of the tokens it has seen."""

  def init_state(self, params, batch_size):
    return {'seen': jnp.zeros((), jnp.int32)}

  def state_axes(self, parameter_axes):
    return {'seen': ()}

  def loss(self, model, params, state, batch, key):
    total, output = super().loss(model, params, state, batch, key)
    seen = state['seen'] + batch['encoder_input_tokens'].sum()
    return total, output.replace(state={'seen': seen})


REMEMBERING = Remembering(
    **{f.name: getattr(small.PAIRS, f.name)
       for f in dataclasses.fields(small.PAIRS)}
)  # fmt: skip
# Two configurations for most tests: compiling takes most of their time.
CONFIG = small.step_config(ADAMW, objectives=(REMEMBERING,))
STRICT = small.step_config(
    ADAMW, bad_steps=BadSteps(spike_after=2, spike_deviations=1.5)
)


def test_a_poisoned_batch_changes_nothing_but_the_counts():
  train_step, state = start(CONFIG)
  batches = [small.batch(CONFIG, seed) for seed in range(3)]
  before, _ = make_steps(train_step, state, batches[:1])
  given = jax.device_put(before, jax.tree.map(
      lambda x: x.sharding, train_step.abstract_state))
  after, [metrics] = make_steps(train_step, given, [poisoned(batches[1])])
  for field in ('params', 'opt_state', 'objective_state', 'frozen_params'):
    assert_same_bits(getattr(after, field), getattr(before, field))
  assert before.objective_state[NAME]['seen'] == (
      batches[0]['encoder_input_tokens'].sum()
  )
  assert_same_bits(after.health['losses'], before.health['losses'])
  assert (int(after.step), int(after.health['bad_in_a_row'])) == (2, 1)
  assert metrics['bad_steps'] == metrics['bad_in_a_row'] == 1
  assert math.isnan(metrics[f'{NAME}/loss'])


def test_a_run_goes_on_as_if_a_bad_step_had_not_been():
  """The optimizer's counts stand still too, so its schedule does."""
  batches = [small.batch(CONFIG, seed) for seed in range(3)]
  train_step, state = start(CONFIG)
  plain, _ = make_steps(train_step, state, batches)
  bad = [poisoned(batches[0]), poisoned(batches[0], math.inf)]
  with_bad, history = make_steps(
      train_step,
      small.initial_state(train_step),
      [*batches[:1], *bad, *batches[1:]],
  )
  assert [m['bad_in_a_row'] for m in history] == [0, 1, 2, 0, 0]
  assert_same_bits(with_bad.replace(step=plain.step), plain)
  assert int(with_bad.step) == 5


def test_a_parameter_that_is_no_number_makes_every_step_bad():
  train_step, state = start(CONFIG)
  flat = flax.traverse_util.flatten_dict(state.params)
  path = next(path for path in flat if path[-1] == 'kernel')
  flat[path] = flat[path].at[(0,) * flat[path].ndim].set(jnp.nan)
  state = state.replace(params=flax.traverse_util.unflatten_dict(flat))
  before = small.to_numpy(state.params)
  after, history = make_steps(
      train_step, state, [small.batch(CONFIG, seed) for seed in range(2)]
  )
  assert [m['bad_steps'] for m in history] == [1, 1]
  assert_same_bits(after.params, before)


def test_a_spike_changes_nothing_but_the_counts():
  train_step, state = start(CONFIG)
  before = small.to_numpy(state.params)
  shardings = jax.tree.map(
      lambda x: x.sharding, train_step.abstract_state.health
  )
  state = state.replace(health=jax.device_put(QUIET, shardings))
  after, [metrics] = make_steps(train_step, state, [small.batch(CONFIG, 0)])
  assert_same_bits(after.params, before)
  assert metrics['bad_steps'] == 1
  # The first loss is about that of a blind guess among 131 tokens.
  assert 30 < metrics[f'{NAME}/loss_deviations'] < 50
  assert math.isfinite(metrics[f'{NAME}/loss'])
  # Without the rule it is a step like any other.
  free = dataclasses.replace(CONFIG, bad_steps=BadSteps(spike_deviations=None))
  train_step, state = start(free)
  state = state.replace(health=jax.device_put(QUIET, shardings))
  after, [metrics] = make_steps(train_step, state, [small.batch(free, 0)])
  assert metrics['bad_steps'] == 0
  assert int(after.health['losses'][NAME]['count']) == 101


def test_sharded_and_unsharded_decide_alike():
  batches = [small.batch(STRICT, seed) for seed in range(5)]
  batches[1] = poisoned(batches[1])
  # Another loss than that of the others.
  odd = np.where(batches[3]['decoder_target_tokens'] > 0, 7, 0)
  batches[3] = {**batches[3], 'decoder_target_tokens': odd.astype(np.int32)}
  runs = [
      make_steps(*start(STRICT, shape), batches)
      for shape in ((1, 1, 1), (1, 4, 2))
  ]
  decisions = [[m['bad_steps'] for m in history] for _, history in runs]
  assert decisions[0] == decisions[1]
  assert decisions[0][1] == 1 and 0 in decisions[0]
  for x, y in zip(*(jax.tree.leaves(state.health) for state, _ in runs)):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_what_is_remembered_survives_a_checkpoint(tmp_path):
  train_step, state = start(STRICT, (1, 4, 2))
  batch = small.batch(STRICT, 0)
  for given in (batch, poisoned(batch), poisoned(batch)):
    given = jax.device_put({NAME: given}, train_step.batch_sharding)
    state, _ = train_step.step(state, given)
  with Checkpoints(tmp_path) as saved:
    saved.save(3, state, {}, {})
    restored, _, _ = saved.restore(None, train_step.abstract_state)
  assert_same_bits(restored.health, state.health)
  assert int(restored.health['bad_in_a_row']) == 2
  assert int(restored.health['losses'][NAME]['count']) == 1
  # On another mesh as well, and there the next bad step is the third.
  train_step, _ = start(STRICT)
  with Checkpoints(tmp_path) as saved:
    restored, _, _ = saved.restore(None, train_step.abstract_state)
  _, [metrics] = make_steps(train_step, restored, [poisoned(batch)])
  assert metrics['bad_in_a_row'] == 3


# On the host.

GOOD = {
    'pairs/loss': 2.5,
    'pairs/loss_deviations': 0.5,
    'rows/loss': 9.25,
    'rows/loss_deviations': 7.5,
    'grad_norm': 3.0,
    'bad_steps': 0.0,
    'bad_in_a_row': 0.0,
}


@pytest.mark.parametrize(
    ('changes', 'fault'),
    [
        ({'rows/loss': math.nan}, 'loss of rows is nan'),
        ({'pairs/loss': math.inf, 'grad_norm': math.nan},
         'loss of pairs is inf'),
        ({'grad_norm': math.inf}, 'the norm of the gradients is inf'),
        ({}, 'loss of rows is 9.25, 7.5 standard deviations above the mean '
             '(6 are allowed)'),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_objective(changes, fault):
  assert describe_fault(GOOD | changes, BadSteps()) == fault


@pytest.mark.parametrize('deviations', [None, 0.0, 8.0])
def test_what_is_not_finite_on_the_devices_alone_is_no_spike(deviations):
  """A sum of NaN with weight 0 arrives as 0.0, 3e38 / 0.5 as 6e38."""
  rule = BadSteps(spike_deviations=deviations)
  for loss in (0.0, 6e38):
    fault = describe_fault(GOOD | {'rows/loss': loss}, rule)
    assert fault == 'the sum of a loss, or its mean in float32, is not finite'


def test_the_worst_of_several_spikes_is_named():
  values = GOOD | {'pairs/loss_deviations': 7.0, 'grad_norm': 1.0}
  assert describe_fault(values, BadSteps()).startswith('loss of rows is 9.25')
  # A number that is none is above nothing.
  values['rows/loss_deviations'] = math.nan
  assert describe_fault(values, BadSteps()).startswith('loss of pairs is 2.5')


def placed_batch(config, mesh_shape=(1, 4, 2)):
  train_step = cached_train_step(config, make_mesh(mesh_shape))
  batch = small.batch(config, 0)
  return batch, jax.device_put({NAME: batch}, train_step.batch_sharding)


def test_bad_steps_are_told_one_by_one_and_then_end_the_run(tmp_path, caplog):
  rule = BadSteps(max_in_a_row=3)
  folder = RunFolder(tmp_path)
  batch, placed = placed_batch(small.step_config(ADAMW, num_microbatches=2))
  asked, events = [], []

  def batch_at(number):
    asked.append(number)
    return placed

  def check(step, in_a_row):
    values = GOOD | {
        'bad_steps': float(in_a_row > 0), 'bad_in_a_row': float(in_a_row)
    }  # fmt: skip
    check_step(
        step, values, rule, folder, batch_at,
        lambda event, **details: events.append((event, details['step'])),
    )  # fmt: skip

  with caplog.at_level('INFO', 'codet5p_jax'):
    for step, in_a_row in enumerate([0, 1, 0, 1, 2], 11):
      check(step, in_a_row)
    assert not asked and not list(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
      check(16, 3)
  assert events == [('bad_step', step) for step in (12, 14, 15, 16)]
  told = [record.getMessage() for record in caplog.records]
  assert [line[:20] for line in told] == [
      f'Step {step} is left out:'[:20] for step in (12, 14, 15, 16)
  ]
  assert all('loss of rows is 9.25, 7.5 standard' in line for line in told)
  line = str(error.value)
  assert '\n' not in line
  assert 'found 3 up to step 16, where loss of rows is 9.25' in line
  assert f'`codet5p replay --run_dir={tmp_path} --step=16`' in line
  assert f'{tmp_path}/bad_steps/16.npz' in line
  assert 'a larger SPIKE_DEVIATIONS, or None' in line
  assert 'lower LEARNING_RATE in another RUN_DIR' in line
  # The update that makes 16 takes the batch of the 15 before it.
  assert asked == [15]
  with np.load(tmp_path / 'bad_steps/16.npz') as found:
    assert set(found) == {f'{NAME}/{feature}' for feature in batch}
    for feature, array in batch.items():
      np.testing.assert_array_equal(found[f'{NAME}/{feature}'], array)


def test_no_rule_of_spikes_is_blamed_for_what_is_not_finite(tmp_path):
  _, placed = placed_batch(small.step_config(ADAMW))
  values = GOOD | {'rows/loss': math.nan, 'rows/loss_deviations': math.nan,
                   'bad_steps': 1.0, 'bad_in_a_row': 1.0}  # fmt: skip
  with pytest.raises(UserError, match='lower LEARNING_RATE in anoth') as error:
    check_step(
        3, values, BadSteps(max_in_a_row=1), RunFolder(tmp_path),
        lambda number: placed, lambda event, **details: None,
    )  # fmt: skip
  assert 'SPIKE_DEVIATIONS' not in str(error.value)


def test_each_of_several_processes_saves_its_own(tmp_path, monkeypatch):
  config = small.step_config(ADAMW)
  _, placed = placed_batch(config)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  path = save_batch(RunFolder(tmp_path), 4, placed)
  assert path == tmp_path / 'bad_steps/4.process1.npz'
  assert path.exists()


def test_only_the_first_process_tells(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  values = GOOD | {'bad_steps': 1.0, 'bad_in_a_row': 1.0}
  told = []
  check_step(
      3, values, BadSteps(), RunFolder(tmp_path), lambda number: {},
      lambda event, **details: told.append(event),
  )  # fmt: skip
  assert told == ['bad_step']  # The timeline knows who writes.
  assert not caplog.records


def test_a_full_disk_is_one_line(tmp_path):
  _, placed = placed_batch(small.step_config(ADAMW))
  (tmp_path / 'bad_steps').write_text('in the way')
  with pytest.raises(UserError, match='cannot write .*/bad_steps/4.npz'):
    save_batch(RunFolder(tmp_path), 4, placed)


def test_examples_of_a_step_are_those_that_follow_the_step_before():
  config = small.step_config(
      ADAMW,
      objectives=(small.PAIRS, dataclasses.replace(small.ROWS, batch_scale=2)),
      num_microbatches=4,
  )
  found = batch_examples(config, 3)
  # 16 and 32 rows a step are set aside for them; 2 micro-batches each.
  assert found == {
      NAME: range(48, 48 + 2 * 4), 'causal_lm': range(96, 96 + 2 * 8)
  }  # fmt: skip
