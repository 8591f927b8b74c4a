"""Noticing that a machine is about to be taken away.

Clouds send SIGTERM and, 30 seconds later or so, pull the plug. What a run does
in between is up to its loop: see loop.py.
"""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class PreemptionNotice:
  """Whether a process of the run was told to end.

  In a run of one process this catches SIGTERM while it is entered. In a run of
  several JAX does, from `jax.distributed.initialize` on: a signal to any one of
  them reaches all, and they agree on the call of `arrived` that tells them.
  """

  def __init__(self):
    self._arrived = False
    self._calls = 0
    self._previous = None

  def __enter__(self) -> 'PreemptionNotice':
    # Python delivers signals to its main thread alone; a run in another, as
    # some notebooks start them, is ended by SIGTERM as it always was.
    in_main = threading.current_thread() is threading.main_thread()
    if jax.process_count() == 1 and in_main:
      self._previous = signal.signal(signal.SIGTERM, self._receive)
    return self

  def __exit__(self, *exception_info) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)
      self._previous = None

  def arrived(self) -> bool:
    """Whether the run must end now; once true, it stays true.

    Costs no communication until there is a notice. All processes make the same
    calls in the same order.
    """
    if jax.process_count() > 1 and not self._arrived:
      self._calls += 1
      self._arrived = multihost_utils.reached_preemption_sync_point(
          self._calls
      )
    return self._arrived

  def _receive(self, signal_number, frame) -> None:
    self._arrived = True
