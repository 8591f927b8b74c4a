import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.layers.dense import MLP, Dense, matmul

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
  split = Dense((3, 4), ('embed', 'heads', 'kv'))
  merge = Dense((5,), ('heads', 'kv', 'embed'), num_input_axes=2)
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


def test_initial_kernels_have_the_variance_of_their_fan_in():
  merge = Dense((50,), ('heads', 'kv', 'embed'), 2, init_scale=0.25)
  kernel = merge.init(jax.random.key(0), draw(1, 1, 6, 15))['params']['kernel']
  kernel = kernel.unbox()
  assert kernel.shape == (6, 15, 50) and kernel.dtype == jnp.float32
  # Of 4,500 values: five standard errors.
  assert np.std(kernel) == pytest.approx((0.25 / 90) ** 0.5, rel=0.055)


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
