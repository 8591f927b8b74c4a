"""One run at a time in a run folder.

The lock is a file that its holder touches every few seconds, since folders on
mounted buckets and network disks know no locks between machines. A holder that
was killed leaves it behind: on the machine of the holder that is seen at once,
from another by waiting whether it is touched.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from codet5p_jax.errors import Unavailable, UserError
from codet5p_jax.storage import explaining_storage_faults
from codet5p_jax.training.files import FORMAT_VERSION, read_json, write_json

_logger = logging.getLogger(__name__)

# Network file systems may show a change of another machine a minute late.
TOUCH_SECONDS = 10.0
PATIENCE_SECONDS = 90.0


class RunLock:
  """Holds a run folder's lock while it is entered; owns a touching thread."""

  def __init__(
      self,
      path: Path,
      *,
      touch_seconds: float = TOUCH_SECONDS,
      patience_seconds: float = PATIENCE_SECONDS,
  ):
    """Takes nothing yet.

    Args:
      path: of the lock; its folder is made if it is missing.
      touch_seconds: between signs of life.
      patience_seconds: a lock of another machine that is not touched for so
        long is stale.
    """
    self._path = path
    self._touch_seconds = touch_seconds
    self._patience_seconds = patience_seconds
    self._name = uuid.uuid4().hex
    self._released = threading.Event()
    self._thread = threading.Thread(
        target=self._keep_touching, name='run lock', daemon=True
    )

  def __enter__(self) -> 'RunLock':
    """Takes the lock.

    Raises:
      UserError: another process holds it, or the folder is not writable.
    """
    with explaining_storage_faults(
        f'cannot write run folder {self._path.parent}',
        'free space, mend its permissions or choose another folder',
    ):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      while not self._create() and not self._take_over():
        pass
    self._thread.start()
    return self

  def __exit__(self, *exception_info) -> None:
    self._released.set()
    self._thread.join()
    if self._is_ours():
      with contextlib.suppress(OSError):
        self._path.unlink(missing_ok=True)

  @property
  def name(self) -> str:
    """Of this lock, unlike that of any other."""
    return self._name

  def require_held(self) -> None:
    """Checks that nobody took the lock away.

    Raises:
      UserError: another run holds it now; this one must write no more.
    """
    if self._thread.is_alive():
      return
    raise UserError(
        f'expected to hold {self._path}, found that another run took it; let '
        f'only one of them go on'
    )

  def _create(self) -> bool:
    """Makes the lock, whole from the first moment; False if there is one."""
    beside = self._path.with_name(f'.{self._path.name}.{self._name}')
    write_json(beside, self._content())
    try:
      # Fails where the name is taken, as renaming would not.
      os.link(beside, self._path)
    except FileExistsError:
      return False
    except OSError:
      # Mounted buckets have no links.
      return self._create_without_links()
    finally:
      beside.unlink(missing_ok=True)
    return True

  def _content(self) -> dict[str, Any]:
    return {**_this_process(), 'name': self._name}

  def _create_without_links(self) -> bool:
    try:
      with open(self._path, 'x') as file:
        json.dump({'format_version': FORMAT_VERSION, **self._content()}, file)
    except FileExistsError:
      return False
    return True

  def _take_over(self) -> bool:
    """Puts our lock in the place of one whose holder is dead.

    Returns:
      Whether it is ours now; otherwise there is another, or none any more.

    Raises:
      Unavailable: the holder lives.
    """
    holder = _read(self._path)
    if holder is None:
      return False
    self._require_dead(holder)
    folder = os.open(self._path.parent, os.O_RDONLY)
    try:
      # Others may have found the same. Some network disks know nothing of
      # this; there the last one wins, and the others find it out, see
      # `require_held`.
      with contextlib.suppress(OSError):
        fcntl.flock(folder, fcntl.LOCK_EX)
      if _read(self._path) != holder:
        return False
      # There is a lock at every moment, so nobody can make one in between.
      write_json(self._path, self._content())
    finally:
      os.close(folder)
    return True

  def _require_dead(self, holder: dict[str, Any]) -> None:
    place = (
        f'process {holder["pid"]} on {holder["host"]}'
        if 'pid' in holder
        else 'a process that its lock does not name'
    )
    if _is_here(holder):
      if _is_alive(holder):
        raise self._taken(place)
      _logger.warning(
          'The lock %s is left over from %s, which is gone; taking it.',
          self._path, place,
      )  # fmt: skip
      return
    _logger.warning(
        'The lock %s is held by %s; waiting %.0f s for a sign of life.',
        self._path, place, self._patience_seconds,
    )  # fmt: skip
    before = self._touched()
    deadline = time.monotonic() + self._patience_seconds
    while time.monotonic() < deadline:
      time.sleep(min(1.0, self._touch_seconds))
      touched = self._touched()
      if touched is None:
        return
      if touched != before:
        raise self._taken(place)
    _logger.warning('There was none; taking the lock.')

  def _taken(self, place: str) -> Unavailable:
    return Unavailable(
        f'expected no other run in {self._path.parent}, found {place}, which '
        f'is using it; wait for it, end it, or choose another RUN_DIR'
    )

  def _touched(self) -> int | None:
    try:
      return self._path.stat().st_mtime_ns
    except FileNotFoundError:
      return None

  def _is_ours(self) -> bool:
    holder = _read(self._path)
    # A moment without the network disk is no sign that it is not.
    return holder is not None and holder.get('name', self._name) == self._name

  def _keep_touching(self) -> None:
    while not self._released.wait(self._touch_seconds):
      if not self._is_ours():
        return  # See `require_held`.
      # A full disk lets a file be touched.
      with contextlib.suppress(OSError):
        os.utime(self._path)


def await_lock(path: Path, name: str, patience_seconds: float = 60.0) -> None:
  """Waits until this host sees the lock that process 0 of the run holds.

  Network file systems may show it late.

  Args:
    path: of the lock.
    name: of the lock that is held.
    patience_seconds: to wait.

  Raises:
    UserError: it is not seen in time.
  """
  deadline = time.monotonic() + patience_seconds
  while (_read(path) or {}).get('name') != name:
    if time.monotonic() > deadline:
      raise Unavailable(
          f'expected to see {path} as process 0 wrote it '
          f'{patience_seconds:.0f} s ago, found none or another; put RUN_DIR '
          f'on a file system that all hosts share'
      )
    time.sleep(0.1)


def _read(path: Path) -> dict[str, Any] | None:
  """A lock's content; {} if it cannot be read, None if there is no lock."""
  try:
    return read_json(path)
  except UserError:
    return {} if path.exists() else None


def _this_process() -> dict[str, Any]:
  return {
      'host': socket.gethostname(),
      'system': _system(),
      'pid': os.getpid(),
      'process_start': _process_start(os.getpid()),
      'since': time.strftime('%Y-%m-%d %H:%M:%S %Z'),
  }


def _system() -> str:
  """Tells this boot of this machine, and this container's processes."""
  boot = Path('/proc/sys/kernel/random/boot_id')
  with contextlib.suppress(OSError):
    return f'{boot.read_text().strip()} {os.readlink("/proc/self/ns/pid")}'
  return socket.gethostname()


def _process_start(pid: int) -> str | None:
  """When a process began, in the kernel's ticks: ids are used again."""
  try:
    # The name in brackets may hold spaces and brackets.
    after_name = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2]
  except OSError:
    return None
  fields = after_name.split()
  # A dead one whose parent has not noticed is still listed.
  return None if fields[0] == 'Z' else fields[19]


def _is_here(holder: dict[str, Any]) -> bool:
  return holder.get('system') == _system()


def _is_alive(holder: dict[str, Any]) -> bool:
  try:
    os.kill(holder['pid'], 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return _process_start(holder['pid']) == holder.get('process_start')
