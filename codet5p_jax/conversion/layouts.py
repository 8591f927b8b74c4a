"""How a tensor of Hugging Face lies in ours, in both directions.

PyTorch keeps a linear map as [outputs, inputs], Flax as inputs followed by
outputs; and CodeGen fuses projections. Each layout only moves numbers: there
and back, every bit is the same.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from codet5p_jax.errors import UserError

Shape = tuple[int, ...]


@runtime_checkable
class Layout(Protocol):
  """One row's way from their tensor to our leaves, whose shapes are known."""

  def their_shape(self, shapes: Sequence[Shape]) -> Shape:
    """Returns the shape of their tensor, given those of our leaves."""

  def to_ours(
      self, tensor: np.ndarray, shapes: Sequence[Shape]
  ) -> tuple[np.ndarray, ...]:
    """Returns our leaves, perhaps as views, of their tensor."""

  def to_theirs(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
    """Returns their tensor, perhaps as a view, of our leaves."""


@dataclasses.dataclass(frozen=True)
class Same:
  """Embeddings, norms, biases: nothing moves."""

  def their_shape(self, shapes: Sequence[Shape]) -> Shape:
    (shape,) = shapes
    return tuple(shape)

  def to_ours(
      self, tensor: np.ndarray, shapes: Sequence[Shape]
  ) -> tuple[np.ndarray, ...]:
    return (tensor,)

  def to_theirs(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
    (leaf,) = leaves
    return leaf


@dataclasses.dataclass(frozen=True)
class Linear:
  """A linear map: ours inputs then outputs, theirs [outputs, inputs].

  Attributes:
    num_input_axes: how many of our axes are inputs: 2 for an attention's
      output, [heads, kv, embed], else 1.
  """

  num_input_axes: int = 1

  def their_shape(self, shapes: Sequence[Shape]) -> Shape:
    (shape,) = shapes
    return (
        math.prod(shape[self.num_input_axes :]),
        math.prod(shape[: self.num_input_axes]),
    )

  def to_ours(
      self, tensor: np.ndarray, shapes: Sequence[Shape]
  ) -> tuple[np.ndarray, ...]:
    (shape,) = shapes
    return (tensor.T.reshape(shape),)

  def to_theirs(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
    (leaf,) = leaves
    return leaf.reshape(self.their_shape([leaf.shape])[::-1]).T


@dataclasses.dataclass(frozen=True)
class FusedHeads:
  """CodeGen's fused projections: one [parts * outputs, inputs] of several.

  It was cut for four chips (`mp_num` in the released code): their rows are
  [chunk, part, heads of the chunk, kv], and a chunk holds a fourth of the
  heads of each part. The parts are queries, values, keys, in this order, or
  values and keys in cross-attention; ours are the leaves of a row, each
  [embed, heads, kv], in the order of the parts.

  Attributes:
    chunks: the chips that the projection was cut for.
  """

  chunks: int = 4

  def their_shape(self, shapes: Sequence[Shape]) -> Shape:
    embed, heads, kv = shapes[0]
    if heads % self.chunks:
      raise UserError(
          f'expected a number of heads that {self.chunks} divides, as the '
          f'fused projections of CodeGen need, found {heads}; choose another '
          f'number of heads'
      )
    return (len(shapes) * heads * kv, embed)

  def to_ours(
      self, tensor: np.ndarray, shapes: Sequence[Shape]
  ) -> tuple[np.ndarray, ...]:
    embed, heads, kv = shapes[0]
    rows = tensor.reshape(
        self.chunks, len(shapes), heads // self.chunks, kv, embed
    )
    return tuple(
        rows[:, part].reshape(heads, kv, embed).transpose(2, 0, 1)
        for part in range(len(shapes))
    )

  def to_theirs(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
    embed, heads, kv = leaves[0].shape
    parts = [
        leaf.transpose(1, 2, 0).reshape(
            self.chunks, heads // self.chunks, kv, embed
        )
        for leaf in leaves
    ]
    return np.stack(parts, axis=1).reshape(
        self.their_shape([leaf.shape for leaf in leaves])
    )


SAME = Same()
TRANSPOSED = Linear()
TO_HEADS = Linear()  # Ours [embed, heads, kv].
FROM_HEADS = Linear(num_input_axes=2)  # Ours [heads, kv, embed].
FUSED_HEADS = FusedHeads()
