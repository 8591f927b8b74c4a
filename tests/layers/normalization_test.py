import jax
import jax.numpy as jnp
import numpy as np

from codet5p_jax.layers.normalization import LayerNorm, RMSNorm

NUMBERS = np.random.default_rng(0)
SCALE = NUMBERS.uniform(0.5, 1.5, 11).astype(np.float32)


def normalize(x, dtype, epsilon=1e-6):
  return RMSNorm(epsilon, dtype).apply({'params': {'scale': SCALE}}, x)


def test_the_norm_divides_by_the_root_mean_square_and_scales():
  x = NUMBERS.normal(3, 2, (2, 5, 11)).astype(np.float32)
  wide = x.astype(np.float64)
  root = np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 0.1)
  np.testing.assert_allclose(
      normalize(jnp.asarray(x), 'float32', epsilon=0.1),
      wide / root * SCALE,
      rtol=1e-6,
  )


def test_bfloat16_rounds_the_normalised_value_and_nothing_before():
  x = jnp.asarray(NUMBERS.normal(3, 2, (4, 50, 11)), jnp.bfloat16)
  ones = {'params': {'scale': np.ones(11, np.float32)}}
  exact = RMSNorm(1e-6, 'float32').apply(ones, x.astype(jnp.float32))
  found = RMSNorm(1e-6, 'bfloat16').apply(ones, x)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
  scaled = normalize(x, 'bfloat16')
  np.testing.assert_array_equal(scaled, found * SCALE.astype(jnp.bfloat16))


def test_a_row_of_zeros_stays_zero():
  zeros = jnp.zeros((1, 2, 11))
  np.testing.assert_array_equal(normalize(zeros, 'float32'), zeros)


def test_layer_norm_subtracts_the_mean_and_divides_by_the_deviation():
  x = NUMBERS.normal(3, 2, (2, 5, 11)).astype(np.float32)
  bias = NUMBERS.normal(size=11).astype(np.float32)
  wide = x.astype(np.float64)
  centred = wide - wide.mean(axis=-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 0.1)
  found = LayerNorm(0.1, 'float32').apply(
      {'params': {'scale': SCALE, 'bias': bias}}, jnp.asarray(x)
  )
  np.testing.assert_allclose(
      found, centred / deviation * SCALE + bias, rtol=1e-5, atol=1e-6
  )


def test_layer_norm_rounds_to_bfloat16_once():
  x = jnp.asarray(NUMBERS.normal(3, 2, (4, 50, 11)), jnp.bfloat16)
  params = {'params': {'scale': SCALE, 'bias': SCALE}}
  exact = LayerNorm(1e-5, 'float32').apply(params, x.astype(jnp.float32))
  found = LayerNorm(1e-5, 'bfloat16').apply(params, x)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_layer_norm_begins_as_the_plain_norm():
  params = LayerNorm(1e-5, 'float32').init(
      jax.random.key(0), jnp.ones((1, 1, 11))
  )['params']
  np.testing.assert_array_equal(params['scale'].unbox(), np.ones(11))
  np.testing.assert_array_equal(params['bias'].unbox(), np.zeros(11))
