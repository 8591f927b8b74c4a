"""What a model is made of: parameters by part, trainable and frozen."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.traverse_util

from codet5p_jax.planning.parameters import (
    count,
    count_by_part,
    parameter_shapes,
)
from codet5p_jax.training.partition import partition_params


def info(
    model: Any,
    trainable: Sequence[str] | None = None,
    model_trainable: Sequence[str] = ('.*',),
) -> int:
  """Prints a model's sizes and parameter counts; allocates nothing.

  Args:
    model: configuration of the network.
    trainable: patterns of parameter paths that a run would train; None for
      those of the model.
    model_trainable: the patterns that go with the model.

  Returns:
    The number of parameters.
  """
  shapes = parameter_shapes(model.make_model())
  for name, value in _sizes(model):
    print(f'{name:34}{value!s:>16}')
  print()
  _print_parts(shapes, model_trainable if trainable is None else trainable)
  return count(shapes)


def _sizes(model: Any) -> Iterator[tuple[str, Any]]:
  """Yields the fields of a configuration, those of its stacks by name."""
  for field in dataclasses.fields(model):
    value = getattr(model, field.name)
    if dataclasses.is_dataclass(value):
      for name, size in _sizes(value):
        yield f'{field.name}.{name}', size
    else:
      yield field.name, value


def _print_parts(
    shapes: dict[str, tuple[int, ...]], trainable: Sequence[str]
) -> None:
  nested = flax.traverse_util.unflatten_dict(shapes, sep='/')
  selected = flax.traverse_util.flatten_dict(
      partition_params(nested, trainable)[0], sep='/'
  )
  parts, trained = count_by_part(shapes), count_by_part(selected)
  parts['total'], trained['total'] = count(shapes), count(selected)
  print(f'{"part":34}{"parameters":>16}{"trainable":>16}{"frozen":>16}')
  for part, total in parts.items():
    train = trained.get(part, 0)
    print(f'{part:34}{total:16,}{train:16,}{total - train:16,}')
