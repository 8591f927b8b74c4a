"""Checksums per file: written with a checkpoint, compared before its use."""

import concurrent.futures
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from codet5p_jax.errors import UserError
from codet5p_jax.storage import local_path
from codet5p_jax.training.files import UnreadableFile, read_json, write_json

CHECKSUMS = 'checksums.json'

# Orbax rewrites these two as the last thing before it commits a step, after
# the checksums of all other files were written. They are added afterwards; a
# process killed in between leaves them unlisted, which is no damage.
BOOKKEEPING = frozenset({'_CHECKPOINT_METADATA', 'commit_success.txt'})

_HASHING_THREADS = 8


class DamagedCheckpoint(UserError):
  """Files of a checkpoint are not those that were written.

  Attributes:
    folder: the checkpoint.
    fault: the first wrong file, and what is wrong with it.
  """

  def __init__(self, folder: Path, fault: str, advice: str):
    super().__init__(f'checkpoint {folder} is damaged: {fault}; {advice}')
    self.folder = folder
    self.fault = fault


def write_checksums(folder: Path, leave_out: Iterable[str] = ()) -> None:
  """Writes `checksums.json`: size and SHA-256 of each file, by path.

  Args:
    folder: holds a finished checkpoint.
    leave_out: paths in the folder that are going to change.

  Raises:
    OSError: the disk is full or a file cannot be read.
  """
  names = sorted(_files(folder) - set(leave_out))
  write_json(
      folder / CHECKSUMS, {'algorithm': 'sha256', 'files': _sums(folder, names)}
  )


def complete_checksums(folder: Path) -> None:
  """Adds Orbax's bookkeeping files, once the step is committed."""
  content = read_json(folder / CHECKSUMS)
  names = sorted((_files(folder) & BOOKKEEPING) - content['files'].keys())
  if names:
    content['files'] |= _sums(folder, names)
    write_json(folder / CHECKSUMS, content)


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
  if not folder.is_dir():
    raise UserError(
        f'expected a checkpoint in {folder}, found no folder; check the path'
    )
  expected = _read_checksums(folder)
  found = _files(folder)
  # What costs nothing to find comes before reading gigabytes.
  for name in sorted(expected.keys() | (found - BOOKKEEPING)):
    if name not in found:
      raise _damaged(folder, f'{name} is missing')
    if name not in expected:
      raise _damaged(folder, f'{name} was not there when it was written')
    size = (folder / name).stat().st_size
    if size != expected[name]['size']:
      raise _damaged(
          folder,
          f'{name} has {size} bytes where {expected[name]["size"]} were '
          f'written',
      )
  try:
    sums = _sums(folder, sorted(expected))
  except OSError as error:
    raise _damaged(folder, f'a file cannot be read ({error})') from error
  for name, entry in sums.items():
    if entry['sha256'] != expected[name]['sha256']:
      raise _damaged(folder, f'{name} has another content than was written')


def _read_checksums(folder: Path) -> dict[str, dict[str, Any]]:
  """Returns {path: {'size': bytes, 'sha256': digits}}."""
  path = folder / CHECKSUMS
  if not path.is_file():
    raise _damaged(folder, f'{CHECKSUMS} is missing, so it is half-written')
  try:
    content = read_json(path)
    return {
        name: {'size': entry['size'], 'sha256': entry['sha256']}
        for name, entry in content['files'].items()
    }
  except (UnreadableFile, KeyError, TypeError, AttributeError) as error:
    raise _damaged(folder, f'{CHECKSUMS} is unreadable') from error


def _damaged(folder: Path, fault: str) -> DamagedCheckpoint:
  return DamagedCheckpoint(
      folder, fault, 'restore it from a copy or use another checkpoint'
  )


def _files(folder: Path) -> set[str]:
  """Returns the paths of all files but the checksums, with `/`."""
  names = {
      path.relative_to(folder).as_posix()
      for path in folder.rglob('*')
      if not path.is_dir()
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
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'size': path.stat().st_size, 'sha256': digest}

  # Hashing releases the interpreter's lock.
  with concurrent.futures.ThreadPoolExecutor(_HASHING_THREADS) as threads:
    return dict(zip(names, threads.map(entry, names), strict=True))
