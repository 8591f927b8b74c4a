"""Runs programs that a model wrote, taken for hostile, against their tests.

Two processes for each program, in a sandbox that has no network, no file but an
interpreter's, and no other process: one runs the program, the other its tests.
What the tests call is run by the first, and plain values come back over a
socket (`inside/`). The verdict is written by the second to a channel that the
first has no descriptor of. So a program cannot pass by ending early, by
patching built-ins, by looking at the tests, or by writing what a test would
write: the only way is to give the right answers.

Limits remain. A wrong program passes in one case, as in one process it would:

- An answer that says of itself that it equals everything is right wherever a
  test asks `candidate(x) == y`.

A right one fails, other than in one process, where

- a test asks for identity or aliasing: a function that returns the very list
  that it was given returns an equal one to the tests;
- a test catches an exception class of the program's own, which is known by its
  built-in base alone, or reads its attributes, or its text if that base is
  Exception; or reads arguments of an exception that are no plain values;
- a test hands over an iterator, or an object of a class of its own;
- C code is to take an object for one of a built-in type that its class is
  derived from, as `''.join` is with a str;
- a program starts a thread or a process, or changes a file's mode or times, as
  shutil.copy does.
"""

import contextlib
import dataclasses
import json
import os
import queue
import select
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.execution.inside.confinement import Limits
from codet5p_jax.execution.isolation import (
    ENVIRONMENT,
    KINDS,
    NONE,
    sandbox_command,
)

PASSED = 'passed'
FAILED = 'failed'
TIMED_OUT = 'timed_out'
CRASHED = 'crashed'
STATUSES = (PASSED, FAILED, TIMED_OUT, CRASHED)

MOST_SECONDS = 24 * 60 * 60  # That a test may take.

_LENGTH = struct.Struct('!I')
# A sandbox that says nothing for so long beyond what its program may take is
# lost.
_GRACE_SECONDS = 20.0
# For a sandbox to start, and to end.
_START_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Program:
  """A program and what it is to be tested with.

  Attributes:
    solution: its source, which nothing is assumed of.
    tests: sources of independent tests.
    tested: the names of the program that are under test, the first of them also
      known to the tests as `candidate`.
    seconds: of wall time for each test, at most a day; that of the first
      includes the program.
    prompt: trusted source whose names the tests may use.
    setup: source that is run after the program, beside it, such as of objects
      of its classes.
    trusted: whether the tests are trusted. Their process then goes on to those
      of other programs; tests that a model wrote have one of their own.
  """

  solution: str
  tests: tuple[str, ...]
  tested: tuple[str, ...]
  seconds: float
  prompt: str = ''
  setup: str = ''
  trusted: bool = True

  def __post_init__(self) -> None:
    """Checks the seconds.

    Raises:
      UserError: they are none, or too many.
    """
    if not 0 < self.seconds <= MOST_SECONDS:
      raise UserError(
          f'expected more than 0 and at most {MOST_SECONDS} seconds for a '
          f'test, found {self.seconds}; give so many'
      )


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a test went.

  Attributes:
    status: one of STATUSES; CRASHED if one of the processes ended, or
      the sandbox twice.
    error: the exception and the first line of its text, if there was one.
    seconds: of wall time.
  """

  status: str
  error: str
  seconds: float


class _Lost(Exception):
  """A sandbox has ended or does not answer."""


class Sandbox:
  """Runs programs in so many sandboxes at a time; a context manager."""

  def __init__(
      self, kind: str, workers: int = 1, limits: Limits = Limits()
  ) -> None:
    """Describes the sandboxes.

    Args:
      kind: 'bubblewrap', or 'none' for limits of resources and time alone.
      workers: how many programs run at a time.
      limits: of resources.

    Raises:
      UserError: there is no such kind, or no worker.
    """
    if kind not in KINDS:
      raise UserError(
          f'expected sandbox to be {" or ".join(KINDS)}, found {kind!r}; give '
          f'one of those'
      )
    require_positive(workers=workers)
    self._kind = kind
    self._limits = limits
    self._workers = workers
    self._programs: queue.Queue[tuple[int, Program] | None] = queue.Queue(
        2 * workers)  # fmt: skip
    self._results: queue.Queue[Any] = queue.Queue()
    self._stopping = threading.Event()
    self._threads: list[threading.Thread] = []

  def __enter__(self) -> 'Sandbox':
    """Starts the sandboxes.

    Raises:
      UserError: an isolation cannot be had.
    """
    # Each is started by the thread that lives as long as it: the kernel ends it
    # with that thread.
    for _ in range(self._workers):
      thread = threading.Thread(target=self._work, daemon=True)
      self._threads.append(thread)
      thread.start()
    try:
      for _ in self._threads:
        self._next_result()
    except BaseException:
      self._end()
      raise
    return self

  def __exit__(self, *error: object) -> None:
    self._end()

  def run(
      self, programs: Iterable[Program]
  ) -> Iterator[tuple[int, list[Outcome]]]:
    """Runs programs; all of them, before it is called again.

    Args:
      programs: read as they are needed.

    Yields:
      As they are done, the place of a program and an outcome for each of its
      tests.

    Raises:
      UserError: a sandbox was lost and cannot be started again.
    """
    waiting = enumerate(programs)
    running = 0
    while True:
      while running < 2 * self._workers:
        numbered = next(waiting, None)
        if numbered is None:
          break
        self._programs.put(numbered)
        running += 1
      if not running:
        return
      yield self._next_result()
      running -= 1

  def _next_result(self) -> Any:
    result = self._results.get()
    if isinstance(result, BaseException):
      raise result
    return result

  def _end(self) -> None:
    self._stopping.set()
    for _ in self._threads:
      with contextlib.suppress(queue.Full):
        self._programs.put_nowait(None)
    for thread in self._threads:
      thread.join()

  def _work(self) -> None:
    """A worker: one sandbox, or one after the other."""
    try:
      with contextlib.closing(_Worker(self._kind, self._limits,
                                      self._stopping)) as worker:  # fmt: skip
        self._results.put(None)
        while not self._stopping.is_set():
          numbered = self._programs.get()
          if numbered is not None and not self._stopping.is_set():
            number, program = numbered
            self._results.put((number, worker.run(program)))
    except BaseException as error:
      self._results.put(error)


class _Worker:
  """One sandbox, made anew whenever a program has left anything in it."""

  def __init__(
      self, kind: str, limits: Limits, stopping: threading.Event
  ) -> None:
    self._kind = kind
    self._limits = limits
    self._stopping = stopping
    self._open = contextlib.ExitStack()
    self._start()

  def close(self) -> None:
    """Ends the sandbox and all that runs in it."""
    self._open.close()

  def run(self, program: Program) -> list[Outcome]:
    """Runs one program; see `Sandbox.run`."""
    outcomes: list[Outcome] = []
    is_second_try = False
    while len(outcomes) < len(program.tests):
      started = time.monotonic()
      try:
        reached, is_clean = self._run_once(program, len(outcomes))
      except _Lost:
        reached, is_clean = [], False
        # Once it may be the fault of the machine, or of another program.
        if is_second_try:
          spent = time.monotonic() - started
          reached = [Outcome(CRASHED, 'the sandbox was lost', spent)]
      if self._stopping.is_set():
        raise _Lost
      outcomes += reached
      is_second_try = not reached
      if not is_clean:
        self.close()
        self._start()
    return outcomes

  def _run_once(
      self, program: Program, first: int
  ) -> tuple[list[Outcome], bool]:
    """Runs a program from one of its tests on, as far as it goes.

    Returns:
      At least one outcome, and whether the sandbox is as before.

    Raises:
      _Lost: the sandbox, whatever of it is to blame.
    """
    tests = program.tests[first:]
    sources = [program.solution, program.setup]
    request = {
        'sources': sources if program.setup else sources[:1],
        'tests': len(tests),
        'seconds': program.seconds,
        'trusted': program.trusted,
    }
    for_tests = {
        'tests': tests, 'tested': program.tested, 'prompt': program.prompt}
    patience = program.seconds * len(tests) + _GRACE_SECONDS
    self._write(request)
    self._write(for_tests)
    answer = self._read(patience)
    outcomes = [Outcome(*outcome) for outcome in answer['outcomes']]
    return outcomes, not answer['left_behind']

  def _start(self) -> None:
    """Starts a sandbox.

    Raises:
      UserError: an isolation cannot be had.
    """
    try:
      first = self._start_process()
      if first is not None:
        self._open.callback(_stop_inside, self._process, os.pidfd_open(first))
    except BaseException:
      self.close()
      raise

  def _start_process(self) -> int | None:
    """Starts Python in a sandbox; returns the first process in there, if any.

    Raises:
      UserError: an isolation cannot be had.
    """
    folder = ''
    if self._kind == NONE:
      folder = self._open.enter_context(
          tempfile.TemporaryDirectory(ignore_cleanup_errors=True))  # fmt: skip
    errors = self._open.enter_context(tempfile.TemporaryFile())
    told, telling = os.pipe()
    with open(told, encoding='utf-8') as info:
      try:
        self._process = subprocess.Popen(
            sandbox_command(self._kind, self._limits, Path(folder), telling),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            bufsize=0, cwd=folder or None, env=ENVIRONMENT,
            start_new_session=True, pass_fds=[telling])  # fmt: skip
      finally:
        os.close(telling)
      self._open.callback(_stop, self._process)
      try:
        problem = self._read(_START_SECONDS)['problem']
      except _Lost:
        self._process.kill()
        self._process.wait()
        errors.seek(0)
        problem = ' '.join(errors.read().decode(errors='replace').split())
        problem = problem[-300:] or f'it ended ({self._process.returncode})'
      if not problem:
        description = info.read()
        return json.loads(description)['child-pid'] if description else None
    if 'Unknown option' in problem:
      raise UserError(
          f'expected bubblewrap 0.7 or newer, found one that says {problem!r}; '
          f'install a newer one, or spell out --sandbox=none to run what the '
          f'model wrote with all your rights'
      )
    raise UserError(
        f'expected a sandbox of {self._kind}, could not have it: {problem}; '
        f'allow user namespaces on this machine or use another one, or spell '
        f'out --sandbox=none to run what the model wrote with all your rights'
    )

  def _write(self, content: dict[str, Any]) -> None:
    data = json.dumps(content).encode()
    data = _LENGTH.pack(len(data)) + data
    try:
      while data:
        data = data[os.write(self._process.stdin.fileno(), data) :]
    except OSError as error:
      raise _Lost from error

  def _read(self, seconds: float) -> dict[str, Any]:
    """Reads a frame that comes within so many seconds."""
    until = time.monotonic() + seconds
    length = _LENGTH.unpack(self._read_exactly(_LENGTH.size, until))[0]
    return json.loads(self._read_exactly(length, until))

  def _read_exactly(self, size: int, until: float) -> bytes:
    descriptor = self._process.stdout.fileno()
    data = b''
    while len(data) < size:
      if self._stopping.is_set() or time.monotonic() > until:
        raise _Lost
      # Awake now and then, to see whether it is over.
      if _is_readable(descriptor, 0.2):
        part = os.read(descriptor, size - len(data))
        if not part:
          raise _Lost
        data += part
    return data


def _stop(process: subprocess.Popen) -> None:
  """Ends the process that a sandbox was started as."""
  process.kill()
  process.wait()
  process.stdin.close()
  process.stdout.close()


def _stop_inside(process: subprocess.Popen, first: int) -> None:
  """Ends a sandbox and returns once nothing runs in it any more.

  Args:
    process: what it was started as, whose end those inside follow.
    first: a descriptor of the first process inside, which is the last to end.
  """
  process.kill()
  _is_readable(first, _START_SECONDS)
  os.close(first)


def _is_readable(descriptor: int, seconds: float) -> bool:
  """Waits until a descriptor can be read, or a process of one has ended."""
  poll = select.poll()  # Unlike select(), it takes any number of descriptors.
  poll.register(descriptor, select.POLLIN)
  return bool(poll.poll(seconds * 1000))
