import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.layers.dense import MLP, Dense, fan_in_stddev, matmul

NUMBERS = np.random.default_rng(0)


def draw(*shape):
  return jnp.asarray(NUMBERS.normal(size=shape), jnp.float32)


X, KERNEL, UPSTREAM = draw(2, 3, 5), draw(5, 7), draw(2, 3, 7)


def gradients(product, x, kernel, upstream):
  return jax.jit(jax.grad(
      lambda x, kernel: jnp.sum(product(x, kernel) * upstream), (0, 1)
  ))(x, kernel)


def test_gradients_equal_those_of_a_plain_product():
  found = gradients(lambda x, k: matmul(x, k, 'float32'), X, KERNEL, UPSTREAM)
  expected = gradients(jnp.matmul, X, KERNEL, UPSTREAM)
  product = matmul(X, KERNEL, 'float32')
  np.testing.assert_allclose(product, X @ KERNEL, rtol=1e-6)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_kernel_gradients_skip_the_rounding_to_bfloat16():
  """Their inputs are rounded, their sum is not."""
  x, upstream = X.astype(jnp.bfloat16), UPSTREAM.astype(jnp.bfloat16)
  dx, d_kernel = gradients(
      lambda x, k: matmul(x, k, 'bfloat16'), x, KERNEL, upstream
  )
  assert (dx.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.float32)
  exact = np.einsum(
      'bld,blf->df', *(np.asarray(y, np.float64) for y in (x, upstream))
  )
  np.testing.assert_allclose(d_kernel, exact, rtol=1e-5, atol=1e-6)
  assert np.any(d_kernel.astype(jnp.bfloat16) != d_kernel)


def test_a_dense_layer_contracts_the_last_axes():
  split = Dense((3, 4), ('embed', 'heads', 'kv'), 1.0)
  merge = Dense((5,), ('heads', 'kv', 'embed'), 1.0, num_input_axes=2)
  one, two = draw(5, 3, 4), draw(3, 4, 5)
  heads = split.apply({'params': {'kernel': one}}, X)
  np.testing.assert_allclose(
      heads, np.einsum('bld,dhk->blhk', X, one), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
      merge.apply({'params': {'kernel': two}}, heads),
      np.einsum('blhk,hkd->bld', heads, two),
      rtol=1e-5,
      atol=1e-5,
  )


def test_initial_kernels_have_their_deviation_and_biases_are_zero():
  merge = Dense(
      (50,), ('heads', 'kv', 'embed'), 0.3, 2, bias_axes=('norm',)
  )
  params = merge.init(jax.random.key(0), draw(1, 1, 6, 15))['params']
  kernel, bias = params['kernel'], params['bias']
  assert (kernel.names, bias.names) == (('heads', 'kv', 'embed'), ('norm',))
  kernel, bias = kernel.unbox(), bias.unbox()
  assert kernel.shape == (6, 15, 50) and kernel.dtype == jnp.float32
  # Of 4,500 values: five standard errors.
  assert np.std(kernel) == pytest.approx(0.3, rel=0.055)
  assert bias.shape == (50,) and not np.any(bias)


@pytest.mark.parametrize('fan_in', [7, 768, 768 * 64, 4096])
def test_the_deviation_of_a_fan_in_is_that_of_variance_scaling(fan_in):
  """To the last bit, so that a seed gives T5 the weights it always gave."""
  options = jax.random.key(0), (fan_in, 3)
  expected = jax.nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
  found = jax.nn.initializers.normal(fan_in_stddev(fan_in))
  np.testing.assert_array_equal(found(*options), expected(*options))


def test_a_bias_is_added_to_each_output():
  axes = ('embed', 'heads', 'kv')
  layer = Dense((3, 4), axes, 1.0, bias_axes=axes[1:])
  kernel, bias = draw(5, 3, 4), draw(3, 4)
  np.testing.assert_allclose(
      layer.apply({'params': {'kernel': kernel, 'bias': bias}}, X),
      np.einsum('bld,dhk->blhk', X, kernel) + bias,
      rtol=1e-5,
      atol=1e-6,
  )


INTEGERS = jnp.asarray(NUMBERS.integers(-127, 128, (5, 3, 4)), jnp.int8)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_outputs_of_int8_kernels_are_scaled_one_by_one(dtype):
  layer = Dense(
      (3, 4),
      ('embed', 'heads', 'kv'),
      1.0,
      bias_axes=('heads', 'kv'),
      dtype=dtype,
  )
  scale, bias = jnp.abs(draw(3, 4)) / 50, draw(3, 4)
  params = {'kernel': INTEGERS, 'kernel_scale': scale, 'bias': bias}
  found = layer.apply({'params': params}, X)
  assert found.dtype == dtype
  expected = np.einsum('bld,dhk->blhk', X, INTEGERS * scale) + bias
  tolerance = {'float32': 1e-5, 'bfloat16': 3e-2}[dtype]
  np.testing.assert_allclose(
      found.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance
  )


def test_the_scale_of_an_output_is_not_rounded_to_bfloat16():
  """Its error would not average out, as errors of weights do."""
  layer = Dense((1,), ('embed', 'mlp'), 1.0, dtype='bfloat16')
  kernel = jnp.ones((1, 1), jnp.int8)
  scale = jnp.full((1,), 1.003)  # Between two bfloat16, 1 and 1.0078.
  params = {'kernel': kernel, 'kernel_scale': scale}
  found = layer.apply({'params': params}, jnp.array([[1.5]]))
  assert found == (1.5 * scale).astype(jnp.bfloat16)
  assert found != jnp.bfloat16(1.5) * scale.astype(jnp.bfloat16)


def test_gradients_pass_through_int8_kernels_to_their_inputs():
  layer = Dense((3, 4), ('embed', 'heads', 'kv'), 1.0)
  scale, upstream = jnp.abs(draw(3, 4)), draw(2, 3, 3, 4)

  @jax.jit
  def gradient(x):
    params = {'kernel': INTEGERS, 'kernel_scale': scale}
    return jax.grad(
        lambda x: jnp.sum(layer.apply({'params': params}, x) * upstream)
    )(x)

  np.testing.assert_allclose(
      gradient(X),
      np.einsum('blhk,dhk->bld', upstream, INTEGERS * scale),
      rtol=1e-4,
      atol=1e-4,
  )


def test_the_feed_forward_layer_is_relu_between_two_maps():
  wi, wo = draw(5, 13), draw(13, 5)
  params = {'params': {'wi': {'kernel': wi}, 'wo': {'kernel': wo}}}
  np.testing.assert_allclose(
      MLP(13, 0.5, 'float32').apply(params, X, deterministic=True),
      np.maximum(X @ wi, 0) @ wo,
      rtol=1e-5,
      atol=1e-5,
  )


def test_dropout_in_the_feed_forward_layer_drops_hidden_units():
  wi, wo = jnp.ones((5, 400)), jnp.ones((400, 5))
  params = {'params': {'wi': {'kernel': wi}, 'wo': {'kernel': wo}}}
  layer = MLP(400, 0.25, 'float32')
  found = layer.apply(
      params, jnp.ones((1, 1, 5)), False, rngs={'dropout': jax.random.key(0)}
  )
  # Of 400 units of value 5, about 300 remain, each divided by 0.75.
  kept = np.asarray(found)[0, 0] * 0.75 / 5
  assert 250 < kept[0] < 350
  np.testing.assert_allclose(kept, np.round(kept), rtol=1e-5)
