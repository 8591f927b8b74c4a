"""Files of problems and samples: JSON lines or a JSON array, also gzipped."""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

from codet5p_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
  """A JSON object of a file.

  Attributes:
    number: of the line, or of the element of an array, from 1.
    path: of the file.
    fields: what it holds.
  """

  number: int
  path: str
  fields: dict[str, Any]

  @property
  def place(self) -> str:
    return f'row {self.number} of {self.path}'

  def field(self, name: str, *kinds: type) -> Any:
    """A field of one of these types.

    Raises:
      UserError: it is missing or of another type.
    """
    value = self.fields.get(name)
    if type(value) in kinds:
      return value
    expected = ' or '.join(_KINDS[kind] for kind in kinds)
    found = f'{name} = {value!r:.60}' if name in self.fields else (
        f'only {", ".join(self.fields) or "an empty object"}')
    raise UserError(
        f'expected the field {name}, {expected}, in {self.place}, found '
        f'{found}; mend or remove the row'
    )

  def text(self, name: str) -> str:
    """A text; see `field`."""
    return self.field(name, str)

  def texts(self, name: str) -> list[str]:
    """A list of texts; see `field`."""
    values = self.field(name, list)
    if not all(isinstance(value, str) for value in values):
      raise UserError(
          f'expected a list of texts as {name} in {self.place}, found '
          f'{values!r:.60}; mend or remove the row'
      )
    return values


_KINDS = {
    str: 'a text', int: 'a whole number', float: 'a number', list: 'a list',
}  # fmt: skip


def read_rows(path: str) -> list[Row]:
  """Reads all rows of a file.

  Args:
    path: one JSON object a line, or a JSON array of objects; gzipped if its
      name ends in .gz.

  Raises:
    UserError: the file is missing, damaged or empty, or a row is no JSON
      object.
  """
  content = _read(path)
  rows = []
  elements = (
      _elements(path, content)
      if content.lstrip().startswith(b'[')
      else _lines(path, content)
  )
  for number, element in elements:
    if not isinstance(element, dict):
      raise UserError(
          f'expected a JSON object in row {number} of {path}, found '
          f'{json.dumps(element):.60}; mend or remove the row'
      )
    rows.append(Row(number, path, element))
  if not rows:
    raise UserError(
        f'expected rows in {path}, found an empty file; write one JSON object '
        f'a line'
    )
  return rows


def read_problems(path: str, *texts: str) -> list[Row]:
  """Reads rows that have a task id, each its own.

  Args:
    path: see `read_rows`.
    *texts: the names of texts that every row must have.

  Raises:
    UserError: a row has no task id, or that of another, or lacks a text.
  """
  rows = read_rows(path)
  first: dict[str, Row] = {}
  for row in rows:
    task_id = str(row.field('task_id', str, int))
    if task_id in first:
      raise UserError(
          f'expected every task once in {path}, found {task_id} in rows '
          f'{first[task_id].number} and {row.number}; remove one'
      )
    first[task_id] = row
    for name in texts:
      row.text(name)
  return rows


def _read(path: str) -> bytes:
  try:
    with open(path, 'rb') as file:
      content = file.read()
    return gzip.decompress(content) if path.endswith('.gz') else content
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise UserError(
        f'expected a gzipped file in {path}, found a damaged one ({error}); '
        f'fetch it again'
    ) from error
  except OSError as error:
    raise UserError(
        f'expected a file of JSON rows in {path}, found: {error.strerror}; '
        f'check the path'
    ) from error


def _lines(path: str, content: bytes) -> Iterator[tuple[int, Any]]:
  for number, line in enumerate(content.split(b'\n'), 1):
    if not line.strip():
      continue
    try:
      yield number, json.loads(line.decode())
    except (ValueError, RecursionError) as error:
      raise UserError(
          f'expected JSON in row {number} of {path}, found '
          f'{line.decode(errors="replace").strip()[:60]!r}; mend or remove the '
          f'row'
      ) from error


def _elements(path: str, content: bytes) -> Iterator[tuple[int, Any]]:
  try:
    return enumerate(json.loads(content.decode()), 1)
  except (ValueError, RecursionError) as error:
    raise UserError(
        f'expected a JSON array in {path}, found something else ({error}); '
        f'mend the file'
    ) from error
