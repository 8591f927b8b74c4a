"""What one process finds wrong with a checkpoint, all raise together.

A process that goes on with an older step while others restore a newer one, or
that stops while others wait for it, would hang them all.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from codet5p_jax.errors import UserError
from codet5p_jax.training.checkpoints.verify import DamagedCheckpoint
from codet5p_jax.training.distributed import gather_texts

_DAMAGED, _REFUSED = 'damaged', 'refused'


@contextlib.contextmanager
def raising_together(folder: Path) -> Iterator[None]:
  """Raises on every process what the block raised on one of them.

  Every process must enter it. An error that is no `UserError` passes at once
  and stops its own process alone.

  Args:
    folder: the checkpoint, of which a damage is told.

  Raises:
    UserError: the block raised it on some process; where several did, all
      raise that of the first.
  """
  mine = None
  try:
    yield
  except UserError as error:
    mine = error
  if jax.process_count() == 1:
    if mine is not None:
      raise mine
    return
  for process, message in enumerate(gather_texts(_encode(mine))):
    kind, _, words = message.partition(' ')
    if mine is not None and process == jax.process_index():
      raise mine
    if kind == _DAMAGED:
      raise DamagedCheckpoint(folder, words)
    if kind == _REFUSED:
      raise UserError(words)


def _encode(error: UserError | None) -> str:
  if error is None:
    return ''
  if isinstance(error, DamagedCheckpoint):
    return f'{_DAMAGED} {error.fault}'
  return f'{_REFUSED} {error}'
