import dataclasses
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import codet5p_jax
from codet5p_jax.training import timeline as timelines
from codet5p_jax.training.timeline import (
    BUCKETS,
    DOWN,
    LOST_WORK,
    Session,
    Timeline,
    account,
    goodput,
    process_age,
    read_timeline,
)


class Clock:
  """Takes the place of the module `time`; stands still unless it is moved."""

  def __init__(self):
    self.now = 100.0

  def monotonic_ns(self):
    return round(self.now * 1e9)

  def monotonic(self):
    return self.now

  def time(self):
    return 1_700_000_000.0 + self.now


@pytest.fixture
def clock(monkeypatch):
  """A clock, in a process that had sessions before."""
  clock = Clock()
  monkeypatch.setattr(timelines, 'time', clock)
  monkeypatch.setattr(timelines, '_numbers', itertools.count(1))
  return clock


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'timeline.jsonl'


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def spent(path):
  """Of the last row, the buckets that have any time."""
  buckets = rows(path)[-1]['buckets']
  return {name: seconds for name, seconds in buckets.items() if seconds}


def test_an_inner_bucket_takes_its_time_from_the_outer(path, clock):
  with Timeline(path, is_writer=True) as timeline:
    clock.now += 1
    with timeline.training(3):
      clock.now += 2
      with timeline.within('evaluation'):
        clock.now += 4
        with timeline.within('compile'):
          clock.now += 8
        clock.now += 16
      clock.now += 32
    clock.now += 64
    with timeline.within('checkpoint'):
      clock.now += 128
    assert timeline.seconds('compile', 'evaluation') == 8 + 4 + 16
    assert timeline.shares()['step'] == 34 / 255
    assert math.fsum(timeline.shares().values()) == 1
  assert spent(path) == {
      'startup': 1,
      'step': 34,
      'evaluation': 20,
      'compile': 8,
      'other': 64,
      'checkpoint': 128,
  }
  assert rows(path)[-1]['seconds'] == 255


def test_a_bucket_ends_with_an_error_too(path, clock):
  with Timeline(path, is_writer=True) as timeline, timeline.training(0):
    with pytest.raises(ZeroDivisionError), timeline.within('checkpoint'):
      clock.now += 2
      raise ZeroDivisionError
    clock.now += 3
  assert spent(path) == {'checkpoint': 2, 'step': 3}


def test_there_is_no_other_bucket(path, clock):
  with Timeline(path, is_writer=True) as timeline:
    for name in ('lunch', LOST_WORK, DOWN):
      with pytest.raises(ValueError, match=f'found {name}'):
        with timeline.within(name):
          pass


def test_waiting_for_batches_is_input(path, clock):
  def batches():
    for number in range(3):
      clock.now += 2
      yield number
    clock.now += 1

  with Timeline(path, is_writer=True) as timeline, timeline.training(0):
    found = []
    for batch in timeline.awaited(batches()):
      clock.now += 10
      found.append(batch)
  assert found == [0, 1, 2]
  assert spent(path) == {'input': 7, 'step': 30}


def test_what_fails_in_reading_batches_is_raised(path, clock):
  def batches():
    yield 0
    raise ZeroDivisionError

  with Timeline(path, is_writer=True) as timeline, timeline.training(0):
    awaited = timeline.awaited(batches())
    assert next(awaited) == 0
    with pytest.raises(ZeroDivisionError):
      next(awaited)
    clock.now += 1
  assert spent(path) == {'step': 1}


def test_rows_tell_what_is_documented(path, clock):
  with Timeline(path, is_writer=True) as timeline:
    with timeline.training(3):
      timeline.advance()
      timeline.advance()
      timeline.progress()
      timeline.event('checkpoint', step=4, bytes=12, seconds=0.5)
  start, *others = rows(path)
  assert start.keys() == {
      'kind', 'seconds', 'buckets', 'time', 'host', 'pid', 'processes',
      'devices', 'device_kind', 'version',
  }  # fmt: skip
  assert all(name in timelines.__doc__ for name in [*start, *BUCKETS])
  assert start['time'] == clock.time()
  assert start['devices'] == jax.device_count() == 8
  assert start['version'] == codet5p_jax.__version__
  assert [(row['kind'], row['step']) for row in others] == [
      ('training', 3), ('progress', 5), ('event', 5), ('end', 5)
  ]  # fmt: skip
  [session] = read_timeline(path)
  saved = {'step': 4, 'bytes': 12, 'seconds': 0.5}
  assert session.events('checkpoint') == [saved]
  assert session.events('bad_step') == []
  assert (session.first_step, session.status) == (3, 'done')


def test_an_end_names_the_exception(path, clock):
  with pytest.raises(KeyboardInterrupt):
    with Timeline(path, is_writer=True):
      raise KeyboardInterrupt
  assert read_timeline(path)[0].status == 'KeyboardInterrupt'


def test_a_full_disk_at_the_end_does_not_hide_the_error(
    path, clock, monkeypatch
):
  def fill(*arguments):
    raise OSError('full')

  with pytest.raises(ZeroDivisionError):
    with Timeline(path, is_writer=True):
      monkeypatch.setattr(timelines, 'append_metrics', fill)
      raise ZeroDivisionError
  monkeypatch.undo()
  with pytest.raises(OSError, match='full'):
    with Timeline(path, is_writer=True):
      monkeypatch.setattr(timelines, 'append_metrics', fill)


def test_others_than_the_writer_count_and_write_nothing(path, clock):
  with Timeline(path, is_writer=False) as timeline, timeline.training(0):
    clock.now += 3
    timeline.progress()
    assert timeline.seconds('step') == 3
  assert not path.exists()


def test_a_half_written_line_is_left_out_and_dropped_by_the_next_session(
    path, clock
):
  def live():
    with Timeline(path, is_writer=True) as timeline, timeline.training(0):
      pass

  live()
  whole = path.read_text()
  with path.open('a') as file:
    file.write('{"kind": "prog')
  assert [len(session.rows) for session in read_timeline(path)] == [3]
  live()
  assert path.read_text().startswith(whole)
  assert [len(session.rows) for session in read_timeline(path)] == [3, 3]


def test_rows_before_the_first_start_are_left_out(path, clock):
  with Timeline(path, is_writer=True) as timeline:
    timeline.progress()
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(lines[1:] + lines))
  [session] = read_timeline(path)
  assert len(session.rows) == 3


def test_no_file_has_no_sessions(path):
  assert read_timeline(path) == []
  assert set(goodput([]).values()) == {0.0}


def test_a_session_that_found_the_run_complete_is_none(path, clock):
  for step in (0, 4, None, None):
    with Timeline(path, is_writer=True) as timeline:
      clock.now += 1
      if step is not None:
        with timeline.training(step):
          clock.now += 1
  sessions = read_timeline(path)
  assert [session.first_step for session in sessions] == [0, 4]
  assert sum(goodput(sessions).values()) == 4


def test_a_session_that_did_not_come_to_train_counts(path, clock):
  with pytest.raises(ZeroDivisionError), Timeline(path, is_writer=True):
    clock.now += 5
    raise ZeroDivisionError
  with Timeline(path, is_writer=True) as timeline, timeline.training(0):
    clock.now += 2
  assert goodput(read_timeline(path)) == {
      **dict.fromkeys((*BUCKETS, LOST_WORK, DOWN), 0), 'startup': 5, 'step': 2
  }  # fmt: skip


def test_the_first_session_is_as_old_as_the_process(path, clock, monkeypatch):
  monkeypatch.setattr(timelines, '_numbers', itertools.count())
  monkeypatch.setattr(timelines, 'process_age', lambda: 30.0)
  for _ in range(2):
    with Timeline(path, is_writer=True) as timeline, timeline.training(0):
      clock.now += 1
  first, second = read_timeline(path)
  assert (first.began, first.seconds) == (clock.time() - 32, 31)
  assert (second.began, second.seconds) == (clock.time() - 1, 1)


def test_the_age_of_a_process_holds_what_came_before_any_import():
  program = """
import time
began = time.monotonic()
time.sleep(0.6)
from codet5p_jax.training.timeline import process_age
print(process_age(), time.monotonic() - began)
"""
  began = time.monotonic()
  printed = subprocess.run(
      [sys.executable, '-c', program],
      capture_output=True,
      check=True,
      text=True,
  ).stdout
  age, since_first_line = map(float, printed.split())
  # The kernel counts in hundredths of a second.
  assert since_first_line - 0.02 < age < time.monotonic() - began + 0.02


@pytest.mark.parametrize(
    'stat', [None, '', '1 (a b) S 1 2', f'1 (x) {"x " * 30}']
)
def test_where_the_kernel_does_not_tell_the_import_counts(monkeypatch, stat):
  def read(path):
    if stat is None:
      raise FileNotFoundError
    return stat

  monkeypatch.setattr(Path, 'read_text', read)
  monkeypatch.setattr(timelines, '_IMPORTED', time.monotonic() - 5000)
  assert 5000 <= process_age() < 5100


def test_the_name_of_the_program_does_not_matter(monkeypatch):
  fields = '0 ' * 18 + '0 0'
  monkeypatch.setattr(Path, 'read_text', lambda path: f'1 (a) b) c) S {fields}')
  uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
  assert uptime <= process_age() < uptime + 60


def row(kind, seconds, **more):
  """All time is the steps', from the second on."""
  buckets = dict.fromkeys(BUCKETS, 0.0)
  buckets |= {'startup': min(seconds, 1.0), 'step': max(seconds - 1, 0.0)}
  return {'kind': kind, 'seconds': seconds, 'buckets': buckets, **more}


def session(began, first_step, *points):
  """A session that trains from its first second on; points: (step, seconds)."""
  return Session((
      row('start', 1.0, time=began),
      row('training', 1.0, step=first_step),
      *(row('progress', seconds, step=step) for step, seconds in points),
  ))


def test_between_two_rows_the_time_flows_evenly():
  sessions = [
      session(0.0, 0, (10, 21.0), (20, 61.0)),
      session(100.0, 15, (20, 31.0)),
  ]
  # Of the first, steps 16 to 20: half of 40 seconds.
  assert [a[LOST_WORK] for a in account(sessions)] == [20, 0]
  assert goodput(sessions)['step'] == 20 + 20 + 30
  assert goodput(sessions)[DOWN] == 100 - 61


def test_an_older_checkpoint_loses_the_work_of_all_sessions_after_it():
  sessions = [
      session(0.0, 0, (10, 21.0), (20, 41.0)),
      session(50.0, 20, (30, 31.0)),
      session(90.0, 10, (30, 41.0)),
  ]
  assert [a[LOST_WORK] for a in account(sessions)] == [20, 30, 0]
  assert [a['startup'] for a in account(sessions)] == [1, 1, 1]


def test_clocks_that_differ_make_no_time_negative():
  sessions = [session(100.0, 0, (5, 11.0)), session(105.0, 5, (9, 4.0))]
  assert goodput(sessions)[DOWN] == 0


@dataclasses.dataclass
class Plan:
  """A session of whole seconds, to be lived."""

  startup: int
  updates: list[tuple[int, int]]  # Seconds of input and of the step.
  is_killed: bool
  other: int
  newest_damaged: int  # So many checkpoints are damaged at its start.
  down: int  # Before the next.


SECONDS = st.integers(0, 50)
PLANS = st.lists(
    st.builds(
        Plan,
        startup=SECONDS,
        updates=st.lists(st.tuples(SECONDS, SECONDS), max_size=7),
        is_killed=st.booleans(),
        other=SECONDS,
        newest_damaged=st.integers(0, 2),
        down=st.integers(0, 500),
    ),
    min_size=1,
    max_size=6,
)


class Life:
  """Lives sessions, and keeps account of its own, second by second."""

  def __init__(self, path, clock, log_every, checkpoint_every):
    self.path, self.clock = path, clock
    self.log_every, self.checkpoint_every = log_every, checkpoint_every
    self.checkpoints = [0]
    # Of each session: first step, [(bucket, seconds, update)] up to its last
    # row, and when it began and wrote that.
    self.lived = []

  def session(self, plan):
    clock, began, passed = self.clock, self.clock.now, []

    def spend(bucket, seconds, update):
      clock.now += seconds
      passed.append((bucket, seconds, update))

    def wrote():
      self.lived[-1] = (first, [*passed], began, clock.now)

    for _ in range(min(plan.newest_damaged, len(self.checkpoints) - 1)):
      self.checkpoints.pop()
    first = self.checkpoints[-1]
    self.lived.append(None)
    with mock.patch.object(timelines, '_numbers', itertools.count(1)):
      timeline = Timeline(self.path, is_writer=True)
    wrote()
    spend('startup', plan.startup, None)
    with timeline.training(first):
      wrote()
      update = first
      for update, (waited, made) in enumerate(plan.updates, first + 1):
        with timeline.within('input'):
          spend('input', waited, update)
        self.update(timeline, spend, update, made, wrote)
    spend('other', plan.other, update)
    if not plan.is_killed:
      timeline.__exit__(None)
      wrote()
    clock.now += plan.down

  def update(self, timeline, spend, update, seconds, wrote):
    spend('step', seconds, update)
    timeline.advance()
    if update % self.log_every == 0:
      timeline.progress()
      wrote()
    if update % self.checkpoint_every == 0:
      with timeline.within('checkpoint'):
        spend('checkpoint', 3, update)
      timeline.progress()
      wrote()
      self.checkpoints.append(update)

  def goodput(self):
    total = dict.fromkeys((*BUCKETS, LOST_WORK, DOWN), 0)
    for number, (first, passed, _, _) in enumerate(self.lived):
      later = [other[0] for other in self.lived[number + 1 :]]
      for bucket, seconds, update in passed:
        is_lost = update is not None and any(
            max(step, first) < update for step in later
        )
        total[LOST_WORK if is_lost else bucket] += seconds
    for before, after in itertools.pairwise(self.lived):
      total[DOWN] += after[2] - before[3]
    return total


@settings(max_examples=60, deadline=None)
@given(PLANS, st.integers(1, 3), st.integers(1, 4))
def test_every_second_of_a_run_is_told_once_and_by_its_name(
    plans, log_every, checkpoint_every
):
  clock = Clock()
  with (
      tempfile.TemporaryDirectory() as folder,
      mock.patch.object(timelines, 'time', clock),
  ):
    path = Path(folder) / 'timeline.jsonl'
    life = Life(path, clock, log_every, checkpoint_every)
    for plan in plans:
      life.session(plan)
    found = goodput(read_timeline(path))
  assert found == pytest.approx(life.goodput(), abs=1e-6)
  wall = life.lived[-1][3] - life.lived[0][2]
  assert sum(found.values()) == pytest.approx(wall, abs=1e-6)
