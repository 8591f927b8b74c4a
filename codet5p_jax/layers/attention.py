"""Multi-head attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from codet5p_jax.array_typing import (
    AttentionBias,
    AttentionMask,
    Keys,
    Queries,
)
from codet5p_jax.layers.dense import Dense
from codet5p_jax.sharding import constrain


def attention_weights(
    query: Queries,
    key: Keys,
    bias: Float[Array, '#batch #heads q_length kv_length'] | None = None,
    mask: Bool[Array, '#batch #heads #q_length kv_length'] | None = None,
) -> Float[Array, 'batch heads q_length kv_length']:
  """Softmax over keys, [batch, heads, q_length, kv_length] in float32.

  Logits are not scaled: T5 folds 1/sqrt(kv) into its initial queries. A query
  that may attend to nothing gets equal weights, as in the reference.
  """
  logits = jnp.einsum(
      'bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32
  )
  if bias is not None:
    logits = logits + bias
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(logits, axis=-1)


class Attention(nn.Module):
  """Attention with its four projections, none with a bias.

  Attributes:
    num_heads: number of heads.
    head_dim: width of a head.
    dropout_rate: of the attention weights.
    dtype: of the computation; logits and softmax are always float32.
  """

  num_heads: int
  head_dim: int
  dropout_rate: float
  dtype: str

  @nn.compact
  def __call__(
      self,
      queries: Float[Array, 'batch q_length embed'],
      keys_and_values: Float[Array, 'batch kv_length embed'],
      bias: AttentionBias | None,
      mask: AttentionMask | None,
      deterministic: bool,
  ) -> Float[Array, 'batch q_length embed']:
    """Attends from `queries` to `keys_and_values` (the same for self).

    Args:
      queries: [batch, q_length, embed].
      keys_and_values: [batch, kv_length, embed].
      bias: added to the logits.
      mask: True where a query may attend.
      deterministic: no dropout.

    Returns:
      [batch, q_length, embed].
    """

    def project(x, name, init_scale=1.0):
      return Dense(
          (self.num_heads, self.head_dim),
          ('embed', 'heads', 'kv'),
          init_scale=init_scale,
          dtype=self.dtype,
          name=name,
      )(x)

    query = project(queries, 'query', init_scale=1 / self.head_dim)
    key = project(keys_and_values, 'key')
    value = project(keys_and_values, 'value')
    query = constrain(query, 'batch', 'act_length', 'act_heads', 'act_kv')
    key = constrain(key, 'batch', 'act_kv_length', 'act_heads', 'act_kv')
    value = constrain(value, 'batch', 'act_kv_length', 'act_heads', 'act_kv')

    weights = attention_weights(query, key, bias, mask).astype(self.dtype)
    weights = nn.Dropout(self.dropout_rate)(weights, deterministic)
    mixed = jnp.einsum('bhqk,bkhd->bqhd', weights, value)
    mixed = constrain(mixed, 'batch', 'act_length', 'act_heads', 'act_kv')
    return Dense(
        (queries.shape[-1],),
        ('heads', 'kv', 'embed'),
        num_input_axes=2,
        dtype=self.dtype,
        name='out',
    )(mixed)
