import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.layers.positions import (
    RelativePositionBias,
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
