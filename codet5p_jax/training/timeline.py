"""Where the time of a run goes: its own log, kept without any service.

A session is what one process makes of a run; a run that was stopped has
several. Each second of a session belongs to exactly one bucket:

    startup      from the start of the process to the first update
    compile      tracing and compiling the train step
    input        waiting for batches
    step         making updates; the only time that is worth its price
    evaluation   measuring on the validation split
    checkpoint   standing still while a checkpoint or the weights are saved
    other        what comes after the last update

Over the sessions of a run there are two more:

    lost_work    all that a session did after the update from which a later
                 session went on: it was done again
    down         from the end of a session (the last row of one that was
                 killed) to the start of the next

`timeline.jsonl` in the run folder has a JSON object a line. Those of all kinds
have `seconds` since the session began, `buckets`, the seconds of each so far,
and from training on `step`, the updates made and seen. The kinds:

    start      the session's first: time (Unix, when the process started),
               host, pid, processes, devices, device_kind, version
    training   updates begin; `step` is the one that the session goes on from
    progress   at every row of training of metrics.jsonl, and once a
               checkpoint is on its way
    event      its name in `event`, more in `details`
    end        `status`: "done", or the name of the exception that ended it

A process that is killed leaves no end, and loses what came after its last row.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import codet5p_jax
from codet5p_jax.training.run_folder import (
    append_metrics,
    read_metrics,
    trim_metrics,
)

BUCKETS = (
    'startup', 'compile', 'input', 'step', 'evaluation', 'checkpoint', 'other'
)  # fmt: skip
LOST_WORK, DOWN = 'lost_work', 'down'

_IMPORTED = time.monotonic()

# Of the sessions of this process. The first is as old as the process; others,
# of a notebook or a test, begin when they are made.
_numbers = itertools.count()


class Timeline:
  """Counts every second of a session into one bucket, and writes it down.

  It belongs to the thread that trains. Nothing here waits for a device.
  """

  def __init__(self, path: Path, is_writer: bool):
    """Begins a session, in its startup.

    Args:
      path: of timeline.jsonl; this process is the only one that writes it. A
        last line that a killed session left half-written is dropped.
      is_writer: whether this process writes; others only count.

    Raises:
      UserError: the file cannot be written, or a line in it is not JSON.
    """
    age = 0.0 if next(_numbers) else process_age()
    self._last = time.monotonic_ns() - round(age * 1e9)
    began = time.time() - age
    self._spent = dict.fromkeys(BUCKETS, 0)  # Nanoseconds: sums are exact.
    self._nested = ['startup']
    self._step: int | None = None
    self._path = path if is_writer else None
    if is_writer:
      trim_metrics(path, sys.maxsize)  # No row is of a later step.
    self._append(
        'start',
        time=round(began, 3),
        host=socket.gethostname(),
        pid=os.getpid(),
        processes=jax.process_count(),
        devices=jax.device_count(),
        device_kind=jax.devices()[0].device_kind,
        version=codet5p_jax.__version__,
    )

  def __enter__(self) -> 'Timeline':
    return self

  def __exit__(self, kind, *exception_info) -> None:
    if kind is None:
      self._append('end', status='done')
      return
    # A second error would hide the one that is being raised.
    with contextlib.suppress(Exception):
      self._append('end', status=kind.__name__)

  @contextlib.contextmanager
  def training(self, first_step: int) -> Iterator[None]:
    """Startup is over; the time within is `step`'s, that after it `other`'s.

    Args:
      first_step: updates made before this session.
    """
    self._count()
    self._nested[0], self._step = 'step', first_step
    self._append('training')
    try:
      yield
    finally:
      self._count()
      self._nested[0] = 'other'

  @contextlib.contextmanager
  def within(self, bucket: str) -> Iterator[None]:
    """The time within is this bucket's, and of no other around it.

    Raises:
      ValueError: there is no such bucket.
    """
    if bucket not in self._spent:
      raise ValueError(f'expected one of {BUCKETS}, found {bucket}')
    self._count()
    self._nested.append(bucket)
    try:
      yield
    finally:
      self._count()
      self._nested.pop()

  def awaited(self, batches: Iterable[Any]) -> Iterator[Any]:
    """Yields the batches; the time until each is there is `input`'s."""
    iterator = iter(batches)
    while True:
      with self.within('input'):
        try:
          batch = next(iterator)
        except StopIteration:
          return
      yield batch

  def advance(self) -> None:
    """Counts an update that was made and whose metrics were seen."""
    self._step += 1

  def progress(self) -> None:
    """Writes a row; what was done before it is told from what comes after."""
    self._append('progress')

  def event(self, name: str, **details: Any) -> None:
    """Writes down that something happened.

    Args:
      name: "checkpoint" (is committed; details: step, bytes, seconds from the
        call to the commit, waited_seconds of them), "evaluation", "bad_step"
        (details: step, fault), "damaged_checkpoint" (was set aside; details:
        step, fault), "preempted", "rule" (bad_steps: that of the session, see
        step_health.py), or any other.
      **details: JSON values.
    """
    self._append('event', event=name, details=details)

  def seconds(self, *buckets: str) -> float:
    """Seconds of these buckets together, so far in this session."""
    self._count()
    return sum(self._spent[bucket] for bucket in buckets) / 1e9

  def shares(self) -> dict[str, float]:
    """Shares of each bucket in the session so far; their sum is 1."""
    self._count()
    total = sum(self._spent.values()) or 1
    return {bucket: spent / total for bucket, spent in self._spent.items()}

  def _count(self) -> None:
    now = time.monotonic_ns()
    self._spent[self._nested[-1]] += now - self._last
    self._last = now

  def _append(self, kind: str, **more: Any) -> None:
    if self._path is None:
      return
    self._count()
    row = {
        'kind': kind,
        'seconds': sum(self._spent.values()) / 1e9,
        **({} if self._step is None else {'step': self._step}),
        'buckets': {name: ns / 1e9 for name, ns in self._spent.items()},
        **more,
    }
    append_metrics(self._path, row)


@dataclasses.dataclass(frozen=True)
class Session:
  """What one process made of a run.

  Attributes:
    rows: of timeline.jsonl, of kind start first.
  """

  rows: Sequence[Mapping[str, Any]]

  @property
  def began(self) -> float:
    """When its process started, Unix time."""
    return self.rows[0]['time']

  @property
  def seconds(self) -> float:
    """How long it was, as far as it is known."""
    return self.rows[-1]['seconds']

  @property
  def first_step(self) -> int | None:
    """Updates made before it; None where it did not come to train."""
    steps = (row['step'] for row in self.rows if row['kind'] == 'training')
    return next(steps, None)

  @property
  def status(self) -> str | None:
    """See the rows of kind end; None of one that was killed or goes on."""
    return self.rows[-1].get('status')

  def events(self, name: str) -> list[Mapping[str, Any]]:
    """The details of the events of a name."""
    return [
        row['details']
        for row in self.rows
        if row['kind'] == 'event' and row['event'] == name
    ]


def read_timeline(path: Path) -> list[Session]:
  """Reads the sessions of a run, the first one first.

  Left out are sessions that found the run complete.

  Args:
    path: of timeline.jsonl; none where it is missing.

  Raises:
    UserError: a line is not JSON, and not merely a half-written last one.
  """
  groups: list[list[Mapping[str, Any]]] = []
  for row in read_metrics(path):
    if row.get('kind') == 'start':
      groups.append([])
    if groups:
      groups[-1].append(row)
  sessions: list[Session] = []
  is_complete = False
  for session in map(Session, groups):
    if not is_complete or session.first_step is not None:
      sessions.append(session)
      is_complete = session.status == 'done'
  return sessions


def account(sessions: Sequence[Session]) -> list[dict[str, float]]:
  """Seconds of each session by bucket, `lost_work` among them.

  A second is lost only once a later session has gone on from before it.
  """
  accounts = []
  resumed_from: int | float = math.inf
  for session in reversed(sessions):
    kept = _buckets_at(session, resumed_from)
    lost = sum(session.rows[-1]['buckets'].values()) - sum(kept.values())
    accounts.append({**kept, LOST_WORK: lost})
    if session.first_step is not None:
      resumed_from = min(resumed_from, session.first_step)
  return accounts[::-1]


def goodput(sessions: Sequence[Session]) -> dict[str, float]:
  """Seconds of a whole run by bucket, `lost_work` and `down` among them.

  Their sum is the time from the start of the first session to the last row.
  """
  total = dict.fromkeys((*BUCKETS, LOST_WORK, DOWN), 0.0)
  for spent in account(sessions):
    for bucket, seconds in spent.items():
      total[bucket] += seconds
  for before, after in itertools.pairwise(sessions):
    # The clocks of two hosts may differ.
    total[DOWN] += max(0.0, after.began - (before.began + before.seconds))
  return total


def _buckets_at(session: Session, step: int | float) -> Mapping[str, float]:
  """Seconds by bucket when a session had made so many updates, and no more.

  Between two rows of other steps the time is taken to flow evenly.

  Args:
    session: its whole time is given where it made no further update.
    step: where it began later, all of its updates are further ones.
  """
  if session.first_step is not None:
    step = max(step, session.first_step)
  before = session.rows[0]
  for row in session.rows:
    if row.get('step', step) <= step:
      before = row
      continue
    share = (step - before['step']) / (row['step'] - before['step'])
    return {
        bucket: seconds + share * (row['buckets'][bucket] - seconds)
        for bucket, seconds in before['buckets'].items()
    }
  return session.rows[-1]['buckets']


def process_age() -> float:
  """Seconds since this process started; since this module's import elsewhere.

  Linux tells it, all imports included.
  """
  since_import = time.monotonic() - _IMPORTED
  try:
    # The name of the program, in brackets, may hold anything.
    fields = Path('/proc/self/stat').read_text().rpartition(')')[2].split()
    started = int(fields[19]) / os.sysconf('SC_CLK_TCK')
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
  except (OSError, ValueError, IndexError, AttributeError):
    return since_import
  return max(age, since_import)
