"""A watchdog: a process that stands still says where, and ends.

On many hosts one that hangs, in a collective that another never joined or on a
file system that does not answer, costs all the others until someone looks.
Ended, it is started again by its launcher.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path

import jax

from codet5p_jax.errors import HUNG_STATUS

# A thread that holds Python's lock for ever keeps the watching thread from
# running, and a file system that hangs keeps it from writing the stacks; then C
# code prints them and ends the process, with status 1, so many seconds after
# the deadline.
_GRACE_SECONDS = 30.0

# In which the watchdogs of other processes bark after that of the first.
_OTHERS_SECONDS = 5.0


class Watchdog:
  """Ends the process unless it shows signs of life; owns a watching thread."""

  def __init__(self, folder: Path):
    """Watches nothing before the first `expect`.

    Args:
      folder: gets a file with all stacks, should the process hang.
    """
    self._folder = folder
    self._changed = threading.Condition()
    self._what = ''
    self._seconds = 0.0
    self._deadline: float | None = None
    self._closed = False
    self._thread = threading.Thread(
        target=self._watch, name='watchdog', daemon=True
    )
    self._thread.start()

  def __enter__(self) -> 'Watchdog':
    return self

  def __exit__(self, *exception_info) -> None:
    with self._changed:
      self._closed = True
      self._changed.notify()
    self._thread.join()

  def expect(self, what: str, seconds: float | None) -> None:
    """Is a sign of life, and says by when to expect the next.

    Args:
      what: is being done now, as in "step 12".
      seconds: until the process ends if there is no other call; None to wait
        without limit.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    with self._changed:
      # The thread sleeps until a deadline that was; it need not be woken for
      # one that is later, and so a step costs no more than a lock.
      earlier = deadline is not None and (
          self._deadline is None or deadline < self._deadline
      )
      self._what, self._seconds = what, seconds or 0.0
      self._deadline = deadline
      if earlier:
        # Here, for the thread may never get to run.
        _end_later(seconds)
        self._changed.notify()

  def _watch(self) -> None:
    with self._changed:
      while not self._closed:
        if self._deadline is None:
          faulthandler.cancel_dump_traceback_later()
          self._changed.wait()
          continue
        left = self._deadline - time.monotonic()
        if left <= 0:
          self._end()
        _end_later(left)
        self._changed.wait(left)
    faulthandler.cancel_dump_traceback_later()

  def _end(self) -> None:
    stacks = self._folder / f'process_{jax.process_index()}.txt'
    try:
      stacks.parent.mkdir(parents=True, exist_ok=True)
      with open(stacks, 'w') as file:
        faulthandler.dump_traceback(file, all_threads=True)
      where = f'all stacks are in {stacks}'
    except OSError as error:
      faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
      where = f'all stacks are above ({stacks} cannot be written: {error})'
    print(
        # After the progress bar.
        f'\ncodet5p: expected {self._what} to end within {self._seconds:.0f} '
        f's, found that process {jax.process_index()} on '
        f'{socket.gethostname()} stood still; {where}; the same command goes '
        f'on from the newest checkpoint',
        file=sys.stderr,
        flush=True,
    )
    if jax.process_index() == 0 and jax.process_count() > 1:
      # JAX ends the others with this one, and they have something to tell too.
      time.sleep(_OTHERS_SECONDS)
    # Not sys.exit: the thread that hangs would be waited for.
    os._exit(HUNG_STATUS)


def _end_later(seconds: float) -> None:
  faulthandler.dump_traceback_later(
      # A notebook's or a test's own has no file behind it.
      seconds + _GRACE_SECONDS, exit=True, file=sys.__stderr__
  )  # fmt: skip
