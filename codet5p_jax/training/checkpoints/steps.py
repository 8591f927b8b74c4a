"""Which steps a folder of checkpoints holds, and where damaged ones are kept.

    checkpoints/500/            a step
    checkpoints/damaged/1000/   one that was found damaged and set aside
"""

import itertools
import os
import shutil
import time
from pathlib import Path

# Never counted, restored from or deleted.
DAMAGED = 'damaged'


def committed_steps(folder: Path) -> list[int]:
  """Returns the steps of a folder, ascending; half-written ones are none.

  Orbax commits by renaming to the bare number. A file of that name counts: it
  stands where a checkpoint was, so the step before is not the newest.

  Args:
    folder: of all steps; may be missing.
  """
  if not folder.is_dir():
    return []
  names = [path.name for path in folder.iterdir() if path.name.isdecimal()]
  return sorted(int(name) for name in names if name == str(int(name)))


def set_aside(checkpoint: Path) -> Path:
  """Moves a damaged checkpoint among those that are never used again.

  Args:
    checkpoint: the folder of a step, or whatever stands in its place.

  Returns:
    Where it lies now: `damaged/<step>`, or `damaged/<step>-2`, ... where an
    earlier one of that step lies there already.

  Raises:
    OSError: the folder is not writable.
  """
  shelf = checkpoint.parent / DAMAGED
  shelf.mkdir(exist_ok=True)
  for number in itertools.count(1):
    place = shelf / f'{checkpoint.name}{"" if number == 1 else f"-{number}"}'
    if not os.path.lexists(place):
      break
  checkpoint.rename(place)
  return place


def remove_unfinished(folder: Path, patience: float = 10.0) -> None:
  """Removes what killed or failed saves left.

  Orbax does so too, but gives up where a thread of a save that failed in this
  process is still writing.

  Args:
    folder: of all steps.
    patience: seconds to wait for such threads.

  Raises:
    OSError: something cannot be removed.
  """
  deadline = time.monotonic() + patience
  for path in folder.glob('*.orbax-checkpoint-tmp*'):
    while path.exists():
      try:
        shutil.rmtree(path)
      except OSError:
        if time.monotonic() > deadline:
          raise
      # Removed now, or a thread is making it anew.
      if time.monotonic() > deadline:
        break
      time.sleep(0.05)
