"""The first map: units of the sources to kept documents.

For each unit it writes a folder of its own, which appears when it is whole:

    documents.jsonl   a SourceFile and its hash a line
    documents.keys    of each document a KEY, in the same order
    summary.json      counts
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

import numpy as np

from codet5p_jax.corpus import filters
from codet5p_jax.corpus.archives import read_archive
from codet5p_jax.corpus.filters import Dropped
from codet5p_jax.corpus.folder import SPLITS
from codet5p_jax.corpus.source_files import (
    UNKNOWN,
    SourceFile,
    as_text,
    language_of_path,
)
from codet5p_jax.corpus.splits import origin_key
from codet5p_jax.corpus.tables import read_jsonl, read_parquet
from codet5p_jax.corpus.units import PlannedFile, Unit
from codet5p_jax.errors import UserError
from codet5p_jax.storage import explaining_storage_faults

DOCUMENTS, KEYS, SUMMARY = 'documents.jsonl', 'documents.keys', 'summary.json'

# What is known of a document without its text: its hash in two halves, the
# hash of its origin, its length, and one more than the index into SPLITS of the
# split that it was published in, or 0.
KEY = np.dtype([
    ('hash_high', '<u8'),
    ('hash_low', '<u8'),
    ('origin', '<u8'),
    ('characters', '<u4'),
    ('published', 'u1'),
])

_ROWS_TO_JUDGE = 1000


class UnitFolders:
  """What a map over units leaves: a folder of each, with a summary.

  Attributes:
    target: the folder of these folders.
  """

  target: str

  def folder(self, index: int) -> pathlib.Path:
    return pathlib.Path(self.target, f'{index:06d}')

  def summary(self, index: int) -> dict:
    return json.loads((self.folder(index) / SUMMARY).read_text())


@dataclasses.dataclass(frozen=True)
class ReadUnit(UnitFolders):
  """Reads a unit and filters its files, as far as that needs no vocabulary.

  Attributes:
    work: the work folder.
    languages: those to keep; files of unknown language are kept too.
    licences: those allowed.
    with_documentation: see `tables.read_jsonl`.
  """

  work: str
  languages: tuple[str, ...]
  licences: tuple[str, ...]
  with_documentation: bool = False

  @property
  def target(self) -> str:
    return os.path.join(self.work, 'read')

  def keys(self, index: int) -> np.ndarray:
    """The KEY of each document of a unit."""
    return np.fromfile(self.folder(index) / KEYS, KEY)

  def __call__(self, index: int, unit: Unit) -> None:
    """Reads one unit.

    Raises:
      UserError: the source is damaged, or the disk full.
    """
    with whole_folder(self.folder(index)) as folder:
      summary = self._read(unit, folder)
      (folder / SUMMARY).write_text(json.dumps(summary))

  def _read(self, unit: Unit, folder: pathlib.Path) -> dict:
    dropped = collections.defaultdict(collections.Counter)
    rows, bad_rows, first_bad = 0, 0, None
    with (
        open(folder / DOCUMENTS, 'w', encoding='utf-8', newline='') as texts,
        open(folder / KEYS, 'wb') as keys,
    ):
      for found in _read_files(unit, self.with_documentation):
        rows += 1
        if found.language != UNKNOWN and found.language not in self.languages:
          continue
        if isinstance(found, SourceFile):
          reason = filters.drop_by_content(found, self.licences)
        else:
          reason = found.reason
        if not reason:
          _write(found, texts, keys)
          continue
        dropped[found.language][reason] += 1
        if reason == 'bad_row':
          bad_rows += 1
          first_bad = first_bad or [found.number, found.detail]
          if bad_rows == rows == _ROWS_TO_JUDGE:
            refuse_bad_rows(unit.path, rows, rows, *first_bad)
    return {'dropped': dropped, 'rows': rows, 'first_bad_row': first_bad}


def _write(file: SourceFile, texts, keys) -> None:
  fields = dataclasses.astuple(file)
  texts.write(json.dumps([*fields, file.hash], ensure_ascii=False) + '\n')
  digest = bytes.fromhex(file.hash[:32])
  high, low = np.frombuffer(digest, '>u8')
  origin = origin_key(file.origin) if file.origin else high
  published = SPLITS.index(file.partition) + 1 if file.partition else 0
  key = high, low, origin, len(file.text), published
  keys.write(np.array([key], KEY).tobytes())


def read_documents(folder: pathlib.Path) -> Iterator[SourceFile]:
  """The documents that a unit left, in order."""
  with open(folder / DOCUMENTS, encoding='utf-8', newline='\n') as lines:
    for line in lines:
      *fields, digest = json.loads(line)
      file = SourceFile(*fields)
      # Computed once, when it was read.
      file.__dict__['hash'] = digest
      yield file


def _read_files(
    unit: Unit, with_documentation: bool
) -> Iterator[SourceFile | Dropped]:
  if unit.kind == 'archive':
    yield from read_archive(unit)
  elif unit.kind == 'jsonl':
    yield from read_jsonl(unit, with_documentation)
  elif unit.kind == 'parquet':
    yield from read_parquet(unit, with_documentation)
  else:
    yield from map(_read_file, unit.files)


def _read_file(file: PlannedFile) -> SourceFile | Dropped:
  language = language_of_path(file.path)
  reason = filters.drop_by_path(file.shown)
  if not reason and file.size > filters.MAX_FILE_BYTES:
    reason = 'oversized'
  if reason:
    return Dropped(reason, language)
  try:
    with open(file.path, 'rb') as opened:
      content = opened.read(filters.MAX_FILE_BYTES + 1)
  except OSError as error:
    raise UserError(
        f'expected to read {file.path}, found: {error.strerror}; mend it or '
        f'leave it out'
    ) from error
  text, reason = filters.decode(content)
  if reason:
    return Dropped(reason, language)
  shown = as_text(file.shown)
  return SourceFile(text, language, file.licence, file.origin, shown)


def refuse_bad_rows(
    path: str, bad: int, rows: int, first: int, detail: str
) -> None:
  """Raises UserError: a table holds too many bad rows."""
  raise UserError(
      f'expected source code in every row of {path}, found {bad} bad rows of '
      f'{rows}, the first in line {first}: {detail}; mend the file or name its '
      f'field, as in jsonl://{os.path.basename(path)}?field=code'
  )


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to fill, which appears under its name once it is whole.

  Where another process of the same work was first, its result stays.
  """
  beside = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex}')
  with explaining_storage_faults(
      f'cannot write {folder}', 'make room and run the same again to go on'
  ):
    try:
      beside.mkdir(parents=True)
      yield beside
      try:
        beside.rename(folder)
      except OSError:
        if not folder.is_dir():
          raise
    finally:
      shutil.rmtree(beside, ignore_errors=True)
