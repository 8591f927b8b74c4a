"""Properties of CodeGen; parity/codegen_test.py compares its numbers."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.computation import Computation
from tests.models.properties import (
    change_one_token_per_row,
    changed_states,
    count_products,
    cross_entropy,
    draw_tokens,
    unroll,
)

# All sizes differ. Where a test says nothing else, dropout is switched off.
CONFIG = CodeGenConfig(
    vocab_size=131,
    emb_dim=24,
    num_layers=3,
    num_heads=5,
    head_dim=6,
    rotary_dim=4,
    mlp_dim=29,
    pad_id=7,
    eos_id=7,
    decoder_start_id=7,
)
COMPUTATION = Computation(dtype='float32', dropout_rate=0.2)
CLM = 3

apply = jax.jit(
    CONFIG.make_model(COMPUTATION).apply,
    static_argnames=('method', 'deterministic'),
)


@pytest.fixture(scope='module')
def params(random_parameters):
  return random_parameters(CONFIG.make_model(COMPUTATION))


def run(params, tokens, *segments_and_positions, **options):
  segment_ids, positions = segments_and_positions or (None, None)
  source = jnp.full((len(tokens), 1), CLM)
  return apply(
      {'params': params}, source, tokens, None, segment_ids, None, positions,
      **options,
  )  # fmt: skip


def assert_close(found, expected, tolerance=1e-5):
  np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_a_token_sees_itself_and_what_stands_before(params):
  states = run(params, change_one_token_per_row(draw_tokens(6)))
  seen = changed_states(states)
  np.testing.assert_array_equal(seen, np.triu(np.ones((6, 6))))


def test_the_order_of_earlier_tokens_matters(params):
  states = run(params, np.array([[4, 5, 6, 8], [5, 4, 6, 8]]))
  assert np.abs(states[0, 2:] - states[1, 2:]).max() > 1e-3


@pytest.mark.parametrize('positions_restart', [False, True])
def test_packed_examples_equal_those_alone_in_their_rows(
    params, positions_restart
):
  """Rotations enter as differences: whether they restart changes nothing."""
  first, second = draw_tokens(1, 5, seed=1), draw_tokens(1, 4, seed=2)
  padding = draw_tokens(1, 2, seed=3)
  packed = np.concatenate([first, second, padding], axis=1)
  segment_ids = np.array([[1] * 5 + [2] * 4 + [0] * 2])
  positions = np.array([[*range(5), *range(4), 0, 0]])
  states = run(
      params, packed, segment_ids, positions if positions_restart else None
  )
  assert_close(states[:, :5], run(params, first))
  assert_close(states[:, 5:9], run(params, second))


def test_the_source_is_one_token_that_nobody_looks_at(params):
  tokens = draw_tokens(2, 4)
  one, other = (
      apply({'params': params}, jnp.full((2, 1), clm), tokens)
      for clm in (CLM, CLM + 1)
  )
  np.testing.assert_array_equal(one, other)
  model = CONFIG.make_model(COMPUTATION)
  with pytest.raises(UserError, match='one token .* found 6; .* decoder-only'):
    jax.eval_shape(model.apply, {'params': params}, draw_tokens(2, 6), tokens)


def test_encoding_and_decoding_are_what_the_call_does(params):
  source, tokens = jnp.full((2, 1), CLM), draw_tokens(2, 4)
  encoded = apply({'params': params}, source, method='encode')
  assert encoded.shape == (2, 1, 0)
  np.testing.assert_array_equal(
      apply({'params': params}, encoded, source, tokens, method='decode'),
      run(params, tokens),
  )


@functools.cache
def loss_function(dropout=False, **changes):
  """Returns a compiled params -> (loss, gradients)."""
  model = CONFIG.make_model(dataclasses.replace(COMPUTATION, **changes))
  target = jnp.asarray(draw_tokens(3, 7))
  source = jnp.full((3, 1), CLM)
  rngs = {'dropout': jax.random.key(7, impl='rbg')} if dropout else None
  return jax.jit(
      jax.value_and_grad(
          lambda params: cross_entropy(model, params, source, target, rngs)
      )
  )


def test_scanned_layers_equal_unrolled_ones(params):
  loss, gradients = loss_function()(params)
  found = loss_function(scan_layers=False)(unroll(params))
  jax.tree.map(assert_close, found, (loss, unroll(gradients)))


def test_what_is_computed_again_is_the_same_with_its_dropout(params):
  expected = loss_function(dropout=True)(params)
  found = loss_function(dropout=True, remat_policy='full')(params)
  jax.tree.map(assert_close, found, expected)


def test_policies_trade_memory_for_products(params):
  none, dots, full = (
      count_products(
          jax.make_jaxpr(loss_function(remat_policy=policy))(params).jaxpr
      )
      for policy in ('none', 'dots', 'full')
  )
  assert none < dots < full


def test_dropout_follows_its_key_and_its_switch(params):
  tokens = draw_tokens(2, 5)

  def drop(seed):
    rngs = {'dropout': jax.random.key(seed)}
    return run(params, tokens, deterministic=False, rngs=rngs)

  np.testing.assert_array_equal(drop(0), drop(0))
  assert not np.allclose(drop(0), drop(1))
  assert not np.allclose(drop(0), run(params, tokens))


def test_bfloat16_stays_near_float32(params):
  tokens = draw_tokens(2, 5)
  model = CONFIG.make_model(Computation(dtype='bfloat16'))
  source = jnp.full((2, 1), CLM)
  found = jax.jit(model.apply)({'params': params}, source, tokens)
  assert found.dtype == jnp.bfloat16
  expected = run(params, tokens)
  error = np.linalg.norm(found.astype(jnp.float32) - expected)
  assert 0 < error < 0.05 * np.linalg.norm(expected)


def test_initial_parameters_have_the_deviation_of_codegen():
  config = dataclasses.replace(CONFIG, emb_dim=40, mlp_dim=80)
  params = nn.unbox(
      jax.jit(config.make_model().init_params)(jax.random.key(0))
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    keys = [key.key for key in path]
    if keys[-1] == 'scale':
      np.testing.assert_array_equal(leaf, 1)
    elif keys[-1] == 'bias':
      np.testing.assert_array_equal(leaf, 0)
    else:
      # The smallest kernels hold 3,600 values: five standard errors.
      assert np.std(leaf) == pytest.approx(0.02, rel=0.06), keys
      if 'layers' in keys:
        assert not np.any(leaf[0] == leaf[1])


def test_paths_are_those_that_checkpoints_rely_on(params):
  shapes = {
      '/'.join(key.key for key in path): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  layer = {
      'layer_norm/scale': (24,),
      'layer_norm/bias': (24,),
      'self_attention/query/kernel': (24, 5, 6),
      'self_attention/key/kernel': (24, 5, 6),
      'self_attention/value/kernel': (24, 5, 6),
      'self_attention/out/kernel': (5, 6, 24),
      'mlp/wi/kernel': (24, 29),
      'mlp/wi/bias': (29,),
      'mlp/wo/kernel': (29, 24),
      'mlp/wo/bias': (24,),
  }
  assert shapes == {
      'decoder/token_embedder/embedding': (256, 24),
      **{f'decoder/layers/{name}': (3, *x) for name, x in layer.items()},
      'decoder/final_layer_norm/scale': (24,),
      'decoder/final_layer_norm/bias': (24,),
      'decoder/output_head/kernel': (256, 24),
      'decoder/output_head/bias': (256,),
  }


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'rotary_dim': 3}, 'rotary_dim to be even .* found 3'),
        ({'rotary_dim': 8}, 'at most the head_dim of 6, found 8'),
        ({'rotary_dim': 0}, 'rotary_dim to be at least 1'),
        ({'num_layers': 0}, 'num_layers to be at least 1'),
    ],
)
def test_sizes_that_mean_nothing_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(CONFIG, **changes)


def test_a_configuration_says_what_goes_with_it():
  assert CONFIG.head_counts() == {'decoder': 5}
  assert CONFIG.prompt_to_decoder
  assert 'codegen' in CONFIG.vocabulary_kinds
  assert 'codet5' not in CONFIG.vocabulary_kinds
