"""Properties of the composite; parity/ compares its numbers."""

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax import sharding
from codet5p_jax.errors import UserError
from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.shallow_encoder_deep_decoder import (
    ShallowEncoderDeepDecoderConfig,
)
from codet5p_jax.training.partition import merge_params, partition_params
from codet5p_jax.training.run_folder import describe, rebuild
from tests.models.properties import (
    change_one_token_per_row,
    changed_states,
    count_products,
    cross_entropy,
    draw_tokens,
    equations,
    unroll,
)

# All sizes differ. Random tokens are never 0, the padding.
CONFIG = ShallowEncoderDeepDecoderConfig(
    encoder=CodeGenConfig(
        vocab_size=131,
        emb_dim=22,
        num_layers=2,
        num_heads=3,
        head_dim=8,
        rotary_dim=6,
        mlp_dim=29,
    ),
    decoder=CodeGenConfig(
        vocab_size=131,
        emb_dim=34,
        num_layers=4,
        num_heads=7,
        head_dim=10,
        rotary_dim=4,
        mlp_dim=41,
        layer_norm_epsilon=1e-3,
    ),
    pad_id=0,
    eos_id=0,
    decoder_start_id=0,
)
PAD = CONFIG.pad_id
COMPUTATION = Computation(dtype='float32', dropout_rate=0.2)
TRAINABLE = (
    'encoder/.*',
    'encoder_to_decoder/.*',
    'decoder/last_layer/cross_attention/.*',
)

apply = jax.jit(
    CONFIG.make_model(COMPUTATION).apply,
    static_argnames=('method', 'deterministic'),
)


@pytest.fixture(scope='module')
def params(random_parameters):
  return random_parameters(CONFIG.make_model(COMPUTATION))


def assert_close(found, expected, tolerance=1e-5):
  np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def logits(params, source, target):
  states = apply({'params': params}, source, target)
  return apply({'params': params}, method='output_head').logits(states)


def test_the_encoder_sees_in_both_directions(params):
  sources = change_one_token_per_row(draw_tokens(6))
  states = apply({'params': params}, sources, method='encode')
  assert np.all(changed_states(states))


def test_the_decoder_sees_no_later_token_and_all_of_the_source(params):
  source, target = draw_tokens(6, seed=1), draw_tokens(5, seed=2)
  states = apply(
      {'params': params}, np.tile(source, (6, 1)),
      change_one_token_per_row(target),
  )  # fmt: skip
  seen = changed_states(states)
  np.testing.assert_array_equal(seen, np.triu(np.ones((5, 5))))
  states = apply(
      {'params': params}, change_one_token_per_row(source),
      np.tile(target, (7, 1)),
  )  # fmt: skip
  assert np.all(changed_states(states))


def test_padding_at_the_end_of_a_source_changes_nothing(params):
  source, target = draw_tokens(2, 5, seed=1), draw_tokens(2, 4, seed=2)
  expected = logits(params, source, target)
  longer = np.pad(source, ((0, 0), (0, 3)), constant_values=PAD)
  assert_close(logits(params, longer, target), expected)
  table = params['encoder']['token_embedder']['embedding']
  moved = params | {
      'encoder': params['encoder'] | {
          'token_embedder': {'embedding': table.at[PAD].add(1)}
      }
  }
  np.testing.assert_array_equal(
      logits(moved, longer, target), logits(params, longer, target)
  )
  # Within a text it is a token like any other: <|endoftext|>.
  longer[:, 6] = source[:, 0]
  assert np.any(
      logits(moved, longer, target) != logits(params, longer, target)
  )


def test_cross_attention_rotates_each_side_by_its_own_positions(params):
  source, target = draw_tokens(2, 5, seed=1), draw_tokens(2, 4, seed=2)
  encoded = apply({'params': params}, source, method='encode')

  def decode(decoder_shift, encoder_shift):
    return apply(
        {'params': params},
        encoded,
        source,
        target,
        decoder_positions=jnp.tile(jnp.arange(4) + decoder_shift, (2, 1)),
        encoder_positions=jnp.tile(jnp.arange(5) + encoder_shift, (2, 1)),
        method='decode',
    )

  expected = apply({'params': params}, source, target)
  assert_close(decode(0, 0), expected)
  assert_close(decode(30, 30), expected, 1e-4)
  assert np.abs(decode(0, 1) - expected).max() > 1e-3
  assert np.abs(decode(1, 0) - expected).max() > 1e-3


def test_packed_examples_equal_those_alone_in_their_rows(params):
  sources = draw_tokens(1, 5, seed=1), draw_tokens(1, 3, seed=2)
  targets = draw_tokens(1, 4, seed=3), draw_tokens(1, 6, seed=4)

  def pack(examples, length):
    lengths = [example.shape[1] for example in examples]
    rest = length - sum(lengths)
    tokens = np.concatenate([*examples, draw_tokens(1, rest)], axis=1)
    ids = np.repeat([1, 2, 0], [*lengths, rest])[None]
    index = np.concatenate([np.arange(n) for n in (*lengths, rest)])[None]
    return tokens, ids, index

  source, source_ids, source_index = pack(sources, 10)
  target, target_ids, target_index = pack(targets, 11)
  states = apply(
      {'params': params}, source, target, source_ids, target_ids,
      source_index, target_index,
  )  # fmt: skip
  for segment, pair in enumerate(zip(sources, targets, strict=True), start=1):
    alone = apply({'params': params}, *pair)
    assert_close(states[:, target_ids[0] == segment], alone)


def test_without_cross_attention_it_is_plain_codegen(params):
  """On the same ids, whatever the source; the trunk is CodeGen's layers."""
  decoder = dict(params['decoder'])
  last = dict(decoder.pop('last_layer'))
  cross = last.pop('cross_attention')
  plain = decoder | {
      'layers': jax.tree.map(
          lambda trunk, layer: jnp.concatenate([trunk, layer[None]]),
          decoder['layers'],
          last,
      )
  }
  no_cross = cross | {'out': {'kernel': jnp.zeros_like(cross['out']['kernel'])}}
  silenced = params | {
      'decoder': params['decoder'] | {
          'last_layer': last | {'cross_attention': no_cross}
      }
  }
  source, target = draw_tokens(2, 5, seed=1), draw_tokens(2, 6, seed=2)
  codegen = CONFIG.decoder.make_model(COMPUTATION)
  variables = {'params': {'decoder': plain}}
  states = jax.jit(codegen.apply)(variables, source[:, :1], target)
  expected = codegen.apply(variables, method='output_head').logits(states)
  assert_close(logits(silenced, source, target), expected)
  difference = logits(params, source, target) - expected
  assert np.abs(difference[..., :131]).max() > 0.1


def mean_loss(config, computation, rngs=None):
  """Returns (trainable, frozen) -> loss of random padded rows."""
  model = config.make_model(computation)
  source = jnp.asarray(draw_tokens(8, 7, seed=1)).at[:3, 4:].set(config.pad_id)
  target = jnp.asarray(draw_tokens(8, 5, seed=2))

  def loss(trainable, frozen):
    params = merge_params(trainable, frozen)
    return cross_entropy(model, params, source, target, rngs)

  return loss


@functools.cache
def loss_function(dropout=False, **changes):
  """Returns a compiled (trainable, frozen) -> (loss, gradients)."""
  computation = dataclasses.replace(COMPUTATION, **changes)
  rngs = {'dropout': jax.random.key(7, impl='rbg')} if dropout else None
  return jax.jit(jax.value_and_grad(mean_loss(CONFIG, computation, rngs)))


def test_scanned_layers_equal_unrolled_ones(params):
  loss, gradients = loss_function()(*partition_params(params, TRAINABLE))
  found = loss_function(scan_layers=False)(
      *partition_params(unroll(params), TRAINABLE)
  )
  jax.tree.map(assert_close, found, (loss, unroll(gradients)))


def test_what_is_computed_again_is_the_same(params):
  parts = partition_params(params, TRAINABLE)
  expected = loss_function()(*parts)
  found = loss_function(remat_policy='full')(*parts)
  jax.tree.map(assert_close, found, expected)


def test_dropout_follows_its_switch(params):
  source, target = draw_tokens(2, 5, seed=1), draw_tokens(2, 6, seed=2)
  dropped = apply(
      {'params': params}, source, target, deterministic=False,
      rngs={'dropout': jax.random.key(0)},
  )  # fmt: skip
  assert not np.allclose(dropped, apply({'params': params}, source, target))


def test_gradients_are_those_of_the_trained_parts_alone(params):
  trainable, frozen = partition_params(params, TRAINABLE)
  _, gradients = loss_function()(trainable, frozen)
  paths = flax.traverse_util.flatten_dict(gradients, sep='/')
  assert {path.split('/')[0] for path in paths} == {
      'encoder', 'encoder_to_decoder', 'decoder'
  }
  assert {path for path in paths if path.startswith('decoder/')} == {
      f'decoder/last_layer/cross_attention/{name}/kernel'
      for name in ('query', 'key', 'value', 'out')
  }
  for path, gradient in paths.items():
    assert np.any(gradient), path


def trunk_loops(program):
  """The loops over the trunk: no other loop of the model is as long."""
  length = CONFIG.decoder.num_layers - 1
  return [
      equation
      for equation in equations(program)
      if equation.primitive.name == 'scan'
      and equation.params['length'] == length
  ]


@pytest.mark.parametrize('policy', ['none', 'dots', 'full'])
def test_the_trunk_runs_once_forward_and_saves_nothing(params, policy):
  trainable, frozen = partition_params(params, TRAINABLE)
  step = loss_function(dropout=True, remat_policy=policy)
  program = jax.make_jaxpr(step)(trainable, frozen).jaxpr
  (loop,) = trunk_loops(program)
  # Nothing leaves it but what one layer hands to the next, and that has the
  # shape of activations: no stack of what a backward pass would look at.
  shapes = {out.aval.shape for out in loop.outvars if out.aval.ndim}
  assert shapes == {(8, 4, CONFIG.decoder.emb_dim)}
  assert not any(
      inner.primitive.name in ('remat2', 'checkpoint', 'remat')
      for inner in equations(loop.params['jaxpr'].jaxpr)
  )
  # Four projections, two products of attention, two of the feed-forward layer.
  assert count_products(loop.params['jaxpr'].jaxpr) == 8


def test_a_trained_trunk_would_be_seen(params):
  """The test above can fail."""
  trainable, frozen = partition_params(params, ('.*',))
  program = jax.make_jaxpr(loss_function())(trainable, frozen).jaxpr
  forward, backward = trunk_loops(program)
  length = forward.params['length']
  assert any(out.aval.shape[:1] == (length,) for out in forward.outvars)


# Heads and batch divide by 8; no two axes have the same size.
DIVISIBLE = ShallowEncoderDeepDecoderConfig(
    encoder=CodeGenConfig(
        vocab_size=131,
        emb_dim=24,
        num_layers=2,
        num_heads=8,
        head_dim=6,
        rotary_dim=4,
        mlp_dim=48,
    ),
    decoder=CodeGenConfig(
        vocab_size=131,
        emb_dim=40,
        num_layers=4,
        num_heads=16,
        head_dim=10,
        rotary_dim=2,
        mlp_dim=56,
    ),
    pad_id=0,
)


@functools.cache
def loss_states_and_gradients(mesh_shape, num_devices):
  """Of the divisible model on a mesh, computed as training computes them."""
  mesh = sharding.make_mesh(mesh_shape, jax.devices()[:num_devices])
  model = DIVISIBLE.make_model(Computation(dtype='float32'))
  boxed = jax.eval_shape(model.init_params, jax.random.key(0))
  names = jax.tree.map(
      tuple,
      nn.get_partition_spec(boxed),
      is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
  )
  rules = sharding.DEFAULT_RULES
  shardings = sharding.tree_shardings(names, mesh, rules)
  numbers = np.random.default_rng(5)
  params = jax.tree.map(
      lambda leaf: numbers.normal(0, 0.3, leaf.shape).astype(np.float32),
      nn.unbox(boxed),
  )
  params = jax.device_put(params, shardings)
  loss = mean_loss(DIVISIBLE, Computation(dtype='float32'))
  source = jnp.asarray(draw_tokens(8, 7, seed=1))
  target = jnp.asarray(draw_tokens(8, 5, seed=2))

  @jax.jit
  def compute(params):
    with sharding.activation_sharding(mesh, rules):
      states = model.apply({'params': params}, source, target)
      return states, jax.value_and_grad(loss)(
          *partition_params(params, TRAINABLE)
      )

  kernel = params['decoder']['layers']['mlp']['wi']['kernel']
  shard = kernel.addressable_shards[0].data
  assert kernel.size == shard.size * mesh_shape[1] * mesh_shape[2]
  return jax.tree.map(np.asarray, compute(params))


@pytest.mark.parametrize('mesh_shape', [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_sharded_equals_unsharded(mesh_shape):
  expected = loss_states_and_gradients((1, 1, 1), 1)
  found = loss_states_and_gradients(mesh_shape, 8)

  def compare(path, one, other):
    scale = np.abs(other).max()
    assert scale > 0
    worst = np.abs(one - other).max() / scale
    assert worst <= 1e-5, f'{jax.tree_util.keystr(path)}: {worst}'

  jax.tree_util.tree_map_with_path(compare, found, expected)


def test_paths_are_those_that_checkpoints_rely_on(params):
  paths = {
      '/'.join(key.key for key in path)
      for path, _ in jax.tree_util.tree_leaves_with_path(params)
  }
  layer = {
      'layer_norm/scale',
      'layer_norm/bias',
      'mlp/wi/kernel',
      'mlp/wi/bias',
      'mlp/wo/kernel',
      'mlp/wo/bias',
  }
  projections = {f'{name}/kernel' for name in ('query', 'key', 'value', 'out')}
  layer |= {f'self_attention/{name}' for name in projections}
  last = layer | {f'cross_attention/{name}' for name in projections}
  norm = {'final_layer_norm/scale', 'final_layer_norm/bias'}
  stack = {'token_embedder/embedding'} | norm | {f'layers/{x}' for x in layer}
  assert paths == (
      {f'encoder/{name}' for name in stack}
      | {'encoder_to_decoder/kernel', 'encoder_to_decoder/bias'}
      | {f'decoder/{name}' for name in stack}
      | {f'decoder/last_layer/{name}' for name in last}
      | {'decoder/output_head/kernel', 'decoder/output_head/bias'}
  )
  trunk = params['decoder']['layers']['mlp']['wi']['kernel']
  assert trunk.shape == (3, 34, 41)  # All layers but the last.
  assert params['encoder_to_decoder']['kernel'].shape == (22, 34)


def test_stacks_that_do_not_fit_are_refused():
  smaller = dataclasses.replace(CONFIG.encoder, vocab_size=130)
  with pytest.raises(UserError, match='one vocab_size, found 130 and 131'):
    dataclasses.replace(CONFIG, encoder=smaller)
  shallow = dataclasses.replace(CONFIG.decoder, num_layers=1)
  with pytest.raises(UserError, match='2 layers or more.*found 1'):
    dataclasses.replace(CONFIG, decoder=shallow)


def test_the_stacks_have_the_special_tokens_of_the_model():
  config = dataclasses.replace(CONFIG, pad_id=5, eos_id=6, decoder_start_id=7)
  for stack in (config.encoder, config.decoder):
    assert (stack.pad_id, stack.eos_id, stack.decoder_start_id) == (5, 6, 7)
  assert config.decoder.emb_dim == CONFIG.decoder.emb_dim
  assert rebuild(describe(config)) == config


def test_a_configuration_says_what_goes_with_it():
  assert CONFIG.vocab_size == 131
  assert CONFIG.head_counts() == {'encoder': 3, 'decoder': 7}
  assert CONFIG.prompt_to_decoder and not CONFIG.indent_with_tabs
  assert 'codegen' in CONFIG.vocabulary_kinds
  assert 'codet5' not in CONFIG.vocabulary_kinds
