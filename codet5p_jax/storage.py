"""Paths of mounted file systems, and what can be wrong with them."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from codet5p_jax.errors import UserError

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

# TensorStore reports a failed write as ValueError with the first in its text,
# and safetensors as an error of its own with the second.
_CODE_IN_TEXT = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")

# ArrayRecord raises RuntimeError with the system's words in its own.
_ARRAY_RECORD_ERROR = re.compile(r'\w\(\) failed: ([^;]*)')


class StorageFault(UserError):
  """The disk is full, or a folder cannot be written."""


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


def check_output(path: Path, *inputs: str | None) -> None:
  """Checks what a file is to be written to, before the work that fills it.

  Args:
    path: the file.
    *inputs: paths of files that are read, some of which may not be given.

  Raises:
    UserError: it is a folder or one of the inputs, or its folder cannot be
      written.
  """
  advice = 'set --output to another file'
  if path.is_dir():
    raise UserError(
        f'expected a file to write, found the folder {path}; {advice}'
    )
  for given in inputs:
    if given and path.exists() and os.path.exists(given):
      if path.samefile(given):
        raise UserError(
            f'expected another file to write than those that are read, found '
            f'{given} for both; {advice}'
        )
  folder = next(folder for folder in path.parents if folder.exists())
  if not folder.is_dir() or not os.access(folder, os.W_OK):
    raise StorageFault(
        f'cannot write {path}: {folder} is no folder that you may write to; '
        f'{advice}'
    )


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
    found = _CODE_IN_TEXT.search(str(error))
    code = (
        int(found[1] or found[2]) if found else getattr(error, 'errno', None)
    )
    if code in _STORAGE_ERRORS:
      # The system's words, "File exists", would not say what is wrong.
      is_in_the_way = code == errno.EEXIST
      return 'a file is in the way' if is_in_the_way else os.strerror(code)
    if isinstance(error, RuntimeError):
      if written := _ARRAY_RECORD_ERROR.search(str(error)):
        return written[1].strip()
    error = error.__cause__ or error.__context__
  return None


def is_damage(error: OSError) -> bool:
  """Whether what cannot be read is at fault, not this machine or the mount."""
  # Libraries raise these without a number.
  kinds = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
  return isinstance(error, kinds) or error.errno in (errno.EIO, errno.ELOOP)


@contextlib.contextmanager
def explaining_storage_faults(what: str, advice: str) -> Iterator[None]:
  """Turns a full disk or an unwritable folder into one line for the user.

  Args:
    what: what could not be done, such as "cannot write /runs/a/config.json".
    advice: what to do.

  Raises:
    StorageFault: a storage fault. Any other error passes unchanged.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    fault = storage_fault(error)
    if fault is None:
      raise
    raise StorageFault(f'{what}: {fault}; {advice}') from error
