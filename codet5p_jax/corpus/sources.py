"""From what a user names as sources to units of work."""

import dataclasses
import difflib
import glob
import os
import pathlib
import urllib.parse
from collections.abc import Iterator, Sequence

from codet5p_jax.corpus import units
from codet5p_jax.corpus.installed import (
    installed_packages,
    planned_file,
    standard_library,
)
from codet5p_jax.corpus.source_files import (
    LANGUAGES,
    UNKNOWN,
    language_of_name,
    language_of_path,
    normalise_origin,
)
from codet5p_jax.corpus.tables import parquet_parts
from codet5p_jax.corpus.units import PlannedFile, RowFields, Unit
from codet5p_jax.errors import UserError

NAMED = {
    'standard_library': standard_library,
    'installed_packages': installed_packages,
}

# What a query may say of the rows, and the field of RowFields it sets.
_QUERY = {
    'field': 'text',
    'language': 'fixed_language',
    'origin_field': 'origin',
    'licence_field': 'licence',
    'path_field': 'path',
    'language_field': 'language',
}

_KINDS = (
    'a folder, a .zip, .whl or .tar archive, a .jsonl or .parquet file, a '
    'glob of these, or jsonl://PATH?field=NAME'
)


def plan_units(sources: Sequence[str]) -> list[Unit]:
  """Cuts sources into units, in a stable order; reads no content.

  Args:
    sources: names of NAMED, folders, archives, tables, globs, and tables as
      `jsonl://path?field=code&language=python` or `parquet://...`, where the
      query names fields: field, origin_field, licence_field, path_field,
      language_field; `language` is the language of all rows.

  Raises:
    UserError: a source is none of these, cannot be read, or holds nothing.
  """
  if not sources:
    raise UserError(
        'expected at least one source, found none; set sources to '
        'standard_library or a folder'
    )
  found = []
  for source in sources:
    try:
      of_source = list(_units_of(source))
    except OSError as error:
      raise UserError(
          f'expected to read the source {source}, found: '
          f'{error.strerror or error}; check the path'
      ) from error
    if not of_source:
      raise UserError(
          f'expected source files of {", ".join(LANGUAGES)} in {source}, found '
          f'none; archives and tables in a folder are given as {source}/*'
      )
    found += of_source
  return found


def _units_of(source: str) -> Iterator[Unit]:
  if source in NAMED:
    yield from units.group_files(NAMED[source]())
    return
  if '://' in source:
    yield from _units_of_address(source)
    return
  path = os.path.abspath(os.path.expanduser(source))
  if not os.path.exists(path) and glob.has_magic(source):
    for match in _matches(path, source):
      if os.path.isdir(match):
        yield from units.group_files(_folder(match))
      elif units.is_archive(match) or units.is_table(match):
        yield from _units_of_file(match, RowFields())
  elif os.path.isdir(path):
    yield from units.group_files(_folder(path))
  elif os.path.isfile(path) and (
      units.is_archive(path) or units.is_table(path)
  ):
    yield from _units_of_file(path, RowFields())
  else:
    near = difflib.get_close_matches(source, NAMED, n=1)
    advice = f'did you mean {near[0]}?' if near else 'check the path'
    raise UserError(
        f'expected a source among {", ".join(NAMED)}, {_KINDS}, found '
        f'{source!r}; {advice}'
    )


def _units_of_address(source: str) -> Iterator[Unit]:
  """Units of jsonl://path?query and parquet://path?query."""
  scheme, _, rest = source.partition('://')
  if scheme not in ('jsonl', 'parquet'):
    raise UserError(
        f'expected a source on a mounted file system, or jsonl:// or '
        f'parquet://, found {source}; mount the bucket and give the path of '
        f'the mount'
    )
  name, _, query = rest.partition('?')
  path = os.path.abspath(os.path.expanduser(urllib.parse.unquote(name)))
  fields = _fields(query, source)
  matches = [path] if os.path.exists(path) else _matches(path, source)
  for match in matches:
    yield from _units_of_file(match, fields, scheme)


def _fields(query: str, source: str) -> RowFields:
  given = {}
  for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
    if key not in _QUERY:
      near = difflib.get_close_matches(key, _QUERY, n=1)
      raise UserError(
          f'expected {", ".join(_QUERY)} in the query of {source}, found '
          f'{key}; did you mean {near[0] if near else "field"}?'
      )
    if not value:
      raise UserError(
          f'expected a value for {key} in {source}, found none; give '
          f'{key}=NAME'
      )
    given[_QUERY[key]] = value
  if language := given.get('fixed_language'):
    given['fixed_language'] = language_of_name(language)
  return RowFields(**given)


def _matches(path: str, source: str) -> list[str]:
  if matches := sorted(glob.glob(path, recursive=True)):
    return matches
  raise UserError(
      f'expected files that {source} names, found none; check the path'
  )


def _units_of_file(
    path: str, fields: RowFields, kind: str | None = None
) -> Iterator[Unit]:
  """Units of an archive or a table."""
  status = os.stat(path)
  name = os.path.basename(path)
  if kind is None and units.is_archive(name):
    origin = normalise_origin(units.archive_origin(name))
    yield Unit(
        'archive', path, status.st_size, status.st_mtime_ns, origin=origin
    )
    return
  kind = kind or ('parquet' if name.lower().endswith('.parquet') else 'jsonl')
  whole = Unit(kind, path, status.st_size, status.st_mtime_ns, fields=fields)
  step = max(units.TABLE_UNIT_BYTES, status.st_size // units.MAX_TABLE_UNITS)
  if kind == 'parquet':
    parts = list(parquet_parts(path, step))
  elif name.lower().endswith('.gz'):
    yield whole  # It can only be read from its beginning.
    return
  else:
    begins = range(0, status.st_size, step)
    ends = [min(begin + step, status.st_size) for begin in begins]
    parts = [(b, e, e - b) for b, e in zip(begins, ends, strict=True)]
  for begin, end, size in parts:
    yield dataclasses.replace(whole, size=size, part=(begin, end))
  if not parts:
    yield whole


def _folder(root: str) -> Iterator[PlannedFile]:
  """The source files below a folder, in a stable order."""

  def refuse(error):
    raise error

  for folder, names, files in os.walk(root, onerror=refuse):
    # Hidden folders hold version control and environments.
    names[:] = sorted(
        n for n in names if not n.startswith('.') and n != '__pycache__'
    )
    for name in sorted(files):
      path = pathlib.Path(folder, name)
      if language_of_path(name) == UNKNOWN or path.is_symlink():
        continue
      relative = path.relative_to(root)
      parts = relative.parts
      origin = parts[0] if len(parts) > 1 else path.stem
      yield planned_file(
          path, relative.as_posix(), normalise_origin(origin), UNKNOWN
      )
