import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.layers.attention import Attention, attention_weights

BATCH, QUERIES, KEYS, EMBED, HEADS, KV = 2, 4, 6, 11, 3, 5
NUMBERS = np.random.default_rng(0)


def draw(*shape):
  return jnp.asarray(NUMBERS.normal(size=shape), jnp.float32)


QUERY, KEY = draw(BATCH, QUERIES, HEADS, KV), draw(BATCH, KEYS, HEADS, KV)
BIAS = draw(1, HEADS, QUERIES, KEYS)
MASK = jnp.asarray(NUMBERS.random((BATCH, 1, QUERIES, KEYS)) < 0.6)
MASK = MASK.at[..., 0].set(True)


def softmax_over_keys(query, key, bias, mask, logits_scale=1):
  """One query and head at a time, over the keys that it may attend to."""
  bias = np.broadcast_to(bias, (BATCH, HEADS, QUERIES, KEYS))
  mask = np.broadcast_to(mask, bias.shape)
  weights = np.zeros(bias.shape)
  for b, h, q in np.ndindex(BATCH, HEADS, QUERIES):
    seen = mask[b, h, q]
    logits = np.asarray(key, np.float64)[b, seen, h] @ query[b, q, h]
    numerators = np.exp(logits * logits_scale + bias[b, h, q, seen])
    weights[b, h, q, seen] = numerators / numerators.sum()
  return weights


@pytest.mark.parametrize('logits_scale', [1.0, 0.3])
def test_weights_are_the_softmax_of_scaled_logits_over_allowed_keys(
    logits_scale
):
  """The scale is of the products alone, not of the bias."""
  weights = attention_weights(QUERY, KEY, logits_scale, BIAS, MASK)
  expected = softmax_over_keys(QUERY, KEY, BIAS, MASK, logits_scale)
  np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(
      np.asarray(weights)[~np.broadcast_to(MASK, weights.shape)], 0
  )


def test_no_bias_is_a_bias_of_zero_and_no_mask_allows_all():
  np.testing.assert_allclose(
      attention_weights(QUERY, KEY, 1.0),
      softmax_over_keys(QUERY, KEY, 0, True),
      rtol=1e-5,
  )


def test_a_query_without_any_key_gets_equal_weights():
  mask = MASK.at[0, 0, 1].set(False)
  weights = attention_weights(QUERY, KEY, 1.0, BIAS, mask)
  np.testing.assert_allclose(weights[0, :, 1], 1 / KEYS, rtol=1e-6)


def test_the_softmax_is_float32_under_bfloat16():
  query, key = QUERY.astype(jnp.bfloat16), KEY.astype(jnp.bfloat16)
  weights = attention_weights(query, key, 1.0, BIAS, MASK)
  assert weights.dtype == jnp.float32
  query, key = (np.asarray(x, np.float32) for x in (query, key))
  np.testing.assert_allclose(
      weights, softmax_over_keys(query, key, BIAS, MASK), rtol=1e-5, atol=1e-7
  )


def make_attention(**changes):
  fields = {
      'num_heads': HEADS,
      'head_dim': KV,
      'logits_scale': 1.0,
      'rotary_dim': 0,
      'query_stddev': 0.01,
      'key_value_stddev': 0.1,
      'out_stddev': 1.0,
      'dropout_rate': 0.5,
      'dtype': 'float32',
      **changes,
  }
  return Attention(**fields)


@pytest.fixture(scope='module')
def initialised():
  layer = make_attention()
  inputs = draw(BATCH, QUERIES, EMBED), draw(BATCH, KEYS, EMBED)
  params = nn.unbox(
      jax.jit(layer.init, static_argnums=5)(
          jax.random.key(0), *inputs, BIAS, MASK, True
      )
  )['params']
  return layer, params, inputs


def test_attention_mixes_values_by_its_weights(initialised):
  layer, params, (queries, others) = initialised
  params = jax.tree.map(lambda x: draw(*x.shape), params)
  kernel = {name: params[name]['kernel'] for name in params}
  query = np.einsum('bqd,dhk->bqhk', queries, kernel['query'])
  key = np.einsum('bvd,dhk->bvhk', others, kernel['key'])
  value = np.einsum('bvd,dhk->bvhk', others, kernel['value'])
  weights = softmax_over_keys(query, key, BIAS, MASK)
  mixed = np.einsum('bhqv,bvhk->bqhk', weights, value)
  np.testing.assert_allclose(
      layer.apply({'params': params}, queries, others, BIAS, MASK, True),
      np.einsum('bqhk,hkd->bqd', mixed, kernel['out']),
      rtol=1e-4,
      atol=1e-4,
  )


def test_attention_weights_are_dropped_unless_deterministic(initialised):
  layer, params, inputs = initialised

  def attend(deterministic, seed=0):
    return layer.apply(
        {'params': params},
        *inputs,
        BIAS,
        MASK,
        deterministic,
        rngs={'dropout': jax.random.key(seed)},
    )

  np.testing.assert_array_equal(attend(True, 0), attend(True, 1))
  np.testing.assert_array_equal(attend(False, 0), attend(False, 0))
  assert not np.allclose(attend(False, 0), attend(True))
  assert not np.allclose(attend(False, 0), attend(False, 1))


def test_initial_projections_have_their_deviations():
  layer = make_attention(num_heads=9, head_dim=20)
  x = jnp.ones((1, 1, 30))
  params = nn.unbox(layer.init(jax.random.key(0), x, x, None, None, True))
  deviations = {'query': 0.01, 'key': 0.1, 'value': 0.1, 'out': 1.0}
  for name, leaf in params['params'].items():
    # Of 5,400 values: five standard errors.
    assert np.std(leaf['kernel']) == pytest.approx(deviations[name], rel=0.05)


@pytest.fixture(scope='module')
def rotary():
  """Attends from 4 queries to 6 keys, (query_positions, key_positions)."""
  layer = make_attention(rotary_dim=2, logits_scale=KV**-0.5)
  queries, others = draw(BATCH, QUERIES, EMBED), draw(BATCH, KEYS, EMBED)
  params = jax.tree.map(
      lambda leaf: 0.3 * draw(*leaf.shape),
      nn.unbox(
          jax.eval_shape(
              lambda key: layer.init(
                  key, queries, others, None, None, True,
                  jnp.arange(QUERIES)[None], jnp.arange(KEYS)[None],
              ),
              jax.random.key(0),
          )
      ),
  )  # fmt: skip

  @jax.jit
  def attend(query_positions, key_positions):
    return layer.apply(
        params, queries, others, None, None, True, query_positions,
        key_positions,
    )  # fmt: skip

  return attend


def test_rotary_attention_sees_differences_of_positions_alone(rotary):
  queries, keys = jnp.arange(QUERIES)[None], jnp.array([[3, 1, 4, 1, 5, 9]])
  found = rotary(queries, keys)
  np.testing.assert_allclose(
      rotary(queries + 100, keys + 100), found, rtol=1e-4, atol=1e-4
  )
  for moved in (rotary(queries + 1, keys), rotary(queries, keys + 1)):
    assert np.all(np.abs(moved - found).max(axis=-1) > 1e-3)


def test_rows_may_have_positions_of_their_own(rotary):
  queries, keys = jnp.arange(QUERIES), jnp.arange(KEYS)
  both = rotary(
      jnp.stack([queries, queries + 2]), jnp.stack([keys, keys * 2])
  )
  np.testing.assert_allclose(
      both[0], rotary(queries[None], keys[None])[0], rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(
      both[1],
      rotary(queries[None] + 2, keys[None] * 2)[1],
      rtol=1e-5,
      atol=1e-5,
  )
