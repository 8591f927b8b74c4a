import dataclasses
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.layers import quantization
from codet5p_jax.models.computation import Computation
from codet5p_jax.planning.parameters import parameter_shapes
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.optimizers import SGD, AdamW
from codet5p_jax.training.partition import merge_params
from codet5p_jax.training.train_step import (
    make_train_step,
    microbatch_counts,
    step_batch_spec,
)
from tests.compiled import cached_train_step
from tests.training import small
from tests.training.small import assert_close, one_device

ADAMW = AdamW(1e-3, warmup_steps=2, decay_steps=10, weight_decay=0.1)


def run(config, mesh, batches, given=None):
  train_step = cached_train_step(config, mesh)
  if given is None:
    state = small.initial_state(train_step)
  else:
    state = train_step.init(jax.tree.map(jnp.asarray, given))
  history = []
  for batch in batches:
    batch = {'sequence_to_sequence': batch}
    batch = jax.device_put(batch, train_step.batch_sharding)
    state, metrics = train_step.step(state, batch)
    history.append(small.to_numpy(metrics))
  return small.to_numpy(state), history


def paths_of(tree):
  return set(flax.traverse_util.flatten_dict(tree, sep='/'))


@pytest.mark.parametrize('mesh_shape', [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_sharded_step_equals_unsharded(mesh_shape):
  """One SGD step of rate 1 shows the gradient; five show the parameters."""
  config = small.step_config(SGD(1.0))
  batches = [small.batch(config, seed) for seed in range(5)]
  before = run(config, one_device(), [])[0].params
  alone, alone_metrics = run(config, one_device(), batches[:1])
  sharded, metrics = run(config, make_mesh(mesh_shape), batches[:1])

  def gradient(state):
    return jax.tree.map(np.subtract, before, state.params)

  assert_close(gradient(sharded), gradient(alone), 1e-5)
  assert_close(metrics, alone_metrics, 1e-5)

  alone, _ = run(config, one_device(), batches)
  sharded, _ = run(config, make_mesh(mesh_shape), batches)
  assert_close(sharded.params, alone.params, 1e-5)


def test_sharded_adamw_stays_near_unsharded():
  config = small.step_config(ADAMW)
  batches = [small.batch(config, seed) for seed in range(5)]
  alone, _ = run(config, one_device(), batches)
  sharded, _ = run(config, make_mesh((2, 2, 2)), batches)
  assert_close(sharded.params, alone.params, 4e-4)


def test_parameters_and_slots_are_really_spread():
  config = small.step_config(ADAMW)
  train_step = make_train_step(config, make_mesh((1, 4, 2)))
  state = train_step.init()
  # What is drawn depends on the seed alone.
  drawn, _ = run(config, one_device(), [])
  assert_close(small.to_numpy(state.params), drawn.params, 1e-6)
  kernel = state.params['decoder']['layers']['mlp']['wi']['kernel']
  assert kernel.addressable_shards[0].data.shape == (3, 24 // 4, 40 // 2)
  moments = [
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
      if jax.tree_util.keystr(path).endswith("['mlp']['wi']['kernel']")
      and 'decoder' in jax.tree_util.keystr(path)
  ]
  assert len(moments) == 2
  for moment in moments:
    assert moment.sharding == kernel.sharding


def test_accumulating_four_microbatches_equals_one_batch():
  """Rows differ in length, so a mean of means would differ."""
  whole = small.step_config(SGD(1.0))
  parts = dataclasses.replace(whole, num_microbatches=4)
  batch = small.batch(whole, 0)
  cut = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[2:]), batch)
  before = run(whole, one_device(), [])[0].params
  expected, expected_metrics = run(whole, one_device(), [batch])
  mesh = make_mesh((1, 2, 2), jax.devices()[:4])
  actual, metrics = run(parts, mesh, [cut])

  def gradient(state):
    return jax.tree.map(np.subtract, before, state.params)

  assert_close(gradient(actual), gradient(expected), 1e-5)
  assert_close(metrics, expected_metrics, 1e-5)


def test_loss_is_the_mean_over_target_tokens():
  config = small.step_config(SGD(1.0))
  batch = small.batch(config, 0)
  state, _ = run(config, one_device(), [])
  _, [metrics] = run(config, one_device(), [batch])
  model = config.model.make_model(config.computation)
  params = jax.tree.map(jnp.asarray, state.params)
  hidden = model.apply(
      {'params': params},
      jnp.asarray(batch['encoder_input_tokens'][0]),
      jnp.pad(batch['decoder_target_tokens'][0][:, :-1], ((0, 0), (1, 0))),
  )
  head = model.apply({'params': params}, method='output_head')
  logits = np.asarray(hidden * head.scale) @ np.asarray(head.kernel[:131]).T
  log_p = np.asarray(jax.nn.log_softmax(logits))
  targets = batch['decoder_target_tokens'][0]
  weights = batch['decoder_loss_weights'][0]
  picked = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  total, weight = metrics['sequence_to_sequence/loss']
  assert weight == weights.sum()
  np.testing.assert_allclose(total, -(picked * weights).sum(), rtol=1e-5)


def test_frozen_parameters_do_not_change_and_cost_nothing():
  config = small.step_config(
      ADAMW, trainable=('encoder/.*', '.*/cross_attention/.*')
  )
  mesh = make_mesh((1, 4, 2))
  before, _ = run(config, mesh, [])
  batches = [small.batch(config, seed) for seed in range(20)]
  state, _ = run(config, mesh, batches)
  jax.tree.map(
      np.testing.assert_array_equal, state.frozen_params, before.frozen_params
  )
  for after, was in zip(*map(jax.tree.leaves, (state.params, before.params))):
    assert np.any(after != was)
  frozen = {
      jax.tree_util.keystr(path)
      for path, _ in jax.tree_util.tree_leaves_with_path(state.frozen_params)
  }
  assert "['decoder']['layers']['mlp']['wi']['kernel']" in frozen
  slots = [
      jax.tree_util.keystr(path)
      for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  ]
  assert any("['cross_attention']['out']['kernel']" in slot for slot in slots)
  assert not any(slot.endswith(path) for slot in slots for path in frozen)


@pytest.mark.parametrize('frozen_dtype', ['bfloat16', 'int8'])
def test_the_composite_trains_its_shallow_part_alone(frozen_dtype):
  config = small.composite_config(ADAMW, frozen_dtype=frozen_dtype)
  mesh = one_device()
  train_step = cached_train_step(config, mesh)
  before = small.to_numpy(train_step.init().frozen_params)
  batches = [small.batch(config, seed % 2) for seed in range(20)]
  state, history = run(config, mesh, batches)
  # Bit by bit.
  jax.tree.map(np.testing.assert_array_equal, state.frozen_params, before)
  name = 'sequence_to_sequence/loss'
  losses = [metrics[name][0] / metrics[name][1] for metrics in history]
  assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.02
  # Neither a gradient nor an optimizer slot for what is frozen.
  trained = paths_of(state.params)
  assert trained == {
      path
      for path in parameter_shapes(train_step.model)
      if any(re.fullmatch(pattern, path) for pattern in small.SHALLOW)
  }
  slots = [
      '/'.join(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
      for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  ]
  assert {slot for slot in slots if slot} == trained


@pytest.mark.parametrize(
    ('mesh_shape', 'frozen_dtype'),
    [((1, 8, 1), 'float32'), ((2, 2, 2), 'int8')],
)
def test_a_sharded_composite_equals_an_unsharded_one(
    mesh_shape, frozen_dtype, random_parameters
):
  # A large rate, so that differences of parameters show small gradients.
  config = small.composite_config(SGD(1000.0), frozen_dtype=frozen_dtype)
  given = stored_params(config, random_parameters)
  [batch] = [small.batch(config, 0)]
  alone, alone_metrics = run(config, one_device(), [batch], given)
  sharded, metrics = run(config, make_mesh(mesh_shape), [batch], given)

  def gradient(state):
    after = flax.traverse_util.flatten_dict(state.params, sep='/')
    return {path: given[path] - leaf for path, leaf in after.items()}

  assert_close(gradient(sharded), gradient(alone), 1e-5)
  assert_close(metrics, alone_metrics, 1e-5)
  jax.tree.map(
      np.testing.assert_array_equal, sharded.frozen_params, alone.frozen_params
  )


def stored_params(config, random_parameters):
  """Random parameters in the form that the state keeps, by path."""
  model = config.model.make_model(config.computation)
  boxed = jax.eval_shape(model.init_params, jax.random.key(0))
  specs = flax.traverse_util.flatten_dict(
      nn.get_partition_spec(boxed), sep='/'
  )
  state = cached_train_step(config, one_device()).abstract_state
  trained = paths_of(state.params)
  given = {}
  drawn = flax.traverse_util.flatten_dict(random_parameters(model), sep='/')
  for path, leaf in small.to_numpy(drawn).items():
    dtype = 'float32' if path in trained else config.frozen_dtype
    given |= quantization.store(path, leaf, tuple(specs[path]), dtype)
  return given


@pytest.mark.parametrize('frozen_dtype', ['float32', 'bfloat16', 'int8'])
def test_frozen_parameters_are_stored_as_told(frozen_dtype):
  config = small.composite_config(ADAMW, frozen_dtype=frozen_dtype)
  state = make_train_step(config, make_mesh((1, 4, 2))).abstract_state
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {
      jnp.dtype('float32')
  }
  frozen = flax.traverse_util.flatten_dict(state.frozen_params, sep='/')
  if frozen_dtype != 'int8':
    assert {x.dtype for x in frozen.values()} == {jnp.dtype(frozen_dtype)}
    return
  kernels = {path for path, leaf in frozen.items() if leaf.dtype == jnp.int8}
  assert kernels == {
      path for path in frozen if path.endswith(('kernel', 'embedding'))
  }
  scales = {
      path for path, leaf in frozen.items() if leaf.dtype == jnp.float32
  }
  assert scales == {f'{path}_scale' for path in kernels}
  others = frozen.keys() - kernels - scales
  assert {frozen[path].dtype for path in others} == {jnp.dtype('bfloat16')}
  # Layers, heads and width of a head; heads are spread as the kernel's are.
  path = 'decoder/layers/self_attention/query/kernel_scale'
  assert frozen[path].shape == (3, 16, 10)
  assert tuple(frozen[path].sharding.spec) == (None, 'model', None)


def test_what_is_given_is_kept_and_only_the_rest_is_drawn(random_parameters):
  config = small.composite_config(ADAMW, frozen_dtype='int8')
  train_step = cached_train_step(config, make_mesh((1, 4, 2)))
  drawn = flat_params(train_step.init())
  everything = stored_params(config, random_parameters)
  chosen = [path for path in everything if path.startswith('decoder/layers/')]
  chosen += ['encoder/layers/mlp/wi/kernel']
  given = {path: jnp.asarray(everything[path]) for path in chosen}
  state = flat_params(train_step.init(given))
  assert state.keys() == drawn.keys() == everything.keys()
  for path, leaf in state.items():
    expected = everything if path in chosen else drawn
    np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
  # They are consumed where that saves memory.
  abstract = flat_params(train_step.abstract_state)
  placed = {
      path: jax.device_put(leaf, abstract[path].sharding)
      for path, leaf in everything.items()
  }
  train_step.init(placed)
  assert all(leaf.is_deleted() for leaf in placed.values())


def test_a_checkpoint_of_the_composite_holds_nothing_frozen(tmp_path):
  config = small.composite_config(ADAMW, frozen_dtype='int8')
  state = cached_train_step(config, make_mesh((1, 4, 2))).init()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, state, {}, {'frozen_fingerprint': 'f' * 64})
    checkpoints.wait_until_finished()
    arrays = checkpoints.metadata(0)['arrays']
  kept = re.compile(
      '.*/(encoder|encoder_to_decoder|decoder/last_layer/cross_attention)/.*'
      '|optimizer/.*count|health/.*'
  )
  assert all(kept.fullmatch(path) for path in arrays)
  assert any('cross_attention' in path for path in arrays)


def flat_params(state):
  merged = merge_params(state.params, state.frozen_params)
  return flax.traverse_util.flatten_dict(merged, sep='/')


def test_parameters_in_another_form_than_the_states_are_refused():
  config = small.composite_config(ADAMW, frozen_dtype='int8')
  train_step = cached_train_step(config, one_device())
  table = 'decoder/token_embedder/embedding'
  steps = jnp.zeros((256, 32), jnp.int8)
  scale = jnp.zeros(256)
  for given, message in (
      ({'decoder/nothing': scale}, 'decoder/nothing is no parameter'),
      ({table: steps.astype(float)}, r'float32\(256, 32\), but .* int8'),
      ({table: steps[:131], f'{table}_scale': scale}, r'int8\(131, 32\), but'),
      ({table: steps}, f'{table} is given without {table}_scale'),
  ):
    with pytest.raises(ValueError, match=message):
      train_step.init(given)


def test_dropout_depends_on_seed_and_step_alone():
  config = small.step_config(
      ADAMW, computation=Computation(dtype='float32', dropout_rate=0.3)
  )
  batches = [small.batch(config, 0)] * 2
  first_state, first = run(config, one_device(), batches)
  again_state, _ = run(config, one_device(), batches)
  jax.tree.map(
      np.testing.assert_array_equal, again_state.params, first_state.params
  )
  _, sharded = run(config, make_mesh((1, 2, 1), jax.devices()[:2]), batches)
  assert_close(sharded[0], first[0], 1e-5)
  without = dataclasses.replace(
      config, computation=Computation(dtype='float32')
  )
  _, plain = run(without, one_device(), batches)
  name = 'sequence_to_sequence/loss'
  assert abs(plain[0][name][0] - first[0][name][0]) > 1e-3


def test_a_batch_without_targets_changes_nothing_and_makes_no_nan():
  config = small.step_config(SGD(1.0))
  batch = small.batch(config, 0)
  batch['decoder_loss_weights'] = np.zeros_like(batch['decoder_loss_weights'])
  before = run(config, one_device(), [])[0].params
  state, _ = run(config, one_device(), [batch])
  jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_microbatches_cycle_through_objectives_by_rate():
  config = small.step_config(
      ADAMW,
      objectives=(
          small.PAIRS,
          dataclasses.replace(small.ROWS, rate=3.0),
      ),
      num_microbatches=8,
  )
  for step in range(20):
    counts = microbatch_counts(config, step)
    assert counts == {'sequence_to_sequence': 2, 'causal_lm': 6}
  config = dataclasses.replace(config, num_microbatches=1)
  drawn = [microbatch_counts(config, step) for step in range(2000)]
  assert drawn == [microbatch_counts(config, step) for step in range(2000)]
  share = np.mean(['causal_lm' in counts for counts in drawn])
  assert abs(share - 0.75) < 0.04


def test_a_step_of_two_objectives_averages_over_all_target_tokens():
  # A large rate, so that differences of parameters show small gradients.
  rate = SGD(1000.0)
  config = small.step_config(
      rate, objectives=(small.PAIRS, small.ROWS), num_microbatches=2
  )
  mesh = one_device()
  train_step = cached_train_step(config, mesh)
  alone = small.step_config(rate, batch_size=8)
  batches = {
      'sequence_to_sequence': small.batch(alone, 0),
      'causal_lm': small.batch(alone, 1, small.ROWS),
  }
  before = small.to_numpy(small.initial_state(train_step).params)
  grads, weights = [], []
  for name, objective in (('sequence_to_sequence', small.PAIRS),
                          ('causal_lm', small.ROWS)):
    single = make_train_step(
        dataclasses.replace(alone, objectives=(objective,)), mesh
    )
    state, metrics = single.step(
        small.initial_state(single), {name: batches[name]}
    )
    weights.append(float(metrics[f'{name}/loss'][1]))
    grads.append(
        jax.tree.map(np.subtract, before, small.to_numpy(state.params))
    )
  state, _ = train_step.step(small.initial_state(train_step), batches)
  expected = jax.tree.map(
      lambda a, b: (a * weights[0] + b * weights[1]) / sum(weights), *grads
  )
  actual = jax.tree.map(np.subtract, before, small.to_numpy(state.params))
  assert_close(actual, expected, 1e-5)


def test_batch_spec_is_what_the_step_takes():
  config = small.step_config(ADAMW)
  train_step = make_train_step(config, make_mesh((1, 4, 2)))
  spec = step_batch_spec(config, train_step, microbatch_counts(config, 0))
  actual = small.batch(config, 0)
  assert {k: (v.shape, v.dtype) for k, v in actual.items()} == {
      k: (v.shape, v.dtype) for k, v in spec['sequence_to_sequence'].items()
  }


SIX_HEADS = dataclasses.replace(
    small.COMPOSITE,
    decoder=dataclasses.replace(small.COMPOSITE.decoder, num_heads=6),
)


@pytest.mark.parametrize(
    ('changes', 'mesh_shape', 'message'),
    [
        (
            {'batch_size': 12},
            (1, 8, 1),
            'batch size 12 .* 8 shards .* set BATCH_SIZE=8',
        ),
        (
            {'model': dataclasses.replace(small.MODEL, num_heads=6)},
            (1, 2, 4),
            "model axis of 4 does not divide the model's 6 heads",
        ),
        (
            {'model': SIX_HEADS, 'objectives': (small.PROMPTED,)},
            (1, 2, 4),
            "axis of 4 does not divide the model's 6 heads .decoder.",
        ),
    ],
)
def test_what_the_mesh_cannot_divide_is_one_clear_line(
    changes, mesh_shape, message
):
  config = small.step_config(ADAMW, **changes)
  with pytest.raises(UserError, match=message) as error:
    make_train_step(config, make_mesh(mesh_shape))
  assert '\n' not in str(error.value)


def test_settings_that_contradict_each_other_are_refused():
  with pytest.raises(UserError, match='micro-batches divides, found 16 and 3'):
    small.step_config(ADAMW, num_microbatches=3)
  with pytest.raises(UserError, match='names of their own'):
    small.step_config(ADAMW, objectives=(small.PAIRS, small.PAIRS))
  with pytest.raises(UserError, match="found 'int4'; set FROZEN_DTYPE"):
    small.step_config(ADAMW, frozen_dtype='int4')
  for model, objective, found in (
      (small.MODEL, small.PROMPTED, True),
      (small.COMPOSITE, small.PAIRS, False),
  ):
    message = f'found {found} .*; set PROMPT_TO_DECODER={not found}'
    with pytest.raises(UserError, match=message):
      small.step_config(ADAMW, model=model, objectives=(objective,))
  with pytest.raises(UserError, match=re.escape("'decodr/.*' matches no")):
    make_train_step(
        small.step_config(ADAMW, trainable=('decodr/.*',)), one_device()
    )
