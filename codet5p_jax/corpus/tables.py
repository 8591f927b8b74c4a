"""Rows of JSON lines and Parquet files, read in bounded memory."""

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from codet5p_jax.corpus import filters
from codet5p_jax.corpus.archives import Counted
from codet5p_jax.corpus.filters import Dropped
from codet5p_jax.corpus.licences import join_licences, normalise_licence
from codet5p_jax.corpus.source_files import (
    UNKNOWN,
    SourceFile,
    as_text,
    language_of_name,
    language_of_path,
    normalise_origin,
)
from codet5p_jax.corpus.units import RowFields, Unit
from codet5p_jax.errors import UserError

# A text of MAX_FILE_BYTES may be six times as long with JSON's escapes.
_MAX_LINE_BYTES = 8 * filters.MAX_FILE_BYTES
_SKIPPED_BYTES = 2**20
_ROWS_A_BATCH = 64

# The names of fields that are tried where none is given.
_USUAL = {
    'text': ('text', 'code', 'content', 'original_string'),
    'origin': (
        'origin', 'repo', 'repo_name', 'repository', 'repository_name',
        'package', 'max_stars_repo_name',
    ),
    'licence': (
        'licence', 'license', 'licenses', 'max_stars_repo_licenses',
    ),
    'path': (
        'path', 'file_path', 'filename', 'file_name', 'max_stars_repo_path',
    ),
    'language': ('language', 'lang', 'programming_language'),
}  # fmt: skip


# Those of a row of CodeSearchNet that tell more of a function than its code.
_DOCUMENTATION, _NAME, _PARTITION = 'docstring', 'func_name', 'partition'
_SPLIT_OF_PARTITION = {'train': 'train', 'valid': 'validation', 'test': 'test'}


def read_jsonl(
    unit: Unit, with_documentation: bool = False
) -> Iterator[SourceFile | Dropped]:
  """The rows of a unit of a .jsonl or .jsonl.gz file.

  Args:
    unit: the unit.
    with_documentation: a row in CodeSearchNet's format is read with what it
      tells of its function.

  Raises:
    UserError: the file cannot be read, or is cut short or damaged.
  """
  with _explaining_damage(unit.path), contextlib.ExitStack() as stack:
    file = stack.enter_context(open(unit.path, 'rb'))
    if unit.path.lower().endswith('.gz'):
      if not unit.size:
        raise EOFError('it is empty')
      unpacked = stack.enter_context(gzip.GzipFile(fileobj=file))
      file = Counted(unpacked, unit.path, unit.size)
    for number, line in enumerate(_lines(file, unit.part), 1):
      if line is None:
        yield Dropped('oversized', number=number)
        continue
      if line.isspace():
        continue
      try:
        row = json.loads(line)
      except (ValueError, RecursionError) as error:
        reason = getattr(error, 'msg', type(error).__name__)
        yield Dropped('bad_row', number=number, detail=f'no JSON: {reason}')
        continue
      if isinstance(row, dict):
        yield _read_row(row, unit.fields, number, with_documentation)
      else:
        yield Dropped('bad_row', number=number, detail='no JSON object')


def _lines(
    file: io.BufferedIOBase | Counted, part: tuple[int, int] | None
) -> Iterator[bytes | None]:
  """The lines that begin in [begin, end); None for one that is too long."""
  begin, end = part or (0, None)
  position = begin
  if begin:
    # The line that begins before belongs to the part before.
    file.seek(begin - 1)
    position = begin - 1 + _skip_line(file)
  while end is None or position < end:
    line = file.readline(_MAX_LINE_BYTES)
    if not line:
      return
    position += len(line)
    if len(line) == _MAX_LINE_BYTES and not line.endswith(b'\n'):
      position += _skip_line(file)
      yield None
    else:
      yield line


def _skip_line(file: io.BufferedIOBase | Counted) -> int:
  """Reads to the end of the line; returns the number of bytes."""
  skipped = 0
  while piece := file.readline(_SKIPPED_BYTES):
    skipped += len(piece)
    if piece.endswith(b'\n'):
      break
  return skipped


def parquet_parts(path: str, size: int) -> Iterator[tuple[int, int, int]]:
  """Runs of row groups [begin, end) of about so many bytes, and their bytes."""
  import pyarrow.parquet

  with _explaining_damage(path, pyarrow.ArrowException):
    with pyarrow.parquet.ParquetFile(path) as file:
      metadata = file.metadata
      sizes = [
          metadata.row_group(index).total_byte_size
          for index in range(metadata.num_row_groups)
      ]
  begin = 0
  for index in range(len(sizes)):
    so_far = sum(sizes[begin : index + 1])
    if so_far >= size or index + 1 == len(sizes):
      yield begin, index + 1, so_far
      begin = index + 1


def read_parquet(
    unit: Unit, with_documentation: bool = False
) -> Iterator[SourceFile | Dropped]:
  """The rows of a unit of a Parquet file.

  Args:
    unit: the unit.
    with_documentation: as in `read_jsonl`.

  Raises:
    UserError: the file cannot be read, or is cut short or damaged.
  """
  import pyarrow.parquet

  numbers = itertools.count(1)
  with _explaining_damage(unit.path, pyarrow.ArrowException):
    with pyarrow.parquet.ParquetFile(unit.path) as file:
      wanted = _wanted_columns(unit.fields)
      names = [name for name in file.schema_arrow.names if name in wanted]
      groups = range(*(unit.part or (0, file.metadata.num_row_groups)))
      for batch in file.iter_batches(
          _ROWS_A_BATCH, row_groups=list(groups), columns=names
      ):
        for row in batch.to_pylist():
          number = next(numbers)
          yield _read_row(row, unit.fields, number, with_documentation)


def _wanted_columns(fields: RowFields) -> set[str]:
  wanted = {_DOCUMENTATION, _NAME, _PARTITION}
  for role, usual in _USUAL.items():
    given = getattr(fields, role)
    wanted.update((given,) if given else usual)
  return wanted


def _read_row(
    row: Mapping[str, Any],
    fields: RowFields,
    number: int,
    with_documentation: bool,
) -> SourceFile | Dropped:
  file = _source_file(row, fields, number)
  if isinstance(file, Dropped) or not with_documentation:
    return file
  return _with_documentation(file, row, number)


def _source_file(
    row: Mapping[str, Any], fields: RowFields, number: int
) -> SourceFile | Dropped:
  text_field = fields.text or next(
      (name for name in _USUAL['text'] if name in row), None
  )
  if text_field is None:
    return Dropped('bad_row', number=number, detail='no text')
  text = row.get(text_field)
  if not isinstance(text, str):
    is_there = text_field in row
    detail = f'{text_field} is no text' if is_there else f'no {text_field}'
    return Dropped('bad_row', number=number, detail=detail)
  path = _words(row, fields.path, 'path')
  language = fields.fixed_language or language_of_name(
      _words(row, fields.language, 'language')
  )
  if language == UNKNOWN:
    language = language_of_path(path)
  try:
    content = text.encode()
  except UnicodeEncodeError:
    return Dropped('not_utf8', language, number)
  reason = filters.drop_by_path(path) or filters.decode(content)[1]
  if reason:
    return Dropped(reason, language, number)
  return SourceFile(
      text,
      language,
      _licence(row, fields.licence),
      normalise_origin(_words(row, fields.origin, 'origin')),
      path,
  )


def _with_documentation(
    file: SourceFile, row: Mapping[str, Any], number: int
) -> SourceFile | Dropped:
  if _DOCUMENTATION not in row:
    return file
  documentation = row[_DOCUMENTATION]
  if documentation is None:
    documentation = ''
  if not isinstance(documentation, str):
    detail = f'{_DOCUMENTATION} is no text'
    return Dropped('bad_row', file.language, number, detail)
  name, partition = row.get(_NAME), row.get(_PARTITION)
  return dataclasses.replace(
      file,
      documentation=as_text(documentation),
      name=as_text(name) if isinstance(name, str) else '',
      partition=_SPLIT_OF_PARTITION.get(str(partition), ''),
  )


def _words(row: Mapping[str, Any], given: str | None, role: str) -> str:
  value = _value(row, given, role)
  return as_text(value) if isinstance(value, str) else ''


def _licence(row: Mapping[str, Any], given: str | None) -> str:
  value = _value(row, given, 'licence')
  if isinstance(value, (list, tuple)):
    return join_licences([str(item) for item in value])
  return normalise_licence(value) if isinstance(value, str) else UNKNOWN


def _value(row: Mapping[str, Any], given: str | None, role: str) -> Any:
  names: Iterable[str] = (given,) if given else _USUAL[role]
  return next((row[name] for name in names if name in row), None)


@contextlib.contextmanager
def _explaining_damage(
    path: str, *damage: type[Exception]
) -> Iterator[None]:
  """One clear line for a table that cannot be read; `damage` says so too."""
  try:
    yield
  except (OSError, EOFError, zlib.error, *damage) as error:
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise UserError(
        f'expected a whole table in {path}, found it unreadable: '
        f'{reason[:200]}; copy {os.path.basename(path)} again or leave it out'
    ) from error
