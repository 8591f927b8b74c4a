"""Stage 2 against its twin in NumPy, and what must hold of it anyway."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.models.computation import Computation
from codet5p_jax.objectives.bimodal import LOSSES
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.checkpoints.layout import unstack_layers
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.train_step import make_train_step
from tests.compiled import cached_train_step
from tests.objectives.bimodal_small import (
    MODEL,
    OBJECTIVE,
    ROWS,
    SLOTS,
    batch,
    config,
    key_of,
    steps,
    to_numpy,
)
from tests.objectives.bimodal_twin import Twin
from tests.training.small import assert_close, initial_state, one_device


@pytest.mark.parametrize(('share', 'number'), [(0.0, 20), (0.4, 5)])
def test_steps_are_those_of_the_twin(share, number):
  """The queue of 3 batches goes round six times; all negatives are mined."""
  objective = dataclasses.replace(OBJECTIVE, soft_target_share=share)
  step_config = config(objective)
  step = cached_train_step(step_config, one_device())
  state = initial_state(step)
  params = to_numpy(state.params)
  twin = Twin(objective, step.model, params, ROWS)
  from_queue = 0
  batches = [batch(seed) for seed in range(number)]
  for index, (metrics, state) in enumerate(steps(step, state, batches)):
    key = key_of(step_config, index)
    expected = twin.step(params, batches[index], key)
    found = {name: metrics[name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), index
    own = {row.tobytes() for row in batches[index]['code_tokens']}
    from_queue += sum(x.tobytes() not in own for x in twin.drawn['code'])
    own = {row.tobytes() for row in batches[index]['text_tokens']}
    from_queue += sum(x.tobytes() not in own for x in twin.drawn['text'])
    params = to_numpy(state.params)
  assert from_queue > 8 * number
  held = to_numpy(state.objective_state['bimodal'])
  assert held['num_batches'] == number
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
      held['slow_params'],
      twin.slow,
  )
  for slot, kept in enumerate(twin.slots):
    for place, side in enumerate(('text', 'code')):
      queue = {
          what: held['queue'][f'{side}_{what}'][slot]
          for what in ('embeddings', 'tokens', 'identities')
      }
      np.testing.assert_array_equal(queue['tokens'], kept['tokens'][side])
      np.testing.assert_allclose(
          queue['embeddings'], kept['embeddings'][side], atol=1e-5
      )
      assert queue['identities'].tolist() == [
          list(pair[place]) for pair in kept['identities']
      ]


def test_eight_devices_train_as_one():
  """Negatives are those of the whole batch and queue, wherever they lie."""
  step_config = config()
  batches = [batch(seed) for seed in range(5)]
  alone, spread = (
      list(steps(step, initial_state(step), batches))
      for step in (
          cached_train_step(step_config, one_device()),
          cached_train_step(step_config, make_mesh((2, 2, 2))),
      )
  )
  for (metrics, _), (expected, _) in zip(spread, alone, strict=True):
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
  found, expected = (to_numpy(history[-1][1]) for history in (spread, alone))
  assert_close(found.params, expected.params, 1e-5)
  # What the steps changed, of which rounding is a larger part.
  before = to_numpy(initial_state(cached_train_step(step_config, one_device())))
  moved = [
      jax.tree.map(np.subtract, state.params, before.params)
      for state in (found, expected)
  ]
  assert_close(*moved, 1e-3)
  assert_close(found.objective_state, expected.objective_state, 1e-5)
  for name in ('text_tokens', 'code_tokens'):
    np.testing.assert_array_equal(
        found.objective_state['bimodal']['queue'][name],
        expected.objective_state['bimodal']['queue'][name],
    )


def test_the_queue_and_the_slow_encoder_are_really_spread():
  step = cached_train_step(config(), make_mesh((1, 4, 2)))
  state = step.abstract_state.objective_state['bimodal']
  queue = state['queue']['code_tokens']
  assert (queue.shape, queue.dtype) == ((SLOTS, ROWS, 11), jnp.uint16)
  assert queue.sharding.shard_shape(queue.shape) == (SLOTS, ROWS // 4, 11)
  kernel = state['slow_params']['encoder']['layers']['mlp']['wi']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 24 // 4, 40 // 2)


@pytest.fixture(scope='module')
def trained():
  """A step's network, and what four steps made."""
  step = cached_train_step(config(), one_device())
  batches = [batch(seed) for seed in range(5)]
  *_, (_, state) = steps(step, initial_state(step), batches[:4])
  return step.model, to_numpy(state), batches[4]


def loss_of(model, objective=OBJECTIVE):
  """(params, state, batch) to the loss, with the same draws each time."""

  def loss(params, state, batch):
    params, state, batch = jax.tree.map(jnp.asarray, (params, state, batch))
    total, _ = objective.loss(model, params, state, batch, jax.random.key(1))
    return total

  return loss


SOFT = dataclasses.replace(OBJECTIVE, soft_target_share=0.4)


@pytest.fixture(scope='module')
def gradients(trained):
  """Of the parameters, the slow ones and the embeddings in the queue."""
  model, state, after = trained
  held = state.objective_state['bimodal']

  def loss(params, slow_params, embeddings):
    queue = {**held['queue'], **embeddings}
    state = {**held, 'slow_params': slow_params, 'queue': queue}
    return loss_of(model, SOFT)(params, state, after)

  embeddings = {
      name: value
      for name, value in held['queue'].items()
      if name.endswith('embeddings')
  }
  return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(
      state.params, held['slow_params'], embeddings
  )


def test_no_gradient_flows_into_momentum_queue_and_targets(trained, gradients):
  """Neither into the state, nor through what is made of it.

  A slow encoder that is averaged anew and one that was given as such are the
  same to the gradient; so are targets that are softened by it.
  """
  model, state, after = trained
  held = state.objective_state['bimodal']
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients[0]))
  for leaf in jax.tree.leaves(gradients[1:]):
    np.testing.assert_array_equal(leaf, 0)
  given = dataclasses.replace(SOFT, momentum=1.0)
  averaged = jax.tree.map(
      lambda old, new: np.float32(0.9) * old + np.float32(0.1) * new,
      held['slow_params'],
      {name: state.params[name] for name in held['slow_params']},
  )
  expected = jax.jit(jax.grad(loss_of(model, given)))(
      state.params, {**held, 'slow_params': averaged}, after
  )
  assert_close(gradients[0], expected, 1e-5)


def test_every_loss_trains_both_stacks_that_it_uses(trained):
  model, state, after = trained
  held, after = jax.tree.map(
      jnp.asarray, (state.objective_state['bimodal'], after)
  )

  def parts(params):
    _, output = OBJECTIVE.loss(
        model, params, held, after, jax.random.key(1)
    )
    return jnp.stack([output.metrics[f'{name}_loss'][0] for name in LOSSES])

  found = jax.jit(jax.jacrev(parts))(state.params)
  for part in ('token_embedder', 'encoder', 'decoder'):
    for leaf in jax.tree.leaves(found[part]):
      largest = np.abs(np.reshape(leaf, (len(LOSSES), -1))).max(axis=1)
      assert np.all(largest[1:] > 1e-5)
      # Contrast reads no decoder.
      assert (largest[0] > 1e-5) == (part != 'decoder')


def test_the_gradient_is_the_slope_of_the_loss(trained, gradients):
  """Of the twin, in float64: along the heads, which it computes itself."""
  model, state, after = trained
  held = state.objective_state['bimodal']
  key = jax.random.key(1)
  rng = np.random.default_rng(0)
  size = 1e-6  # A larger one may draw another negative.

  def twin_loss(params):
    # The same slow encoder and targets whatever the parameters, as for the
    # gradient.
    twin = Twin(
        dataclasses.replace(SOFT, momentum=1.0), model, state.params, ROWS
    )
    twin.target_temperature = float(state.params['temperature']['value'])
    twin.slow = jax.tree.map(
        lambda old, new: np.float32(0.9) * old + np.float32(0.1) * new,
        held['slow_params'],
        {name: state.params[name] for name in held['slow_params']},
    )
    twin.slots = [
        {
            'identities': list(
                zip(
                    map(tuple, held['queue']['text_identities'][slot].tolist()),
                    map(tuple, held['queue']['code_identities'][slot].tolist()),
                )
            ),
            'tokens': {
                side: held['queue'][f'{side}_tokens'][slot]
                for side in ('text', 'code')
            },
            'embeddings': {
                side: held['queue'][f'{side}_embeddings'][slot]
                for side in ('text', 'code')
            },
        }
        for slot in range(SLOTS)
    ]
    return twin.step(params, after, key)['loss']

  for part in ('projection', 'matching_head', 'temperature'):
    direction = jax.tree.map(
        lambda x: rng.standard_normal(x.shape), state.params[part]
    )
    ahead, behind = (
        twin_loss({
            **state.params,
            part: jax.tree.map(
                lambda x, d: np.float64(x) + sign * size * d,
                state.params[part],
                direction,
            ),
        })
        for sign in (1, -1)
    )
    slope = (ahead - behind) / (2 * size)
    found = sum(
        np.sum(np.float64(g) * d)
        for g, d in zip(
            jax.tree.leaves(gradients[0][part]), jax.tree.leaves(direction)
        )
    )
    # The loss is that of all pairs together.
    assert found / ROWS == pytest.approx(slope, rel=1e-4), part


@functools.cache
def evaluator(model, objective):
  return jax.jit(
      lambda params, given: objective.loss(model, params, {}, given, None)
  )


def evaluated(model, params, given, objective=OBJECTIVE):
  """An evaluation's metrics as means."""
  total, output = evaluator(model, objective)(params, given)
  return {
      name: float(total / weight)
      for name, (total, weight) in output.with_loss(total).items()
      if weight
  }


def test_rows_that_only_fill_an_evaluation_count_for_nothing(trained):
  """As little as pairs of whatever content."""
  model, state, after = trained
  few = {name: value[:5] for name, value in after.items()}
  filled = {
      name: np.pad(value, [(0, 3)] + [(0, 0)] * (value.ndim - 1))
      for name, value in few.items()
  }
  other = {
      name: np.concatenate([value, after[name][5:8]])
      for name, value in few.items()
  }
  other['pair_weights'][5:] = 0
  expected, found, of_other = (
      evaluated(model, state.params, given) for given in (few, filled, other)
  )
  # Which negatives are drawn depends on how many there are to draw from.
  for values in (expected, found, of_other):
    for name in ('loss', 'matching_loss', 'matching_accuracy'):
      del values[name]
  assert found == pytest.approx(expected, rel=1e-5)
  assert of_other == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_compares_within_the_batch_and_skips_the_task_token(
    trained
):
  model, state, after = trained
  twin = Twin(
      dataclasses.replace(OBJECTIVE, momentum=0.0), model, state.params, ROWS
  )
  twin.slots = []
  expected = twin.step(state.params, after, jax.random.key(0))
  found = evaluated(model, state.params, after)
  for name in ('contrastive_loss', 'matching_loss', 'matching_accuracy'):
    assert found[name] == pytest.approx(expected[name], rel=1e-5), name
  # Without the loss of position 0, which a model learns at once.
  assert found['text_to_code_loss'] != pytest.approx(
      expected['text_to_code_loss'], rel=1e-3
  )
  shown = {
      name: value.copy() for name, value in after.items()
  }
  shown['code_tokens'][:, 0] = 77  # Is replaced anyway.
  assert evaluated(model, state.params, shown)['code_to_text_loss'] != (
      found['code_to_text_loss']
  )
  assert evaluated(model, state.params, shown)['text_to_code_loss'] == (
      pytest.approx(found['text_to_code_loss'], rel=1e-4)
  )


def test_pairs_that_share_a_side_are_no_negatives_of_each_other(trained):
  """A batch of one pair, repeated, has no negative: matching is its own."""
  model, state, after = trained
  same = {name: np.repeat(value[:1], ROWS, 0) for name, value in after.items()}
  held = jax.tree.map(jnp.zeros_like, state.objective_state['bimodal'])
  held['slow_params'] = state.objective_state['bimodal']['slow_params']
  _, output = jax.jit(
      lambda *given: OBJECTIVE.loss(model, *given, jax.random.key(2))
  )(state.params, held, same)
  total, number = output.metrics['matching_loss']
  assert number == ROWS and np.isfinite(total)
  loss, number = output.metrics['contrastive_loss']
  assert loss / number == pytest.approx(np.log(ROWS), rel=1e-5)


@pytest.mark.parametrize('losses', [
    ('contrastive',), ('contrastive', 'matching'), ('text_to_code',),
])  # fmt: skip
def test_losses_that_are_left_out_are_not_computed(losses, trained):
  model, state, after = trained
  objective = dataclasses.replace(OBJECTIVE, losses=losses)
  found = evaluated(model, state.params, after, objective)
  assert {n.removesuffix('_loss') for n in found if n.endswith('_loss')} == {
      *losses
  }
  whole = evaluated(model, state.params, after)
  total = sum(found[f'{name}_loss'] for name in losses)
  assert found['loss'] == pytest.approx(total, rel=1e-5)
  for name in found.keys() - {'loss', 'tokens'}:
    assert found[name] == pytest.approx(whole[name], rel=1e-5), name
  held = objective.init_state(state.params, ROWS)
  assert bool(held) == ('contrastive' in losses)
  axes = objective.state_axes({
      '/'.join(str(key.key) for key in path): ('x',) * leaf.ndim
      for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
  })
  lengths = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
  assert lengths == jax.tree.map(lambda x: x.ndim, held)


def test_dropout_is_drawn_anew_for_every_use_of_the_network(trained):
  """Where text and code are the same, one mask would make one state."""
  plain, state, after = trained
  model = MODEL.make_model(Computation(dtype='float32', dropout_rate=0.2))
  length = OBJECTIVE.text_length
  same = {
      **after,
      **{f'{side}_tokens': after['text_tokens'] for side in ('text', 'code')},
  }
  objective = dataclasses.replace(
      OBJECTIVE, code_length=length, losses=LOSSES[2:]
  )

  def losses(model, *seeds):
    # The task token of the decoder is another one; so the same.
    model = model.clone(
        config=dataclasses.replace(model.config, code_decoder_id=102)
    )
    compiled = jax.jit(
        lambda params, given, key: objective.loss(model, params, {}, given, key)
    )
    for seed in seeds:
      _, output = compiled(state.params, same, jax.random.key(seed))
      yield [
          float(output.metrics[f'{name}_loss'][0]) for name in objective.losses
      ]

  one, again, other = losses(model, 1, 1, 2)
  assert one == again
  assert len({*one, *other}) == 4
  [without] = losses(plain, 1)
  assert without[0] == pytest.approx(without[1], rel=1e-6)


def test_a_run_that_was_stopped_keeps_queue_and_slow_encoder(tmp_path):
  """Bit by bit on as many devices; the same queue on fewer, and unrolled."""
  step_config = config()
  step = cached_train_step(step_config, make_mesh((2, 2, 2)))
  batches = [batch(seed) for seed in range(5)]
  *_, (_, state) = steps(step, initial_state(step), batches[:3])
  held = to_numpy(state.objective_state)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, state, {'step': 3}, {})
  undisturbed = list(steps(step, state, batches[3:]))

  def resume(step):
    with Checkpoints(tmp_path) as checkpoints:
      state, _, _ = checkpoints.restore(None, step.abstract_state)
    return state

  again = list(steps(step, resume(step), batches[3:]))
  assert [metrics for metrics, _ in again] == [m for m, _ in undisturbed]
  jax.tree.map(
      np.testing.assert_array_equal,
      to_numpy(again[-1][1]),
      to_numpy(undisturbed[-1][1]),
  )

  computation = Computation(dtype='float32', scan_layers=False)
  fewer = make_train_step(
      dataclasses.replace(step_config, computation=computation),
      make_mesh((1, 4, 1), jax.devices()[:4]),
  )
  state = resume(fewer)
  found = to_numpy(unstack_layers(state.objective_state))
  jax.tree.map(
      np.testing.assert_array_equal, found, to_numpy(unstack_layers(held))
  )
  queue = state.objective_state['bimodal']['queue']['text_embeddings']
  assert queue.sharding.shard_shape(queue.shape) == (SLOTS, ROWS // 4, 20)
  [(metrics, _)] = steps(fewer, state, batches[3:4])
  assert metrics == pytest.approx(undisturbed[0][0], rel=1e-5, abs=1e-6)
