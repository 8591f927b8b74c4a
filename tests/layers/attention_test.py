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


def softmax_over_keys(query, key, bias, mask):
  """One query and head at a time, over the keys that it may attend to."""
  bias = np.broadcast_to(bias, (BATCH, HEADS, QUERIES, KEYS))
  mask = np.broadcast_to(mask, bias.shape)
  weights = np.zeros(bias.shape)
  for b, h, q in np.ndindex(BATCH, HEADS, QUERIES):
    seen = mask[b, h, q]
    logits = np.asarray(key, np.float64)[b, seen, h] @ query[b, q, h]
    numerators = np.exp(logits + bias[b, h, q, seen])
    weights[b, h, q, seen] = numerators / numerators.sum()
  return weights


def test_weights_are_the_softmax_of_unscaled_logits_over_allowed_keys():
  weights = attention_weights(QUERY, KEY, BIAS, MASK)
  expected = softmax_over_keys(QUERY, KEY, BIAS, MASK)
  np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(
      np.asarray(weights)[~np.broadcast_to(MASK, weights.shape)], 0
  )


def test_no_bias_is_a_bias_of_zero_and_no_mask_allows_all():
  np.testing.assert_allclose(
      attention_weights(QUERY, KEY),
      softmax_over_keys(QUERY, KEY, 0, True),
      rtol=1e-5,
  )


def test_a_query_without_any_key_gets_equal_weights():
  mask = MASK.at[0, 0, 1].set(False)
  weights = attention_weights(QUERY, KEY, BIAS, mask)
  np.testing.assert_allclose(weights[0, :, 1], 1 / KEYS, rtol=1e-6)


def test_the_softmax_is_float32_under_bfloat16():
  query, key = QUERY.astype(jnp.bfloat16), KEY.astype(jnp.bfloat16)
  weights = attention_weights(query, key, BIAS, MASK)
  assert weights.dtype == jnp.float32
  query, key = (np.asarray(x, np.float32) for x in (query, key))
  np.testing.assert_allclose(
      weights, softmax_over_keys(query, key, BIAS, MASK), rtol=1e-5, atol=1e-7
  )


@pytest.fixture(scope='module')
def initialised():
  layer = Attention(HEADS, KV, 0.5, 'float32')
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
