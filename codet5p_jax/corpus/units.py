"""The pieces of work that a corpus's sources are cut into.

A unit is read by one process and written to one folder of its own. Units are
small, picklable and in a fixed order; the corpus has the order of its units.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

# A unit of single files holds about so much; one of a table spans so much.
FOLDER_UNIT_BYTES, FOLDER_UNIT_FILES = 4 * 2**20, 400
TABLE_UNIT_BYTES = 16 * 2**20
MAX_TABLE_UNITS = 4096


@dataclasses.dataclass(frozen=True)
class PlannedFile:
  """A file to read.

  Attributes:
    path: absolute.
    shown: its path within the origin's source tree.
    origin: normalised.
    licence: normalised.
    size: bytes.
    modified: nanoseconds; with the size tells whether it is still the same.
  """

  path: str
  shown: str
  origin: str
  licence: str
  size: int
  modified: int


@dataclasses.dataclass(frozen=True)
class RowFields:
  """Which fields of a row hold what; None: the usual names are tried.

  Attributes:
    text: the source code.
    origin: package or repository; without one each row is its own origin.
    licence: a name, an expression or a list of names.
    path: of the file; tells the language where no field does.
    language: name of the language.
    fixed_language: the language of all rows.
  """

  text: str | None = None
  origin: str | None = None
  licence: str | None = None
  path: str | None = None
  language: str | None = None
  fixed_language: str | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
  """A piece of work.

  Attributes:
    kind: 'files', 'archive', 'jsonl' or 'parquet'.
    path: the archive or table; the first file.
    size: bytes to read, for progress.
    modified: of the archive or table, nanoseconds.
    files: those of a unit of files.
    origin: of an archive, normalised.
    fields: of a table.
    part: of a table: bytes [begin, end) of lines, or the row groups; None for
      all.
  """

  kind: str
  path: str
  size: int
  modified: int = 0
  files: tuple[PlannedFile, ...] = ()
  origin: str = ''
  fields: RowFields = RowFields()
  part: tuple[int, int] | None = None


def group_files(files: Iterable[PlannedFile]) -> Iterator[Unit]:
  """Groups single files, in their order, into units."""
  group, size = [], 0
  for file in files:
    group.append(file)
    size += file.size
    if size >= FOLDER_UNIT_BYTES or len(group) >= FOLDER_UNIT_FILES:
      yield Unit('files', group[0].path, size, files=tuple(group))
      group, size = [], 0
  if group:
    yield Unit('files', group[0].path, size, files=tuple(group))


_ARCHIVE_NAME = re.compile(
    r'\.(zip|whl|tar|tgz|tar\.gz|tar\.bz2|tar\.xz)$', re.IGNORECASE
)


def is_archive(name: str) -> bool:
  return bool(_ARCHIVE_NAME.search(name))


def is_table(name: str) -> bool:
  return bool(re.search(r'\.(jsonl|jsonl\.gz|parquet)$', name, re.IGNORECASE))


def archive_origin(name: str) -> str:
  """The package of an archive, without version and ending.

  >>> archive_origin('lodash-4.17.21.tgz')
  'lodash'
  >>> archive_origin('foo_1.2.orig.tar.xz')
  'foo'
  >>> archive_origin('scikit_learn-1.5.0-cp311-cp311-manylinux_x86_64.whl')
  'scikit_learn'
  """
  stem = _ARCHIVE_NAME.sub('', name)
  if name.lower().endswith('.whl'):
    return stem.split('-')[0]
  stem = re.sub(r'\.(orig|debian)(-[\w.]+)?$', '', stem)
  version = re.search(r'[-_.]v?\d+(\.\d+|$|[-_+~a-z])', stem)
  return stem[: version.start()] if version and version.start() else stem
