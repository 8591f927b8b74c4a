"""How frozen parameters are stored: cast, or as int8 with a scale per channel.

A frozen kernel is read and never written, so it may be stored in less than the
computation needs. int8 is symmetric and of weights alone: beside `kernel` lies
`kernel_scale`, beside `embedding` `embedding_scale`, one float32 per output
channel, and `kernel * kernel_scale` stands for the weights. A layer computes
`(x @ kernel) * kernel_scale`, so no dequantised kernel is ever stored. Rounding
moves a result by at most half a scale times the sum of the inputs' magnitudes.

Where the scales stand follows from the logical names of a kernel's axes.
Norms, biases and position tables are small and stay in bfloat16.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Shaped

FROZEN_DTYPES = ('float32', 'bfloat16', 'int8')

# Of each kernel that is stored as int8: the axes over which a product with it
# sums. The others are its output channels. A table is looked up by rows, and a
# head's rows are its output channels, so both scale by rows.
_INPUT_AXES = {
    ('embed', 'heads', 'kv'): (0,),
    ('heads', 'kv', 'embed'): (0, 1),
    ('embed', 'mlp'): (0,),
    ('mlp', 'embed'): (0,),
    ('embed', 'decoder_embed'): (0,),
    ('vocab', 'embed'): (1,),
}

Axes = Sequence[str | None]


def input_axes(names: Axes) -> tuple[int, ...] | None:
  """The axes over which a product sums, None where nothing is quantised.

  >>> input_axes(('heads', 'kv', 'embed'))
  (0, 1)
  >>> input_axes(('layers', 'embed', 'mlp'))
  (1,)

  Args:
    names: the kernel's logical axis names, `layers` first when scanned.
  """
  stacked = int(tuple(names[:1]) == ('layers',))
  axes = _INPUT_AXES.get(tuple(names[stacked:]))
  return axes and tuple(axis + stacked for axis in axes)


def scale_names(names: Axes) -> tuple[str, ...]:
  """Logical axis names of a kernel's scales: words of their own.

  A kernel that is cut over the devices by its rows has scales that are not.

  >>> scale_names(('layers', 'embed', 'heads', 'kv'))
  ('layers', 'scale_heads', 'scale_kv')
  """
  summed = input_axes(names) or ()
  return tuple(
      name if name == 'layers' else f'scale_{name}'
      for axis, name in enumerate(names)
      if axis not in summed
  )


def quantize(
    kernel: Float[Array | np.ndarray, '...'], names: Axes
) -> tuple[Int8[Array | np.ndarray, '...'], Float[Array | np.ndarray, '...']]:
  """Rounds a kernel to 255 steps per output channel.

  NumPy arrays are handled by NumPy, on the host.

  Args:
    kernel: finite values in any floating-point dtype.
    names: its logical axis names.

  Returns:
    The kernel as int8 in [-127, 127], and its float32 scales of the output
    axes' shape: |kernel - int8 * scale| <= scale / 2, but for rounding in
    float32.
  """
  xp = np if isinstance(kernel, np.ndarray) else jnp
  axes = input_axes(names)
  kernel = kernel.astype(xp.float32)
  largest = xp.max(xp.abs(kernel), axis=axes, keepdims=True)
  # A channel of zeros, such as a row that pads a table, stays zeros; so does
  # one whose scale would be no normal number.
  normal = largest > 127 * np.finfo(np.float32).tiny
  scale = xp.where(normal, largest, 1).astype(xp.float32) / 127
  # Where values are so small that their scale is rounded, 128 could come out.
  steps = xp.clip(xp.round(kernel / scale), -127, 127)
  return steps.astype(xp.int8), xp.squeeze(scale, axes)


def stored_names(
    path: str, names: Axes, frozen_dtype: str
) -> dict[str, tuple[str | None, ...]]:
  """Logical axis names of what `store` returns, by path."""
  names = tuple(names)
  if frozen_dtype == 'int8' and input_axes(names) is not None:
    return {path: names, f'{path}_scale': scale_names(names)}
  return {path: names}


def store(
    path: str,
    leaf: Shaped[Array | np.ndarray, '...'],
    names: Axes,
    frozen_dtype: str,
) -> dict[str, jax.Array | np.ndarray]:
  """The form in which a frozen parameter is kept, by path.

  Args:
    path: of the parameter, such as `decoder/layers/mlp/wi/kernel`.
    leaf: its values; NumPy arrays stay NumPy arrays.
    names: its logical axis names.
    frozen_dtype: one of `FROZEN_DTYPES`.

  Returns:
    The leaf in that dtype under its own path. With int8, kernels and tables
    have their scales beside them and all others are bfloat16.
  """
  if frozen_dtype == 'int8':
    if input_axes(names) is not None:
      kernel, scale = quantize(leaf, names)
      return {path: kernel, f'{path}_scale': scale}
    frozen_dtype = 'bfloat16'
  return {path: leaf.astype(jnp.dtype(frozen_dtype))}
