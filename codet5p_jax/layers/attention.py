"""Multi-head attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from codet5p_jax.array_typing import (
    AttentionBias,
    CrossMask,
    Keys,
    Queries,
    Values,
)
from codet5p_jax.layers.dense import Dense
from codet5p_jax.layers.positions import apply_rotary
from codet5p_jax.sharding import constrain

# Names of what an attention keeps.
_CACHED = ('key', 'value')


def attention_weights(
    query: Queries,
    key: Keys,
    logits_scale: float,
    bias: Float[Array, '#batch #heads q_length kv_length'] | None = None,
    mask: Bool[Array, '#batch #heads #q_length kv_length'] | None = None,
) -> Float[Array, 'batch heads q_length kv_length']:
  """Softmax over keys, [batch, heads, q_length, kv_length] in float32.

  Logits are products of queries and keys times `logits_scale`: kv^-0.5 in
  CodeGen; 1 in T5, which folds that into its initial queries. A query that may
  attend to nothing gets equal weights, as in the reference.
  """
  logits = logits_scale * jnp.einsum(
      'bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32
  )
  if bias is not None:
    logits = logits + bias
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(logits, axis=-1)


class Attention(nn.Module):
  """Attention with its four projections, none with a bias.

  Where the collection `cache` is mutable, keys and values are kept in it, as
  `key` and `value` [batch, heads, kv_length, kv]: all of them where no slot is
  given, and otherwise those of a slot are replaced. Heads come before the
  length, as the products with queries take them, lest each token have all of
  them moved.

  Attributes:
    num_heads: number of heads.
    head_dim: width of a head.
    logits_scale: see `attention_weights`.
    rotary_dim: dimensions of a head that are rotated by position, 0 for none;
      see `apply_rotary`.
    query_stddev: of the initial projection of queries.
    key_value_stddev: of those of keys and of values.
    out_stddev: of that of the heads' results.
    dropout_rate: of the attention weights.
    dtype: of the computation; logits and softmax are always float32.
  """

  num_heads: int
  head_dim: int
  logits_scale: float
  rotary_dim: int
  query_stddev: float
  key_value_stddev: float
  out_stddev: float
  dropout_rate: float
  dtype: str

  @nn.compact
  def __call__(
      self,
      queries: Float[Array, 'batch q_length embed'],
      keys_and_values: Float[Array, 'kv_batch kv_length embed'] | None,
      bias: AttentionBias | None,
      mask: CrossMask | None,
      deterministic: bool,
      query_positions: Int[Array, '#batch q_length'] | None = None,
      key_positions: Int[Array, '#kv_batch kv_length'] | None = None,
      cache_slot: Int[Array, ''] | None = None,
  ) -> Float[Array, 'batch q_length embed']:
    """Attends from `queries` to `keys_and_values` (the same for self).

    Args:
      queries: [batch, q_length, embed].
      keys_and_values: [batch, kv_length, embed]; None for those in the cache.
        There may be fewer rows of them than of queries: each then serves as
        many rows of queries, one after the other.
      bias: added to the logits.
      mask: True where a query may attend; rows as those of the keys.
      deterministic: no dropout.
      query_positions: by which queries are rotated; needed if any are.
      key_positions: likewise of keys, those that are not yet in the cache.
      cache_slot: where in the cache the keys and values go; the queries then
        attend to all of it. None: they attend to what is given.

    Returns:
      [batch, q_length, embed].
    """

    def project(x, name, init_stddev):
      return Dense(
          (self.num_heads, self.head_dim),
          ('embed', 'heads', 'kv'),
          init_stddev,
          dtype=self.dtype,
          name=name,
      )(x)

    query = project(queries, 'query', self.query_stddev)
    query = constrain(query, 'batch', 'act_length', 'act_heads', 'act_kv')
    if self.rotary_dim:
      query = apply_rotary(query, query_positions, self.rotary_dim)
    if keys_and_values is None:
      key, value = (
          self.get_variable('cache', name).swapaxes(1, 2) for name in _CACHED
      )
    else:
      key = project(keys_and_values, 'key', self.key_value_stddev)
      value = project(keys_and_values, 'value', self.key_value_stddev)
      key = constrain(key, 'batch', 'act_kv_length', 'act_heads', 'act_kv')
      value = constrain(value, 'batch', 'act_kv_length', 'act_heads', 'act_kv')
      if self.rotary_dim:
        key = apply_rotary(key, key_positions, self.rotary_dim)
      key, value = self._cached(key, value, cache_slot)

    shape = query.shape
    # Rows that share keys are as many queries of one row.
    query = query.reshape(key.shape[0], -1, *shape[2:])
    weights = attention_weights(query, key, self.logits_scale, bias, mask)
    weights = weights.astype(self.dtype)
    weights = nn.Dropout(self.dropout_rate)(weights, deterministic)
    mixed = jnp.einsum('bhqk,bkhd->bqhd', weights, value).reshape(shape)
    mixed = constrain(mixed, 'batch', 'act_length', 'act_heads', 'act_kv')
    return Dense(
        (queries.shape[-1],),
        ('heads', 'kv', 'embed'),
        self.out_stddev,
        num_input_axes=2,
        dtype=self.dtype,
        name='out',
    )(mixed)

  def _cached(
      self, key: Keys, value: Values, cache_slot: Int[Array, ''] | None
  ) -> tuple[
      Float[Array, 'batch _ heads kv'], Float[Array, 'batch _ heads kv']
  ]:
    """Puts keys and values in the cache, if any; returns what it holds."""
    if not self.is_mutable_collection('cache') or self.is_initializing():
      return key, value
    kept = []
    for name, array in zip(_CACHED, (key, value), strict=True):
      array = array.swapaxes(1, 2)
      if cache_slot is not None:
        array = jax.lax.dynamic_update_slice_in_dim(
            self.get_variable('cache', name), array, cache_slot, axis=2
        )
      self.put_variable('cache', name, array)
      kept.append(array.swapaxes(1, 2))
    return tuple(kept)
