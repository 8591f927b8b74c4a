"""Layer normalisation: T5's and CodeGen's."""

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


class LayerNorm(nn.Module):
  """The layer norm of Ba et al. 2016, with scale and bias.

  Attributes:
    epsilon: added to the variance.
    dtype: of the result; all is computed in float32.
  """

  epsilon: float
  dtype: str

  @nn.compact
  def __call__(self, x: Activations) -> Activations:
    scale, bias = (
        self.param(
            name,
            nn.with_logical_partitioning(init, ('norm',)),
            (x.shape[-1],),
            jnp.float32,
        ).astype(jnp.float32)
        for name, init in (
            ('scale', nn.initializers.ones),
            ('bias', nn.initializers.zeros),
        )
    )
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    y = x * jax.lax.rsqrt(variance + self.epsilon) * scale + bias
    return y.astype(self.dtype)
