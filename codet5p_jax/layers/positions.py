"""Positions: T5's relative bias, and CodeGen's rotation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from codet5p_jax.array_typing import AttentionBias, Positions, Tokens


def positions_or_index(
    tokens: Tokens, positions: Positions | None
) -> Int[Array, '#batch length']:
  """The positions, or the index of each token where none are given."""
  return jnp.arange(tokens.shape[1])[None] if positions is None else positions


def apply_rotary(
    x: Float[Array, 'batch length heads kv'],
    positions: Int[Array, '#batch length'],
    rotary_dim: int,
) -> Float[Array, 'batch length heads kv']:
  """Rotates queries or keys by their positions (RoFormer, Su et al. 2021).

  Interleaved, as GPT-J and CodeGen do it: the pair of dimensions (2i, 2i + 1)
  turns by the angle position * 10000^(-2i / rotary_dim). Dimensions from
  `rotary_dim` on stay as they are. Computed in float32.

  Args:
    x: queries or keys; the result has their dtype.
    positions: of each, so that their products depend on differences alone.
    rotary_dim: even, and at most kv.
  """
  kv = x.shape[-1]
  frequencies = np.float64(10000) ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
  # Dimensions without a frequency turn by the angle 0.
  frequencies = np.pad(np.repeat(frequencies, 2), (0, kv - rotary_dim))
  angles = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(
      frequencies, jnp.float32
  )
  rows = x.astype(jnp.float32)
  # Each one's partner in its pair, by shifts: a reshape to [..., 2] would fill
  # whole registers of a TPU with two values.
  is_first = np.arange(kv) % 2 == 0
  partner = jnp.where(
      is_first, -jnp.roll(rows, -1, axis=-1), jnp.roll(rows, 1, axis=-1)
  )
  return (rows * jnp.cos(angles) + partner * jnp.sin(angles)).astype(x.dtype)


def relative_position_bucket(
    relative_position: Int[Array, '...'],
    bidirectional: bool,
    num_buckets: int,
    max_distance: int,
) -> Int[Array, '...']:
  """Sorts distances into buckets: exact when near, logarithmic when far.

  Follows T5 (transformers `T5Attention._relative_position_bucket`), whose
  logarithm is taken in float32 and truncated: at the borders between buckets
  another precision gives other buckets.

  >>> relative_position_bucket(jnp.array([-200, -9, -1, 0, 1, 9]), True, 32,
  ...                          128).tolist()
  [15, 8, 1, 0, 17, 24]

  Args:
    relative_position: key position minus query position.
    bidirectional: whether keys after the query get buckets of their own
      (encoder) or share bucket 0 (decoder).
    num_buckets: rows of the bias table.
    max_distance: from here on, all distances share the last bucket.
  """
  offset = jnp.zeros_like(relative_position)
  if bidirectional:
    num_buckets //= 2
    offset = num_buckets * (relative_position > 0).astype(offset.dtype)
    distance = jnp.abs(relative_position)
  else:
    distance = jnp.maximum(-relative_position, 0)
  max_exact = num_buckets // 2
  # Distances below max_exact take the other branch; 1 keeps the log finite.
  ratio = jnp.maximum(distance, 1).astype(jnp.float32) / max_exact
  # The operand order is the reference's: rounding decides at the borders.
  scaled = (
      jnp.log(ratio)
      / np.float32(np.log(max_distance / max_exact))
      * (num_buckets - max_exact)
  )
  far = max_exact + scaled.astype(offset.dtype)
  far = jnp.minimum(far, num_buckets - 1)
  return offset + jnp.where(distance < max_exact, distance, far)


class RelativePositionBias(nn.Module):
  """T5's learned bias on attention logits, one value per bucket and head.

  Attributes:
    num_heads: heads of the stack that shares this table.
    num_buckets: rows of the table.
    max_distance: distance from which the last bucket is used.
    bidirectional: see `relative_position_bucket`.
    init_stddev: of the initial table.
  """

  num_heads: int
  num_buckets: int
  max_distance: int
  bidirectional: bool
  init_stddev: float

  @nn.compact
  def __call__(
      self,
      query_positions: Int[Array, '#batch q_length'],
      key_positions: Int[Array, '#batch kv_length'],
  ) -> AttentionBias:
    """Returns the bias [batch, heads, q_length, kv_length] in float32."""
    table = self.param(
        'embedding',
        nn.with_logical_partitioning(
            nn.initializers.normal(self.init_stddev), ('buckets', 'heads')
        ),
        (self.num_buckets, self.num_heads),
        jnp.float32,
    )
    buckets = relative_position_bucket(
        key_positions[:, None, :] - query_positions[:, :, None],
        self.bidirectional,
        self.num_buckets,
        self.max_distance,
    )
    # A product with one-hot rows: its gradient is a product too, where that of
    # a look-up would be a scatter, slow on every backend.
    one_hot = jax.nn.one_hot(buckets, self.num_buckets, dtype=jnp.float32)
    return jnp.einsum(
        'bqkn,nh->bhqk', one_hot, table, precision=jax.lax.Precision.HIGHEST
    )
