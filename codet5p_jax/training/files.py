"""Files of a run folder: versioned JSON, written whole or not at all.

Everything here works on a mounted file system. A bucket is reached by
mounting it; nothing in this module knows of `gs://`.
"""

import errno
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codet5p_jax.errors import UserError
from codet5p_jax.storage import is_damage

# Of every JSON file in a run folder. Raise it when a reader of the former
# version would misread the new one.
FORMAT_VERSION = 1


class UnreadableFile(UserError):
  """A file is there, but not what was written: cut short, or overwritten."""


class ForeignFile(UnreadableFile):
  """JSON of another program."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
  """Writes a JSON file with a `format_version`, atomically.

  A reader sees the former file or the new one, also after a power cut.

  Args:
    path: the file; its folder exists.
    content: JSON values, without the key `format_version`.

  Raises:
    OSError: the disk is full or the folder not writable; the former file is
      then untouched.
    TypeError: a value is not one of JSON's.
  """
  if 'format_version' in content:
    raise ValueError('format_version is written by write_json itself')
  text = json.dumps({'format_version': FORMAT_VERSION, **content}, indent=2)
  write_text(path, text + '\n')


def write_text(path: Path, text: str) -> None:
  """Replaces a text file atomically.

  Raises:
    OSError: as for `write_json`.
  """
  write_bytes(path, text.encode('utf-8'))


def write_bytes(path: Path, content: bytes) -> None:
  """Replaces a file atomically.

  Raises:
    OSError: as for `write_json`.
  """
  # Named by chance, so that two writers never share a half-written file.
  beside = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
  try:
    with open(beside, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(beside, path)
  except BaseException:
    beside.unlink(missing_ok=True)
    raise


def sync(path: Path) -> None:
  """Has a file, or the names in a folder, outlive a power cut; if it is there.

  Raises:
    OSError: the disk fails.
  """
  try:
    descriptor = os.open(path, os.O_RDONLY)
  except FileNotFoundError:
    return
  try:
    os.fsync(descriptor)
  except OSError as error:
    # Some network file systems do not know this of folders.
    if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
      raise
  finally:
    os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON file that `write_json` wrote; drops its `format_version`.

  Raises:
    UnreadableFile: the file is no JSON.
    ForeignFile: it is no object with a `format_version`.
    UserError: the file is missing, or was written by a newer version of this
      program.
  """
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise UserError(
        f'expected the file {path}, found none; check the folder given'
    ) from error
  except (ValueError, OSError) as error:
    if isinstance(error, OSError) and not is_damage(error):
      raise UserError(
          f'cannot read {path}: {error}; mend that, and try again'
      ) from error
    raise UnreadableFile(
        f'expected JSON in {path}, found something unreadable ({error}); '
        f'restore the file from a copy'
    ) from error
  version = content.get('format_version') if isinstance(content, dict) else None
  if type(version) is not int:
    raise ForeignFile(
        f'expected a JSON object with a format_version in {path}, found '
        f'none; check the folder given'
    )
  if version > FORMAT_VERSION:
    raise UserError(
        f'expected format_version {FORMAT_VERSION} or older in {path}, found '
        f'{version}; update codet5p_jax'
    )
  del content['format_version']
  return content
