"""Layer normalisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from codet5p_jax.array_typing import Activations


class RMSNorm(nn.Module):
  """T5's layer norm: divides by the root mean square, no mean, no bias.

  Attributes:
    epsilon: added to the mean square.
    dtype: of the result; the mean square is taken in float32.
  """

  epsilon: float
  dtype: str

  @nn.compact
  def __call__(self, x: Activations) -> Activations:
    scale = self.param(
        'scale',
        nn.with_logical_partitioning(nn.initializers.ones, ('norm',)),
        (x.shape[-1],),
        jnp.float32,
    )
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    # As the reference does: round the normalised value first, then scale it.
    y = (x * jax.lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)
    return y * scale.astype(self.dtype)
