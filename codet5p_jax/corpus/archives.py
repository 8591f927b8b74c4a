"""Source files of packed packages: zip, wheel and tar.

What an archive unpacks to is counted while it is read, so that a bomb stops
early; nothing is written to the disk.
"""

import bz2
import contextlib
import email.parser
import gzip
import io
import json
import lzma
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

from codet5p_jax.corpus import filters
from codet5p_jax.corpus.filters import Dropped
from codet5p_jax.corpus.installed import distribution_licence
from codet5p_jax.corpus.licences import join_licences, normalise_licence
from codet5p_jax.corpus.source_files import (
    UNKNOWN,
    SourceFile,
    as_text,
    language_of_path,
)
from codet5p_jax.corpus.units import Unit
from codet5p_jax.errors import UserError

# Ordinary source code is packed to a fifth of its size, at best to a hundredth.
MAX_RATIO = 250
MIN_BOMB_BYTES = 64 * 2**20

_DAMAGE = (
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,  # An encrypted member.
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


class Counted:
  """A file that is unpacked while it is read, and counts what it gave."""

  def __init__(self, file: io.BufferedIOBase, path: str, packed_size: int):
    self._file = file
    self._path = path
    self._limit = max(MAX_RATIO * packed_size, MIN_BOMB_BYTES)
    self._given = 0

  def read(self, size: int = -1) -> bytes:
    return self._counted(self._file.read(size))

  def readline(self, size: int = -1) -> bytes:
    return self._counted(self._file.readline(size))

  def _counted(self, content: bytes) -> bytes:
    self._given += len(content)
    if self._given > self._limit:
      refuse_bomb(self._path)
    return content


def refuse_bomb(path: str) -> None:
  """Raises UserError: the file unpacks to more than it can sensibly hold."""
  raise UserError(
      f'expected an archive that unpacks to at most {MAX_RATIO} times its '
      f'size, found more in {path}; unpack it yourself if you trust it'
  )


def read_archive(unit: Unit) -> Iterator[SourceFile | Dropped]:
  """The source files of an archive, in its order.

  Raises:
    UserError: it cannot be read, is cut short or damaged, or is a bomb.
  """
  is_zip = unit.path.lower().endswith(('.zip', '.whl'))
  members = _zip_members if is_zip else _tar_members
  with _explaining_damage(unit.path):
    licence = _licence(unit, members)
    for path, size, file in members(unit):
      language = language_of_path(path)
      if language == UNKNOWN:
        continue
      if reason := filters.drop_by_path(path):
        yield Dropped(reason, language)
        continue
      if size > filters.MAX_FILE_BYTES:
        yield Dropped('oversized', language)
        continue
      # The size is what the archive says; what is read is bounded by ours.
      text, reason = filters.decode(file.read(filters.MAX_FILE_BYTES + 1))
      if reason:
        yield Dropped(reason, language)
      else:
        shown = as_text(path)
        yield SourceFile(text, language, licence, unit.origin, shown)


class _Member:
  """A member of an archive that is opened when it is read."""

  def __init__(self, open_member):
    self._open = open_member

  def read(self, size: int) -> bytes:
    with self._open() as file:
      return file.read(size)


def _zip_members(unit: Unit) -> Iterator[tuple[str, int, _Member]]:
  with zipfile.ZipFile(unit.path) as archive:
    members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    if unpacked > max(MAX_RATIO * unit.size, MIN_BOMB_BYTES):
      refuse_bomb(unit.path)
    for member in members:
      if not member.is_dir():
        yield (
            member.filename,
            member.file_size,
            _Member(lambda member=member: archive.open(member)),
        )


class _StrictTarInfo(tarfile.TarInfo):
  """Takes what is no header for damage, where tarfile sees the end."""

  @classmethod
  def fromtarfile(cls, tarfile_):
    try:
      return super().fromtarfile(tarfile_)
    except tarfile.EOFHeaderError:  # pylint: disable=no-member
      raise
    except tarfile.HeaderError as error:
      raise tarfile.ReadError(f'no end of archive ({error})') from error


def _tar_members(unit: Unit) -> Iterator[tuple[str, int, _Member]]:
  with contextlib.ExitStack() as stack:
    file = stack.enter_context(open(unit.path, 'rb'))
    name = unit.path.lower()
    for endings, unpack in (
        (('gz', 'tgz'), gzip.GzipFile),
        (('bz2',), bz2.BZ2File),
        (('xz',), lzma.LZMAFile),
    ):
      if name.endswith(endings):
        file = stack.enter_context(
            unpack(fileobj=file) if unpack is gzip.GzipFile else unpack(file)
        )
    counted = Counted(file, unit.path, unit.size)
    archive = stack.enter_context(
        tarfile.open(fileobj=counted, mode='r|', tarinfo=_StrictTarInfo)
    )
    for member in archive:
      if member.isreg():
        yield (
            member.name,
            member.size,
            _Member(lambda member=member: archive.extractfile(member)),
        )
      # tarfile keeps all members otherwise.
      archive.members.clear()
    # The checksum stands at the end.
    while counted.read(2**20):
      pass


def _licence(unit: Unit, members) -> str:
  """The licence that the archive's topmost description states."""
  found = (99, UNKNOWN)
  with contextlib.closing(members(unit)) as each:
    for path, _, file in each:
      name = posixpath.basename(path)
      depth = path.removeprefix('./').count('/')
      is_described = name in ('PKG-INFO', 'package.json') or path.endswith(
          '.dist-info/METADATA'
      )
      if is_described and depth < found[0] and not filters.drop_by_path(path):
        content = file.read(filters.MAX_FILE_BYTES)
        found = (depth, _stated_licence(name, content))
        if depth <= 1:
          break
  return found[1]


def _stated_licence(name: str, content: bytes) -> str:
  text = content.decode(errors='replace')
  if name != 'package.json':
    return distribution_licence(email.parser.Parser().parsestr(text, True))
  try:
    package = json.loads(text)
    stated = package.get('license') or package.get('licenses') or ''
  except (ValueError, AttributeError, RecursionError):
    return UNKNOWN
  # Old packages list {"type": ..., "url": ...}.
  listed = stated if isinstance(stated, list) else [stated]
  names = [x.get('type', '') if isinstance(x, dict) else x for x in listed]
  if len(names) == 1:
    return normalise_licence(str(names[0]))
  return join_licences([str(name) for name in names])


@contextlib.contextmanager
def _explaining_damage(path: str) -> Iterator[None]:
  try:
    yield
  except _DAMAGE as error:
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise UserError(
        f'expected a whole archive in {path}, found it unreadable: '
        f'{reason[:200]}; copy {os.path.basename(path)} again or leave it out'
    ) from error
