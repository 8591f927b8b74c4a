"""Matrix products and the two layers made of them."""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from codet5p_jax.sharding import constrain


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, '... rows'],
    kernel: Num[Array, 'rows columns'],
    dtype: str,
) -> Float[Array, '... columns']:
  """`x @ kernel` computed in `dtype`; the kernel keeps its own.

  All leading axes are folded into one, forward and backward, so that each of
  the three products is one plain two-dimensional matrix product: what every
  backend's fastest kernel takes. The kernel's gradient leaves the product in
  the kernel's own precision (float32), without a rounding to `dtype` between.
  An int8 kernel has no gradient.
  """
  return _matmul_forward(x, kernel, dtype)[0]


def _matmul_forward(x, kernel, dtype):
  rows = x.reshape(-1, x.shape[-1]).astype(dtype)
  y = rows @ kernel.astype(dtype)
  return y.reshape(*x.shape[:-1], kernel.shape[1]), (x, kernel)


def _matmul_backward(dtype, residuals, dy):
  x, kernel = residuals
  rows = x.reshape(-1, x.shape[-1]).astype(dtype)
  dy = dy.reshape(-1, dy.shape[-1]).astype(dtype)
  dx = jax.lax.dot_general(dy, kernel.astype(dtype), (((1,), (1,)), ((), ())))
  dx = dx.reshape(x.shape).astype(x.dtype)
  if not jnp.issubdtype(kernel.dtype, jnp.floating):
    return dx, None
  d_kernel = jax.lax.dot_general(
      rows, dy, (((0,), (0,)), ((), ())), preferred_element_type=kernel.dtype
  )
  return dx, d_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)


def fan_in_stddev(fan_in: int) -> float:
  """Returns fan_in^-0.5, rounded to float32 as jax.nn.initializers round it."""
  return float(np.sqrt(np.float32(1 / fan_in)))


class Dense(nn.Module):
  """A linear map over the last axes of its input.

  An int8 kernel comes with `kernel_scale`, one factor per output; see
  layers/quantization.py, which makes both.

  Attributes:
    features: sizes of the axes that replace the contracted ones.
    kernel_axes: logical names of the kernel's axes, input axes first.
    init_stddev: of the initial kernel; a bias begins at 0.
    num_input_axes: how many trailing axes of the input are contracted.
    bias_axes: logical names of the bias's axes; None for no bias.
    dtype: of the computation; parameters are created in float32.
  """

  features: Sequence[int]
  kernel_axes: Sequence[str]
  init_stddev: float
  num_input_axes: int = 1
  bias_axes: Sequence[str] | None = None
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
    split = x.ndim - self.num_input_axes
    inputs = x.shape[split:]
    outputs = tuple(self.features)
    kernel = self.param(
        'kernel',
        nn.with_logical_partitioning(
            nn.initializers.normal(self.init_stddev), tuple(self.kernel_axes)
        ),
        inputs + outputs,
        jnp.float32,
    )
    y = matmul(
        x.reshape(*x.shape[:split], -1),
        kernel.reshape(math.prod(inputs), math.prod(outputs)),
        self.dtype,
    )
    y = y.reshape(x.shape[:split] + outputs)
    kernel_scale = self.get_variable('params', 'kernel_scale')
    if kernel_scale is not None:
      # In float32: a scale rounded to bfloat16 would shift its whole output.
      y = (y.astype(jnp.float32) * kernel_scale).astype(self.dtype)
    if self.bias_axes is not None:
      bias = self.param(
          'bias',
          nn.with_logical_partitioning(
              nn.initializers.zeros, tuple(self.bias_axes)
          ),
          outputs,
          jnp.float32,
      )
      y = y + bias.astype(self.dtype)
    return y


class MLP(nn.Module):
  """Feed-forward layer of T5 v1.0: ReLU between two maps without bias.

  Attributes:
    mlp_dim: the hidden width.
    dropout_rate: of the hidden activations.
    dtype: of the computation.
  """

  mlp_dim: int
  dropout_rate: float
  dtype: str

  @nn.compact
  def __call__(
      self, x: Float[Array, 'batch length embed'], deterministic: bool
  ) -> Float[Array, 'batch length embed']:
    embed = x.shape[-1]
    x = Dense(
        (self.mlp_dim,),
        ('embed', 'mlp'),
        fan_in_stddev(embed),
        dtype=self.dtype,
        name='wi',
    )(x)
    x = jax.nn.relu(x)
    x = constrain(x, 'batch', 'act_length', 'act_mlp')
    x = nn.Dropout(self.dropout_rate)(x, deterministic)
    return Dense(
        (embed,),
        ('mlp', 'embed'),
        fan_in_stddev(self.mlp_dim),
        dtype=self.dtype,
        name='wo',
    )(x)
