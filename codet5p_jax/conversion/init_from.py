"""Which parameters of a model come from which other weights: INIT_FROM.

INIT_FROM is a list of (source, part, map):

  source  a folder, of this program or in Hugging Face's layout; or "fresh" for
          parameters that are drawn at random;
  part    which parameters of the model it gives: a regular expression, as in
          TRAINABLE, that stands for all below what it matches as well;
  map     how the source's paths become the model's: None where they are the
          same, or a list of (regular expression, replacement). The first
          expression that matches a whole path counts; a path that none matches
          keeps its name; a replacement of None leaves the parameter out.

Every parameter of the model must be given by exactly one entry, and every
parameter of a source must be used, left out by its map, or lie outside the part
that was asked for. Anything else stops the run before an array is read.
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from codet5p_jax.conversion.huggingface_folder import our_shapes
from codet5p_jax.errors import UserError
from codet5p_jax.storage import local_path

if TYPE_CHECKING:
  from codet5p_jax.conversion.sources import WeightSource

_logger = logging.getLogger(__name__)

FRESH = 'fresh'
# Paths listed of each kind of fault.
_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where a parameter comes from.

  Attributes:
    source: the weights that hold it.
    path: its path there.
  """

  source: 'WeightSource'
  path: str

  def read(self) -> np.ndarray:
    """The array, read now, with its dtype on disk."""
    return self.source.read(self.path)


@dataclasses.dataclass(frozen=True)
class Initialisation:
  """Where each parameter of a model comes from.

  Attributes:
    shapes: logical shape of every parameter, by its path in a checkpoint (one
      array per layer).
    origins: of the parameters that are given; the others are drawn.
  """

  shapes: Mapping[str, tuple[int, ...]]
  origins: Mapping[str, Origin]

  def sources(self) -> list['WeightSource']:
    """The weights that something comes from, each once."""
    sources = [origin.source for origin in self.origins.values()]
    return list({source.name: source for source in sources}.values())

  def require_digests(
      self, expected: Mapping[str, str], found: Mapping[str, str]
  ) -> None:
    """Compares what was read with what a run was trained with.

    Args:
      expected: {path: `digest_array`}, from the run's folder.
      found: of what its sources hold now.

    Raises:
      UserError: they differ.
    """
    self.require_known(expected)
    for path, digest in expected.items():
      if found.get(path) != digest:
        raise UserError(
            f'expected in {self.origins[path].source.name} the weights that '
            f'the run was trained with, found others at {path}; put them back, '
            f'or set INIT_FROM to where they lie now'
        )

  def require_known(self, paths: Collection[str]) -> None:
    """Checks that parameters have a source.

    Raises:
      UserError: one has none.
    """
    if unknown := [path for path in paths if path not in self.origins]:
      raise UserError(
          f'expected INIT_FROM to give what the run left frozen, found no '
          f'source for {listed(unknown)}; give the one it was trained with'
      )


def plan_initialisation(
    init_from: Sequence[Sequence[Any]],
    model: Any,
    open_source: Callable[[str], 'WeightSource'],
    needed: Collection[str] | None = None,
) -> Initialisation:
  """Finds a source for every parameter of a model; reads no array.

  Args:
    init_from: see above; empty for a model that is drawn as a whole.
    model: configuration of the network.
    open_source: of conversion/sources.py.
    needed: paths of the parameters that will be read; sources of others are not
      opened, and may be left away. None for all.

  Raises:
    UserError: a source cannot be used, or a parameter is unaccounted for; one
      line with everything that is missing, unexpected or misshapen.
  """
  shapes = {path: leaf.shape for path, leaf in our_shapes(model).items()}
  if not init_from:
    return Initialisation(shapes, {})
  opened = functools.cache(open_source)
  owners: dict[str, str] = {}
  origins: dict[str, Origin] = {}
  for number, entry in enumerate(init_from):
    source_name, part, mapping = _entry(entry, number)
    targets = _select(part, shapes)
    for path in targets:
      if path in owners:
        raise UserError(
            f'expected one source for each parameter, found that INIT_FROM '
            f'gives {path} from {owners[path]} and from {source_name}; mend '
            f'the parts'
        )
      owners[path] = source_name
    is_needed = needed is None or any(path in needed for path in targets)
    if source_name != FRESH and is_needed:
      origins |= _matched(opened(source_name), part, targets, mapping, shapes)
  claimed = shapes if needed is None else needed
  if unclaimed := [path for path in claimed if path not in owners]:
    raise UserError(
        f'expected INIT_FROM to account for every parameter of the model, '
        f'found nothing for {listed(unclaimed)}; add a source, or '
        f"('{FRESH}', PART, None) to have them drawn"
    )
  return Initialisation(shapes, origins)


def absolute(
    init_from: Sequence[Sequence[Any]],
) -> list[list[Any]]:
  """The entries with sources that mean the same from any folder, as JSON."""
  return [
      [
          source if source == FRESH else str(local_path(source)),
          part,
          mapping and [list(pair) for pair in mapping],
      ]
      for source, part, mapping in (
          _entry(entry, number) for number, entry in enumerate(init_from)
      )
  ]


def with_all_tokens(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Draws the rows of the tokens that a source's table does not have.

  Rows of zeros would not do: a norm multiplies their gradients by a thousand.

  Args:
    array: as `Origin.read` gives it.
    shape: of the parameter.
  """
  missing = shape[0] - array.shape[0] if shape else 0
  if not missing:
    return array
  rows = np.random.default_rng(0).normal(
      0.0, array.std(dtype=np.float32), (missing, *shape[1:])
  )
  return np.concatenate([array, rows.astype(array.dtype)])


def _entry(entry: Any, number: int) -> tuple[str, str, Sequence | None]:
  """Checks the form of one entry of INIT_FROM."""
  good = (
      isinstance(entry, Sequence)
      and len(entry) == 3
      and all(isinstance(x, str) for x in entry[:2])
      and (
          entry[2] is None
          or all(
              isinstance(pair, Sequence)
              and len(pair) == 2
              and isinstance(pair[0], str)
              and isinstance(pair[1], str | None)
              for pair in entry[2]
          )
      )
  )
  if not good:
    raise UserError(
        f'expected entries (source, part, map) in INIT_FROM, with a map of '
        f'None or of pairs (expression, replacement), found {entry!r} at place '
        f"{number}; write for instance ('/data/codet5p-220m', '.*', None)"
    )
  return entry[0], entry[1], entry[2]


def _select(part: str, paths: Mapping[str, Any]) -> list[str]:
  _compiled(part)  # As it was given.
  pattern = re.compile(f'(?:{part})(?:/.*)?')
  selected = [path for path in paths if pattern.fullmatch(path)]
  if not selected:
    raise UserError(
        f'expected each part in INIT_FROM to name parameters of the model, '
        f'found that {part!r} names none; a path looks like {min(paths)!r}'
    )
  return selected


def _compiled(expression: str) -> re.Pattern:
  try:
    return re.compile(expression)
  except re.error as error:
    raise UserError(
        f'expected a regular expression in INIT_FROM, found {expression!r}: '
        f'{error}; mend it'
    ) from error


def _renamed(path: str, mapping: Sequence | None) -> str | None:
  for expression, replacement in mapping or ():
    if found := _compiled(expression).fullmatch(path):
      if replacement is None:
        return None
      try:
        return found.expand(replacement)
      except (re.error, IndexError) as error:
        raise UserError(
            f'expected in INIT_FROM a replacement with groups of '
            f'{expression!r}, found {replacement!r}: {error}; mend it'
        ) from error
  return path


def _matched(
    source: 'WeightSource',
    part: str,
    targets: Sequence[str],
    mapping: Sequence | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Origin]:
  """Origins of the targets in one source, all of them or an error."""
  wanted = set(targets)
  origins: dict[str, Origin] = {}
  unexpected, twice, misshapen, left_out = [], [], [], 0
  for path, leaf in source.shapes.items():
    name = _renamed(path, mapping)
    if name is None or name in shapes and name not in wanted:
      left_out += 1
    elif name not in wanted:
      unexpected.append(path if name == path else f'{path} as {name}')
    elif name in origins:
      twice.append(f'{name} from {origins[name].path} and {path}')
    else:
      if not _fits(tuple(leaf.shape), shapes[name], name):
        misshapen.append(
            f'{name}: expected {list(shapes[name])}, found {list(leaf.shape)}'
        )
      origins[name] = Origin(source, path)
  missing = [path for path in targets if path not in origins]
  faults = [
      f'{len(paths)} {kind} ({listed(paths)})'
      for kind, paths in (
          ('missing', missing),
          ('unexpected', unexpected),
          ('given twice', twice),
          ('misshapen', misshapen),
      )
      if paths
  ]
  if faults:
    raise UserError(
        f'expected {source.name} to give the parameters {part!r} of the model, '
        f'found {"; ".join(faults)}; mend the map in INIT_FROM, or give '
        f'another source'
    )
  _logger.info(
      '%s: %d parameters for %s, %d left out.',
      source.name, len(origins), part, left_out,
  )  # fmt: skip
  return origins


def _fits(
    found: tuple[int, ...], expected: tuple[int, ...], path: str
) -> bool:
  """Whether a source's shape serves: a table may have fewer tokens."""
  if found == expected:
    return True
  # Task tokens are added at the end of a vocabulary: stage 2 has three more.
  is_table = path.endswith('/embedding') and 'position_bias' not in path
  return (
      is_table
      and found[1:] == expected[1:]
      and 0 < expected[0] - found[0] < 128
  )


def listed(paths: Sequence[str]) -> str:
  more = ', ...' if len(paths) > _NAMED else ''
  return ', '.join(paths[:_NAMED]) + more
