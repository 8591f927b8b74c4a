"""The numbers of a run for TensorBoard.

Written in the thread that asks for it: the usual `SummaryWriter` has a process
and a thread of its own, which a full disk kills, and then the run waits for
them for ever.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from codet5p_jax.storage import explaining_storage_faults


class EventFile:
  """A file of events; owns it while it is open."""

  def __init__(self, folder: Path, first_step: int):
    """Makes a new file in a folder.

    Args:
      folder: made if it is missing.
      first_step: TensorBoard forgets what other files of the folder say of this
        step and later ones.

    Raises:
      UserError: the disk is full or the folder not writable.
    """
    with _without_torch():
      from tensorboardX.event_file_writer import EventsWriter
      from tensorboardX.proto.event_pb2 import Event, SessionLog

    self._folder = folder
    self._event = Event
    start = SessionLog(status=SessionLog.START)
    with self._explaining_faults():
      folder.mkdir(parents=True, exist_ok=True)
      self._writer = EventsWriter(str(folder / 'events'), f'.{os.getpid()}')
      self._writer.write_event(
          Event(wall_time=time.time(), step=first_step, session_log=start)
      )
      self._writer.flush()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes numbers by their tag; they are on their way to the disk at return.

    Raises:
      UserError: the disk is full.
    """
    from tensorboardX.proto.summary_pb2 import Summary

    summary = Summary(
        value=[
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in values.items()
        ]
    )
    with self._explaining_faults():
      self._writer.write_event(
          self._event(wall_time=time.time(), step=step, summary=summary)
      )
      self._writer.flush()

  def close(self) -> None:
    """All that was written is on its way already, so nothing can fail."""
    with contextlib.suppress(OSError, ValueError):  # Full; closed before.
      self._writer.close()

  def _explaining_faults(self):
    return explaining_storage_faults(
        f'cannot write {self._folder}', 'free space or mend its permissions'
    )


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
  """Keeps tensorboardX from importing torch, where it is installed.

  It does so to know torch's tensors, of which no run has any: two seconds of
  every start.
  """
  if 'torch' in sys.modules:
    yield
    return
  sys.modules['torch'] = None  # What makes importing it an ImportError.
  try:
    yield
  finally:
    del sys.modules['torch']
