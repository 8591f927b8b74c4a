"""The warm process in a sandbox, which forks two processes for each program.

It knows the modules that programs often import, so that a fork has them; it
never holds the tests, so that a fork for a solution has not got them either. It
runs nothing of a program itself.

Frames on standard input: for each program a JSON object (see `_run_program`),
then one with its tests, which the process of the tests reads itself. On
standard output: what is to be had, then a result for each program.
"""

import dataclasses
import fcntl
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from . import checking
from . import confinement
from . import solution

_LENGTH = struct.Struct('!I')

# Of a verdict; tests that a model wrote may write what they like.
_MAX_LINE = 1 << 16

TIMED_OUT = 'timed_out'

# What programs often import, and what that imports in turn. Not threading: what
# it does after a fork takes a third of the fork's time.
_WARM = (
    'abc', 'array', 'bisect', 'calendar', 'cmath', 'collections', 'copy',
    'dataclasses', 'datetime', 'decimal', 'enum', 'fractions', 'functools',
    'hashlib', 'heapq', 'itertools', 'json', 'math', 'numbers', 'operator',
    'os', 'random', 're', 'statistics', 'string', 'sys', 'textwrap', 'time',
    'traceback', 'types', 'typing', 'unicodedata',
)  # fmt: skip


def main(settings: str) -> None:
  """Serves until standard input ends.

  Args:
    settings: JSON of `filtered`, whether seccomp is wanted; `limits`, the
      fields of `Limits`; and `folder`, where programs may write.
  """
  given = json.loads(settings)
  os.closerange(3, 1 << 16)
  requests, results = os.dup(0), os.dup(1)
  nothing = os.open(os.devnull, os.O_RDWR)
  for descriptor in (0, 1, 2):
    os.dup2(nothing, descriptor)
  os.close(nothing)
  problem = _filter() if given['filtered'] else ''
  _write(results, {'problem': problem})
  if problem:
    return
  for name in _WARM:
    __import__(name)
  confinement.limit(confinement.Limits(**given['limits']))
  forks = _Forks(confinement.Confinement(given['filtered']), requests)
  gc.collect()
  gc.freeze()  # Else every collection in a fork copies all pages.
  while (request := _read(requests)) is not None:
    outcomes = _run_program(json.loads(request), forks)
    left_behind = bool(os.listdir(given['folder']))
    _write(results, {'outcomes': outcomes, 'left_behind': left_behind})


def _filter() -> str:
  """Filters this process and its forks; returns what kept it from that."""
  try:
    confinement.filter_all()
  except NotImplementedError as error:
    return str(error)
  except OSError as error:
    return f'seccomp filters: {error.strerror}'
  try:
    socket.socket().close()
  except PermissionError:
    return ''
  return 'seccomp filters have no effect'


class _Checker:
  """A process for tests, as it is seen from here.

  Tests that are trusted share one, which spares a fork a program.
  """

  def __init__(self, process: int, control: socket.socket, lines: int):
    self.process = process
    self._control = control
    self._lines = lines
    self._rest = b''
    self._poll = select.poll()
    self._poll.register(lines, select.POLLIN)

  def begin(self, to_solution: socket.socket, trusted: bool) -> None:
    """Has it read tests and begin with them."""
    kind = checking.TRUSTED if trusted else checking.UNTRUSTED
    socket.send_fds(self._control, [kind], [to_solution.fileno()])
    # Trusted code alone runs until the tests are read, and the sandbox is lost
    # if it does not.
    if self._read_line() != b'null':
      sys.exit('the tests were not read')

  def verdict(self, until: float) -> list[str]:
    """The next [status, error]."""
    try:
      line = self._read_line(until)
    except TimeoutError:
      return [TIMED_OUT, '']
    if not line:
      return [checking.CRASHED, 'the tests ended']
    try:
      verdict = json.loads(line)
    except (ValueError, RecursionError):
      verdict = None
    match verdict:
      case [str(status), str()] if status in checking.STATUSES:
        return verdict
    return [checking.CRASHED, 'the tests talk nonsense']

  def is_as_before(self) -> bool:
    """Whether it may serve another program, once all verdicts are read."""
    return self._read_line() == b'true'

  def _read_line(self, until: float | None = None) -> bytes:
    """Reads a line that comes in time; empty if the process has ended.

    Raises:
      TimeoutError: none came.
    """
    while b'\n' not in self._rest and len(self._rest) < _MAX_LINE:
      left = None if until is None else until - time.monotonic()
      if not self._poll.poll(left and max(0, left * 1000)):
        raise TimeoutError
      part = os.read(self._lines, 1 << 12)
      if not part:
        return b''
      self._rest += part
    line, _, self._rest = self._rest.partition(b'\n')
    return line

  def close(self) -> None:
    self._control.close()
    os.close(self._lines)


@dataclasses.dataclass
class _Forks:
  """Makes the processes for programs."""

  confinement: confinement.Confinement
  requests: int
  checker: _Checker | None = None

  def fork(
      self,
      kept: tuple[int, ...],
      run: Callable[[], Any],
      seconds: float | None = None,
  ) -> int:
    """Forks a process that confines itself and then does one thing.

    Args:
      kept: descriptors that it keeps, as 3, 4, ...
      run: what it does.
      seconds: of computing, if that is bounded.

    Returns:
      The process.
    """
    process = os.fork()
    if process:
      return process
    try:
      os.setsid()
      # Out of the way first, as one may be where another is to be.
      spare = [fcntl.fcntl(d, fcntl.F_DUPFD, 3 + len(kept)) for d in kept]
      for number, descriptor in enumerate(spare, 3):
        os.dup2(descriptor, number)
      os.closerange(3 + len(kept), 1 << 16)
      self.confinement.enter(seconds)
      run()
    except BaseException:
      pass
    finally:
      os._exit(0)

  def ready_checker(self) -> _Checker:
    """The process for tests; a new one if there is none."""
    if self.checker is None:
      control, its_control = socket.socketpair()
      lines, to_lines = os.pipe()
      process = self.fork(
          (its_control.fileno(), to_lines, self.requests), _serve_tests)
      its_control.close()
      os.close(to_lines)
      self.checker = _Checker(process, control, lines)
    return self.checker

  def end_checker(self) -> None:
    """Ends the process for tests, if there is one."""
    if self.checker is not None:
      self.checker.close()
      _end(self.checker.process)
      self.checker = None


def _end(process: int) -> None:
  """Ends a process and buries it."""
  # Without the filter, also what it has forked, as far as it shows.
  for kill in (os.killpg, os.kill):
    try:
      kill(process, signal.SIGKILL)
    except OSError:
      pass
  os.waitpid(process, 0)


def _run_program(request: dict[str, Any], forks: _Forks) -> list[list[Any]]:
  """Runs a program against its tests.

  Args:
    request: `sources`, what the solution's process runs; `tests`, how many
      there are, at least one; `seconds` for each test, of which the first
      includes the sources; and `trusted`, whether the tests are.
    forks: makes the processes.

  Returns:
    For each test that was reached [status, error, seconds]. After one that
    timed out or crashed no other is reached.
  """
  seconds = request['seconds']
  if not request['trusted']:
    forks.end_checker()
  ours, theirs = socket.socketpair()
  process = forks.fork(
      (ours.fileno(),),
      lambda: solution.run(socket.socket(fileno=3), request['sources']),
      seconds * request['tests'])  # fmt: skip
  ours.close()
  outcomes: list[list[Any]] = []
  may_serve = False
  try:
    checker = forks.ready_checker()
    checker.begin(theirs, request['trusted'])
    theirs.close()
    # Not before, or the first test would pay for the forks. What the program
    # has of time until here is not more than they take.
    started = time.monotonic()
    while len(outcomes) < request['tests']:
      verdict = checker.verdict(started + seconds)
      now = time.monotonic()
      outcomes.append([*verdict, now - started])
      started = now
      if verdict[0] in (TIMED_OUT, checking.CRASHED):
        break
    may_serve = request['trusted'] and verdict[0] != TIMED_OUT and (
        checker.is_as_before())  # fmt: skip
  finally:
    _end(process)
    if not may_serve:
      forks.end_checker()
  return outcomes


def _serve_tests() -> None:
  """Checks one program after the other, as a fork of the zygote."""
  control, to_lines, requests = socket.socket(fileno=3), 4, 5

  def report(content: Any) -> None:
    os.write(to_lines, json.dumps(content).encode() + b'\n')

  checking.serve(control, lambda: _read(requests) or b'', report,
                 lambda: os.close(requests))  # fmt: skip


def _read(descriptor: int) -> bytes | None:
  """Reads a frame and not a byte more; None at the end."""
  length = _read_exactly(descriptor, _LENGTH.size)
  if len(length) < _LENGTH.size:
    return None
  return _read_exactly(descriptor, *_LENGTH.unpack(length))


def _read_exactly(descriptor: int, size: int) -> bytes:
  parts = []
  while size and (part := os.read(descriptor, min(size, 1 << 20))):
    parts.append(part)
    size -= len(part)
  return b''.join(parts)


def _write(descriptor: int, content: dict[str, Any]) -> None:
  data = json.dumps(content).encode()
  data = _LENGTH.pack(len(data)) + data
  while data:
    data = data[os.write(descriptor, data):]
