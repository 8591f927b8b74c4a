"""A folder that appears whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from codet5p_jax.errors import UserError
from codet5p_jax.storage import explaining_storage_faults


def require_free(target: Path) -> None:
  """Refuses a target that is there already.

  Raises:
    UserError: it is.
  """
  if target.exists() or target.is_symlink():
    raise UserError(
        f'expected no folder at {target}, found that it exists; give another, '
        f'or move it away'
    )


@contextlib.contextmanager
def whole_or_nothing(target: Path) -> Iterator[Path]:
  """Gives a folder beside the target to write in, renamed to it at the end.

  Whatever goes wrong, nothing is left; what a killed program left goes when
  the target is written again.

  Args:
    target: must not exist; missing folders above it are made.

  Raises:
    UserError: the target exists, the disk is full or the folder not writable.
  """
  require_free(target)
  partial = target.with_name(f'{target.name}.partial')
  with explaining_storage_faults(
      f'cannot write {target}',
      'free space, mend its permissions or choose another folder',
  ):
    try:
      if partial.exists():
        shutil.rmtree(partial)
      partial.mkdir(parents=True)
      yield partial
      os.rename(partial, target)
    finally:
      shutil.rmtree(partial, ignore_errors=True)
