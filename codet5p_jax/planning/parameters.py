"""How many parameters a model has, without allocating one."""

import math
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax

from codet5p_jax.layers.embedding import padded_vocab_size


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
  """Logical shape of every parameter, by path.

  Rows that only pad the vocabulary to a whole multiple are not counted: they
  are no part of the model, and conversion drops them.
  """
  # The key is made within: so no device is claimed or waited for.
  params = jax.eval_shape(lambda: model.init_params(jax.random.key(0)))
  boxed = flax.traverse_util.flatten_dict(params, sep='/', is_leaf=_is_boxed)
  return {
      path: _logical_shape(leaf, model.config.vocab_size)
      for path, leaf in boxed.items()
  }


def count(shapes: dict[str, tuple[int, ...]]) -> int:
  """The number of parameters of these shapes."""
  return sum(math.prod(shape) for shape in shapes.values())


def count_by_part(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
  """The number of parameters of each part: the first word of their paths.

  >>> count_by_part({'encoder/a': (2, 3), 'encoder/b': (4,), 'decoder/a': (5,)})
  {'encoder': 10, 'decoder': 5}
  """
  parts: dict[str, int] = {}
  for path, shape in shapes.items():
    part = path.split('/', 1)[0]
    parts[part] = parts.get(part, 0) + math.prod(shape)
  return parts


def _is_boxed(path: tuple[str, ...], leaf: Any) -> bool:
  del path
  return isinstance(leaf, nn.Partitioned)


def _logical_shape(
    leaf: nn.Partitioned, vocab_size: int
) -> tuple[int, ...]:
  return tuple(
      vocab_size
      if name == 'vocab' and size == padded_vocab_size(vocab_size)
      else size
      for size, name in zip(leaf.value.shape, leaf.names, strict=True)
  )
