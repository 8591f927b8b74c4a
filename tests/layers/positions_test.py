import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.layers.positions import (
    RelativePositionBias,
    apply_rotary,
    positions_or_index,
    relative_position_bucket,
)

# Every distance to well beyond the last border.
RELATIVE = np.arange(-400, 401)


@pytest.mark.parametrize(
    ('bidirectional', 'num_buckets', 'max_distance'),
    [(True, 32, 128), (False, 32, 128), (True, 20, 90), (False, 12, 50)],
)
def test_buckets_are_where_the_logarithm_puts_them(
    bidirectional, num_buckets, max_distance
):
  """In exact arithmetic: borders solve exact * ratio**(k / far) = distance."""
  options = bidirectional, num_buckets, max_distance
  found = relative_position_bucket(jnp.asarray(RELATIVE), *options)
  compiled = jax.jit(relative_position_bucket, static_argnums=(1, 2, 3))
  np.testing.assert_array_equal(
      compiled(jnp.asarray(RELATIVE), *options), found
  )
  side = num_buckets // 2 if bidirectional else num_buckets
  near = side // 2
  far = side - near
  for relative, bucket in zip(RELATIVE, found.tolist(), strict=True):
    distance = abs(int(relative))
    if relative > 0:
      if not bidirectional:
        assert bucket == 0
        continue
      bucket -= side
    if distance < near:
      assert bucket == distance
      continue
    # The last k with near**far * ratio**k <= distance**far, in integers.
    reached = [
        k
        for k in range(far)
        if near**far * max_distance**k <= distance**far * near**k
    ]
    assert bucket == near + reached[-1]


@pytest.mark.parametrize('bidirectional', [True, False])
def test_the_bias_is_the_row_of_each_distance(bidirectional):
  layer = RelativePositionBias(3, 10, 40, bidirectional, init_stddev=1.0)
  table = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
  queries = jnp.array([[0, 1, 50], [7, 0, 1]])
  keys = jnp.array([[0, 3, 99, 2], [6, 7, 0, 1]])
  bias = layer.apply({'params': {'embedding': table}}, queries, keys)
  bucket = relative_position_bucket(
      keys[:, None, :] - queries[:, :, None], bidirectional, 10, 40
  )
  np.testing.assert_array_equal(
      bias, np.moveaxis(table[np.asarray(bucket)], -1, 1)
  )


def test_only_differences_of_positions_count():
  layer = RelativePositionBias(3, 10, 40, True, init_stddev=1.0)
  table = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
  index = jnp.arange(60)[None]
  np.testing.assert_array_equal(
      layer.apply({'params': {'embedding': table}}, index, index),
      layer.apply({'params': {'embedding': table}}, index + 999, index + 999),
  )


HEADS, KV, ROTARY = 3, 10, 6


def rows_of_heads(length, seed=0):
  numbers = np.random.default_rng(seed)
  return jnp.asarray(numbers.normal(size=(2, length, HEADS, KV)), jnp.float32)


def test_rotary_turns_pairs_as_complex_numbers():
  """Pair i is dimensions 2i and 2i + 1, and turns by position * frequency."""
  x = rows_of_heads(5)
  positions = np.array([[0, 1, 2, 50, 2047], [3, 3, 1, 0, 9]])
  found = np.asarray(apply_rotary(x, jnp.asarray(positions), ROTARY))
  x = np.asarray(x, np.float64)
  frequencies = 10000.0 ** (-np.arange(0, ROTARY, 2) / ROTARY)
  turns = np.exp(1j * positions[:, :, None, None] * frequencies)
  pairs = (x[..., 0:ROTARY:2] + 1j * x[..., 1:ROTARY:2]) * turns
  # Angles are float32: at 2,047 off by 1e-4 of their 2 pi at most.
  np.testing.assert_allclose(found[..., 0:ROTARY:2], pairs.real, atol=3e-4)
  np.testing.assert_allclose(found[..., 1:ROTARY:2], pairs.imag, atol=3e-4)
  np.testing.assert_array_equal(found[..., ROTARY:], x[..., ROTARY:])


def test_rotary_is_computed_in_float32_and_keeps_the_dtype():
  positions = jnp.arange(300)[None]
  x = rows_of_heads(300).astype(jnp.bfloat16)
  found = apply_rotary(x, positions, ROTARY)
  exact = apply_rotary(x.astype(jnp.float32), positions, ROTARY)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize('rotary_dim', [ROTARY, KV])
def test_products_of_rotated_rows_depend_on_differences_of_positions(
    rotary_dim
):
  query, key = rows_of_heads(1, seed=1), rows_of_heads(1, seed=2)

  def product(query_position, key_position):
    return jnp.sum(
        apply_rotary(query, jnp.array([[query_position]]), rotary_dim)
        * apply_rotary(key, jnp.array([[key_position]]), rotary_dim),
        axis=-1,
    )

  expected = product(7, 3)
  np.testing.assert_allclose(product(104, 100), expected, atol=1e-4)
  assert np.all(np.abs(product(3, 7) - expected) > 1e-3)


def test_positions_that_are_not_given_are_the_index():
  tokens, positions = jnp.ones((2, 3), jnp.int32), jnp.array([[0, 1, 0]] * 2)
  assert positions_or_index(tokens, None).tolist() == [[0, 1, 2]]
  assert positions_or_index(tokens, positions) is positions
