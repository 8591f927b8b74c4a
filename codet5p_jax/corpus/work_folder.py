"""The folder beside a result, in which it is made.

A result appears under its own name when it is whole. Until then everything lies
in `<result>.partial`, from where a stopped run goes on.
"""

import contextlib
import fcntl
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

from codet5p_jax.errors import UserError
from codet5p_jax.storage import StorageFault, explaining_storage_faults

_logger = logging.getLogger(__name__)

_PLAN, _LOCK = 'plan.json', 'lock'


def partial(result: pathlib.Path) -> pathlib.Path:
  """Where a result is made."""
  return result.with_name(result.name + '.partial')


@contextlib.contextmanager
def work_folder(result: pathlib.Path, plan: str) -> Iterator[pathlib.Path]:
  """Opens `<result>.partial` for this process alone.

  It is removed after a mistake of the user, if it was made here. After any
  other end but success it stays, and is gone on with.

  Args:
    result: what is to be made; must not exist.
    plan: what is to be done. A folder of another plan is emptied.

  Yields:
    The folder; `finish` moves what was made in it to the result.

  Raises:
    UserError: the result exists, or another process is making it.
  """
  if os.path.lexists(result):
    raise UserError(
        f'expected to create {result}, found that it exists; remove it or '
        f'choose another folder'
    )
  folder = partial(result)
  is_new = not folder.exists()
  with (
      explaining_storage_faults(
          f'cannot write {result}',
          'choose a folder with room that you may write to',
      ),
      contextlib.ExitStack() as stack,
  ):
    folder.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context(open(folder / _LOCK, 'w', encoding='utf-8'))
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
          f'expected to be alone in {folder}, found another process that makes '
          f'{result.name}; wait for it'
      ) from error
    try:
      _enter(folder, plan, is_new)
      yield folder
    except StorageFault:
      raise
    except UserError:
      if is_new:
        shutil.rmtree(folder, ignore_errors=True)
      raise


def _enter(folder: pathlib.Path, plan: str, is_new: bool) -> None:
  path = folder / _PLAN
  if path.exists() and path.read_text(encoding='utf-8') == plan:
    _logger.info('Going on with what a stopped run left in %s.', folder)
    # What a process was writing when it was killed.
    for left in folder.glob('*/.*'):
      shutil.rmtree(left)
    return
  if not is_new:
    _logger.info('Starting anew: %s was left by another plan.', folder)
  for left in folder.iterdir():
    if left.is_dir():
      shutil.rmtree(left)
    elif left.name != _LOCK:
      left.unlink()
  beside = path.with_suffix('.new')
  beside.write_text(plan, encoding='utf-8')
  beside.replace(path)


def finish(
    folder: pathlib.Path, made: pathlib.Path, result: pathlib.Path
) -> None:
  """Moves what was made in the folder to its place, and removes the folder."""
  # So that after a power cut no file that was moved is found empty.
  for path in made.rglob('*'):
    if path.is_file():
      with open(path, 'rb') as file:
        os.fsync(file)
  os.replace(made, result)
  shutil.rmtree(folder, ignore_errors=True)
