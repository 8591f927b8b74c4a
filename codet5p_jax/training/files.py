"""Files of a run folder: versioned JSON, written whole or not at all.

Everything here works on a mounted file system. A bucket is reached by
mounting it; nothing in this module knows of `gs://`.
"""

import contextlib
import errno
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from codet5p_jax.errors import UserError

# Of every JSON file in a run folder. Raise it when a reader of the former
# version would misread the new one.
FORMAT_VERSION = 1

# What a user can mend: space, quota, permissions, mounts, wrong paths.
_STORAGE_ERRORS = frozenset({
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
})

# TensorStore reports a failed write as ValueError with this in its text.
_TENSORSTORE_ERROR = re.compile(r"os_error_code='(\d+)'")


class UnreadableFile(UserError):
  """A file is there, but not what was written: cut short, or overwritten."""


def local_path(path: str | os.PathLike) -> Path:
  """Returns the path, absolute.

  Raises:
    UserError: it is the address of a bucket.
  """
  if '://' in os.fspath(path):
    raise UserError(
        f'expected a folder of a mounted file system, found {path}; mount '
        f'the bucket and give the path of the mount'
    )
  # Without resolving links, so that messages show the path as given.
  return Path(os.path.abspath(os.path.expanduser(path)))


def storage_fault(error: BaseException | None) -> str | None:
  """Names what is wrong with the disk or folder, if that caused the error.

  Args:
    error: an exception; those it was raised from are looked at too.

  Returns:
    Words such as "No space left on device", or None for any other error.
  """
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    found = _TENSORSTORE_ERROR.search(str(error))
    code = int(found.group(1)) if found else getattr(error, 'errno', None)
    if code in _STORAGE_ERRORS:
      # The system's words, "File exists", would not say what is wrong.
      is_in_the_way = code == errno.EEXIST
      return 'a file is in the way' if is_in_the_way else os.strerror(code)
    error = error.__cause__ or error.__context__
  return None


@contextlib.contextmanager
def explaining_storage_faults(what: str, advice: str) -> Iterator[None]:
  """Turns a full disk or an unwritable folder into one line for the user.

  Args:
    what: what could not be done, such as "cannot write /runs/a/config.json".
    advice: what to do.

  Raises:
    UserError: a storage fault. Any other error passes unchanged.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    fault = storage_fault(error)
    if fault is None:
      raise
    raise UserError(f'{what}: {fault}; {advice}') from error


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


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON file that `write_json` wrote; drops its `format_version`.

  Raises:
    UnreadableFile: the file is no JSON object with a `format_version`.
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
    raise UnreadableFile(
        f'expected JSON in {path}, found something unreadable ({error}); '
        f'restore the file from a copy'
    ) from error
  version = content.get('format_version') if isinstance(content, dict) else None
  if type(version) is not int:
    raise UnreadableFile(
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
