"""Checksums per file: written with a checkpoint, compared before its use."""

import concurrent.futures
import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from codet5p_jax.errors import UserError
from codet5p_jax.storage import is_damage, local_path
from codet5p_jax.training.files import (
    UnreadableFile,
    read_json,
    sync,
    write_json,
)

CHECKSUMS = 'checksums.json'

# Orbax rewrites these two as the last thing before it commits a step, after
# the checksums of all other files were written. They are added afterwards; a
# process killed in between leaves them unlisted, which is no damage.
BOOKKEEPING = frozenset({'_CHECKPOINT_METADATA', 'commit_success.txt'})

_ALGORITHM = 'sha256'

_HASHING_THREADS = 8


class DamagedCheckpoint(UserError):
  """Files of a checkpoint are not those that were written.

  Attributes:
    folder: the checkpoint.
    fault: the first wrong file, and what is wrong with it.
  """

  def __init__(
      self,
      folder: Path,
      fault: str,
      advice: str = 'restore it from a copy or use another checkpoint',
  ):
    super().__init__(f'checkpoint {folder} is damaged: {fault}; {advice}')
    self.folder = folder
    self.fault = fault


def write_checksums(folder: Path, leave_out: Iterable[str] = ()) -> None:
  """Writes `checksums.json`: size and SHA-256 of each file, by path.

  Then all of it outlives a power cut; Orbax leaves some files to chance.

  Args:
    folder: holds a finished checkpoint.
    leave_out: paths in the folder that are going to change.

  Raises:
    OSError: the disk is full or a file cannot be read.
  """
  names = sorted(_files(folder) - set(leave_out))
  for name in names:
    sync(folder / name)
  write_json(
      folder / CHECKSUMS,
      {'algorithm': _ALGORITHM, 'files': _sums(folder, names)},
  )
  for path in (*folder.rglob('*/'), folder):
    sync(path)


def complete_checksums(folder: Path) -> None:
  """Adds Orbax's bookkeeping files, once the step is committed.

  Then that it is committed outlives a power cut.
  """
  content = read_json(folder / CHECKSUMS)
  names = sorted((_files(folder) & BOOKKEEPING) - content['files'].keys())
  for name in names:
    sync(folder / name)
  if names:
    content['files'] |= _sums(folder, names)
    write_json(folder / CHECKSUMS, content)
  for path in (folder, folder.parent):
    sync(path)


def verify(step_dir: str | os.PathLike) -> None:
  """Compares every file of a checkpoint with its checksum.

  Args:
    step_dir: folder of a step, or of exported weights.

  Raises:
    DamagedCheckpoint: a file is missing, of another size or content, or too
      many, or there are no checksums; names the first such file.
    UserError: there is no such folder, or a newer version wrote it.
  """
  folder = local_path(step_dir)
  if not os.path.lexists(folder):
    raise UserError(
        f'expected a checkpoint in {folder}, found no folder; check the path'
    )
  if not folder.is_dir():
    raise DamagedCheckpoint(folder, 'it is no folder')
  with telling_damage_apart(folder):
    _compare(folder, _read_checksums(folder))


@contextlib.contextmanager
def telling_damage_apart(folder: Path) -> Iterator[None]:
  """Says of what the system cannot read whether the checkpoint is at fault.

  Raises:
    DamagedCheckpoint: it is, as when a file is missing.
    UserError: this machine or the mount is, as when too many files are open.
  """
  try:
    yield
  except OSError as error:
    if is_damage(error):
      raise DamagedCheckpoint(
          folder, f'a file cannot be read ({error})'
      ) from error
    raise UserError(
        f'cannot read checkpoint {folder}: {error}; mend that, and try again'
    ) from error


def size_on_disk(folder: Path) -> int:
  """Returns the bytes of all files of a checkpoint."""
  return sum(
      (folder / name).stat().st_size for name in [CHECKSUMS, *_files(folder)]
  )


def _compare(folder: Path, expected: dict[str, dict[str, Any]]) -> None:
  """Compares what is there with what was written, see `verify`."""
  found = _files(folder)
  # What costs nothing to find comes before reading gigabytes.
  for name in sorted(expected.keys() | (found - BOOKKEEPING)):
    if name not in found:
      raise DamagedCheckpoint(folder, f'{name} is missing')
    if name not in expected:
      raise DamagedCheckpoint(
          folder, f'{name} was not there when it was written'
      )
    size = (folder / name).stat().st_size
    if size != expected[name]['size']:
      raise DamagedCheckpoint(
          folder,
          f'{name} has {size} bytes where {expected[name]["size"]} were '
          f'written',
      )
  for name, entry in _sums(folder, sorted(expected)).items():
    if entry['sha256'] != expected[name]['sha256']:
      raise DamagedCheckpoint(
          folder, f'{name} has another content than was written'
      )


def _read_checksums(folder: Path) -> dict[str, dict[str, Any]]:
  """Returns {path: {'size': bytes, 'sha256': digits}}."""
  path = folder / CHECKSUMS
  if not path.is_file():
    raise DamagedCheckpoint(
        folder, f'{CHECKSUMS} is missing, so it is half-written'
    )
  try:
    content = read_json(path)
    if content['algorithm'] != _ALGORITHM:
      raise KeyError(content['algorithm'])
    return {
        name: {'size': entry['size'], 'sha256': entry['sha256']}
        for name, entry in content['files'].items()
    }
  except (UnreadableFile, KeyError, TypeError, AttributeError) as error:
    raise DamagedCheckpoint(folder, f'{CHECKSUMS} is unreadable') from error


def _files(folder: Path) -> set[str]:
  """Returns the paths of all files but the checksums, with `/`.

  Raises:
    OSError: a folder cannot be read.
  """

  def fail(error):
    raise error

  # Globbing would pass over folders that cannot be read.
  names = {
      Path(parent, name).relative_to(folder).as_posix()
      for parent, _, files in os.walk(folder, onerror=fail)
      for name in files
  }
  # Another process may be adding to the checksums, or was killed in that.
  return {
      name
      for name in names
      if name != CHECKSUMS and not name.startswith(f'.{CHECKSUMS}.')
  }


def _sums(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
  """Returns size and SHA-256 of files, in the order of their names."""

  def entry(name):
    path = folder / name
    with open(path, 'rb') as file:
      digest = hashlib.file_digest(file, _ALGORITHM).hexdigest()
    return {'size': path.stat().st_size, 'sha256': digest}

  # Hashing releases the interpreter's lock.
  with concurrent.futures.ThreadPoolExecutor(_HASHING_THREADS) as threads:
    return dict(zip(names, threads.map(entry, names), strict=True))
