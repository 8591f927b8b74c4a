"""Matrix products and the two layers made of them."""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from codet5p_jax.sharding import constrain


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, '... rows'],
    kernel: Float[Array, 'rows columns'],
    dtype: str,
) -> Float[Array, '... columns']:
  """`x @ kernel` computed in `dtype`; the kernel keeps its own.

  All leading axes are folded into one, forward and backward, so that each of
  the three products is one plain two-dimensional matrix product: what every
  backend's fastest kernel takes. The kernel's gradient leaves the product in
  the kernel's own precision (float32), without a rounding to `dtype` between.
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
  d_kernel = jax.lax.dot_general(
      rows, dy, (((0,), (0,)), ((), ())), preferred_element_type=kernel.dtype
  )
  return dx.reshape(x.shape).astype(x.dtype), d_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)


class Dense(nn.Module):
  """A linear map without bias over the last axes of its input.

  Attributes:
    features: sizes of the axes that replace the contracted ones.
    num_input_axes: how many trailing axes of the input are contracted.
    kernel_axes: logical names of the kernel's axes, input axes first.
    init_scale: variance of the initial kernel times its fan-in.
    dtype: of the computation; the kernel is stored in float32.
  """

  features: Sequence[int]
  kernel_axes: Sequence[str]
  num_input_axes: int = 1
  init_scale: float = 1.0
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
    split = x.ndim - self.num_input_axes
    inputs = x.shape[split:]
    outputs = tuple(self.features)
    init = nn.initializers.variance_scaling(
        self.init_scale,
        'fan_in',
        'normal',
        in_axis=tuple(range(len(inputs))),
        out_axis=tuple(range(len(inputs), len(inputs) + len(outputs))),
    )
    kernel = self.param(
        'kernel',
        nn.with_logical_partitioning(init, tuple(self.kernel_axes)),
        inputs + outputs,
        jnp.float32,
    )
    y = matmul(
        x.reshape(*x.shape[:split], -1),
        kernel.reshape(math.prod(inputs), math.prod(outputs)),
        self.dtype,
    )
    return y.reshape(x.shape[:split] + outputs)


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
    x = Dense((self.mlp_dim,), ('embed', 'mlp'), dtype=self.dtype, name='wi')(x)
    x = jax.nn.relu(x)
    x = constrain(x, 'batch', 'act_length', 'act_mlp')
    x = nn.Dropout(self.dropout_rate)(x, deterministic)
    return Dense((embed,), ('mlp', 'embed'), dtype=self.dtype, name='wo')(x)
