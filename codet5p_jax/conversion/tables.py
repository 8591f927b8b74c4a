"""Rows of a conversion table, and what a table makes of a folder's tensors.

A family's table says where each tensor of Hugging Face goes, once, for both
directions:

    Row('layer.0.SelfAttention.q.weight', 'self_attention/query/kernel',
        TO_HEADS)
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from codet5p_jax.conversion.layouts import Layout
from codet5p_jax.errors import UserError

# Shape and dtype by name, ours or theirs.
Shapes = Mapping[str, jax.ShapeDtypeStruct]

_FLOATS = ('float16', 'bfloat16', 'float32')


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor of Hugging Face.

  Attributes:
    theirs: its name.
    ours: the path of our leaf, or of several that it fuses, in its order.
    layout: how its numbers lie in ours.
  """

  theirs: str
  ours: str | tuple[str, ...]
  layout: Layout

  @property
  def paths(self) -> tuple[str, ...]:
    return (self.ours,) if isinstance(self.ours, str) else self.ours


def within(theirs: str, ours: str, rows: Iterable[Row]) -> tuple[Row, ...]:
  """Returns the rows of a module, under the names of the module.

  >>> from codet5p_jax.conversion.layouts import SAME
  >>> [row] = within('h.3.', 'layers_3/', [Row('ln_1.bias', 'norm/bias', SAME)])
  >>> row.theirs, row.ours
  ('h.3.ln_1.bias', 'layers_3/norm/bias')
  """
  return tuple(
      dataclasses.replace(
          row,
          theirs=f'{theirs}{row.theirs}',
          ours=(
              f'{ours}{row.ours}'
              if isinstance(row.ours, str)
              else tuple(f'{ours}{path}' for path in row.ours)
          ),
      )
      for row in rows
  )


@dataclasses.dataclass(frozen=True)
class Family:
  """All that conversion knows of one `model_type`.

  Attributes:
    model_type: of config.json.
    config_class: our configuration.
    vocabulary_kind: of the tokenizer that the released models have.
    rows: (our configuration) -> the table.
    read_config: (config.json) -> our configuration.
    write_config: (our configuration) -> config.json, but for the dtype.
    measure: (shapes of their tensors) -> {field of config.json: what the
      tensors say}, with a dot between a nested field's names.
    token_ids: (our configuration) -> generation_config.json.
    aliases: {their name: other names of the same tensor}, of which a folder
      may have any; written is the first alone.
    ignored: pattern of their names that hold no weight.
    buffers: (our configuration) -> {their name: shape} of the lower triangles
      of bytes that belong to the layout, and hold no weight.
  """

  model_type: str
  config_class: type
  vocabulary_kind: str
  rows: Callable[[Any], tuple[Row, ...]]
  read_config: Callable[[Mapping[str, Any]], Any]
  write_config: Callable[[Any], dict[str, Any]]
  measure: Callable[[Mapping[str, tuple[int, ...]]], dict[str, int | None]]
  token_ids: Callable[[Any], dict[str, int]]
  aliases: Mapping[str, tuple[str, ...]] = dataclasses.field(
      default_factory=dict
  )
  ignored: str = r'(?!)'  # Matches nothing.
  buffers: Callable[[Any], dict[str, tuple[int, ...]]] = lambda config: {}


def field(
    config: Mapping[str, Any],
    name: str,
    kind: type[int] | type[float] | type[bool] = int,
    default: int | float | bool | None = None,
) -> Any:
  """Returns a number, or true or false, of config.json.

  Args:
    config: config.json, or a part of it.
    name: of the field.
    kind: of the value; a float may be written as an integer.
    default: where the field is absent or null; None if it must be there.

  Raises:
    UserError: it is missing, or of another type.
  """
  value = config.get(name)
  if value is None and default is not None:
    return default
  kinds = (int, float) if kind is float else kind
  if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool):
    words = {int: 'an integer', float: 'a number', bool: 'true or false'}
    raise UserError(
        f'expected {name} in config.json to be {words[kind]}, found '
        f'{"none" if value is None else repr(value)}; correct the file'
    )
  return kind(value)


def require_field(
    config: Mapping[str, Any], name: str, values: Sequence[Any]
) -> None:
  """Checks a field that may be absent; `values` begins with its default.

  Raises:
    UserError: it says something that our networks do not compute.
  """
  if (found := config.get(name, values[0])) not in values:
    raise UserError(
        f'expected {name} in config.json to be {values[0]!r}, the only one '
        f'that this family of CodeT5+ has, found {found!r}; this model cannot '
        f'be converted'
    )


def require_agreement(
    config: Mapping[str, Any], measured: Mapping[str, int | None]
) -> None:
  """Compares config.json with what the tensors say, where both speak.

  Args:
    config: config.json.
    measured: see `Family.measure`.

  Raises:
    UserError: they contradict each other; every such field is named.
  """
  faults = []
  for name, size in measured.items():
    value: Any = config
    for key in name.split('.'):
      value = value.get(key) if isinstance(value, Mapping) else None
    if value is not None and size is not None and value != size:
      faults.append(f'{name} is {value!r} but {size} by the tensors')
  if faults:
    raise UserError(
        f'expected config.json to agree with the tensors, found that '
        f'{"; ".join(faults)}; correct the file'
    )


def sizes(
    shapes: Mapping[str, tuple[int, ...]], name: str
) -> tuple[int | None, int | None]:
  """Returns the two sizes of a tensor, None where it has none."""
  shape = shapes.get(name, ())
  return (shape[0], shape[1]) if len(shape) == 2 else (None, None)


def count_layers(
    shapes: Mapping[str, tuple[int, ...]], pattern: str
) -> int | None:
  """Returns one more than the highest number of a layer, None without any."""
  found = [re.match(pattern, name) for name in shapes]
  return max((int(match[1]) + 1 for match in found if match), default=None)


def their_shapes(
    rows: Iterable[Row], shapes: Shapes
) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each tensor of a table, given those of our leaves."""
  return {
      row.theirs: row.layout.their_shape(
          [shapes[path].shape for path in row.paths]
      )
      for row in rows
  }


def find_tensors(
    family: Family,
    expected: Mapping[str, tuple[int, ...]],
    found: Shapes,
    where: str,
) -> dict[str, str]:
  """Finds each tensor of a table among those of a folder.

  Args:
    family: knows aliases and what holds no weight.
    expected: shapes of the table's tensors, by their names.
    found: the folder's tensors.
    where: the folder, for the message.

  Returns:
    {name in the table: a name in the folder}.

  Raises:
    UserError: tensors are missing, too many or misshapen; all are named.
  """
  names = {}
  for name in expected:
    candidates = (name, *family.aliases.get(name, ()))
    if present := [other for other in candidates if other in found]:
      names[name] = present[0]
  known = {*expected, *(x for more in family.aliases.values() for x in more)}
  extra = [
      name
      for name in found
      if name not in known and not re.fullmatch(family.ignored, name)
  ]
  faults = {
      'missing': [name for name in expected if name not in names],
      'unexpected': extra,
  }
  sized = {}
  for canonical, shape in expected.items():
    for name in (canonical, *family.aliases.get(canonical, ())):
      if name not in found:
        continue
      tensor = found[name]
      if tensor.shape != shape:
        words = f'of shape {list(tensor.shape)} instead of {list(shape)}'
        sized.setdefault(words, []).append(name)
      if str(tensor.dtype) not in _FLOATS:
        sized.setdefault(f'of {tensor.dtype}', []).append(name)
  words = [
      f'{len(names)} {kind} ({", ".join(fold_names(names))})'
      for kind, names in {**faults, **sized}.items()
      if names
  ]
  if words:
    raise UserError(
        f'expected in {where} the tensors of a {family.model_type} model, '
        f'found {"; ".join(words)}; give a folder that is whole, or correct '
        f'config.json'
    )
  return names


def fold_names(names: Iterable[str]) -> list[str]:
  """Returns names with those of several layers as one.

  >>> fold_names(['h.0.ln.bias', 'h.1.ln.bias', 'h.2.ln.bias', 'h.4.ln.bias',
  ...             'ln.bias'])
  ['h.{0-2,4}.ln.bias', 'ln.bias']
  """
  layers: dict[tuple[str, str], list[int]] = {}
  for name in names:
    before, number, after = re.fullmatch(
        r'(.*?)(?:(?<=[._])(\d+)(?=[./])(.*))?', name
    ).groups()
    numbers = layers.setdefault((before, after or ''), [])
    if number is not None:
      numbers.append(int(number))
  folded = []
  for (before, after), numbers in layers.items():
    runs: list[list[int]] = []
    for number in sorted(numbers):
      if runs and number == runs[-1][-1] + 1:
        runs[-1].append(number)
      else:
        runs.append([number])
    shown = ','.join(
        f'{run[0]}-{run[-1]}' if len(run) > 1 else str(run[0]) for run in runs
    )
    if len(numbers) > 1:
      shown = f'{{{shown}}}'
    folded.append(f'{before}{shown}{after}')
  return folded
