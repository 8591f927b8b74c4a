import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from codet5p_jax.errors import Unavailable, UserError
from codet5p_jax.training import run_lock
from codet5p_jax.training.run_lock import RunLock, await_lock

HOLD = """
import sys, time
from pathlib import Path
from codet5p_jax.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'lock.json'


@pytest.fixture
def other_process(path):
  """A process that holds the lock."""
  process = subprocess.Popen(
      [sys.executable, '-c', HOLD, str(path)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.wait()


def elsewhere(path, **fields):
  """Makes the lock one of another machine."""
  content = json.loads(path.read_text())
  path.write_text(json.dumps({**content, 'system': 'another', **fields}))


def test_a_lock_is_there_while_it_is_held(path):
  with RunLock(path) as lock:
    assert json.loads(path.read_text())['pid'] == os.getpid()
    lock.require_held()
  assert os.listdir(path.parent) == []


def test_a_run_that_lives_keeps_others_out(path, other_process):
  begin = time.monotonic()
  with pytest.raises(UserError) as raised, RunLock(path):
    pass
  assert time.monotonic() - begin < 2
  assert f'process {other_process.pid} on ' in str(raised.value)
  assert os.listdir(path.parent) == ['lock.json']
  assert json.loads(path.read_text())['pid'] == other_process.pid


@pytest.mark.parametrize('is_noticed', [True, False])
def test_the_lock_of_a_killed_run_is_taken_at_once(
    path, other_process, is_noticed, caplog
):
  other_process.kill()
  if is_noticed:
    other_process.wait()
  else:  # It stays in the list of processes until its parent looks.
    while 'State:\tZ' not in open(f'/proc/{other_process.pid}/status').read():
      time.sleep(0.01)
  begin = time.monotonic()
  with caplog.at_level(logging.WARNING), RunLock(path):
    assert json.loads(path.read_text())['pid'] == os.getpid()
  assert time.monotonic() - begin < 2
  assert len(caplog.records) == 1
  assert 'left over' in caplog.text


def test_a_process_id_that_was_used_again_is_not_the_holder(
    path, other_process
):
  content = json.loads(path.read_text())
  path.write_text(json.dumps({**content, 'process_start': '1'}))
  with RunLock(path) as lock:
    lock.require_held()


def test_a_lock_of_another_machine_that_is_touched_is_respected(path):
  with RunLock(path, touch_seconds=0.05):
    content = json.loads(path.read_text())
    elsewhere(path, host='far', pid=5)
    with pytest.raises(UserError, match='process 5 on far'):
      with RunLock(path, touch_seconds=0.05, patience_seconds=30.0):
        pass
    path.write_text(json.dumps(content))


@pytest.mark.parametrize('content', [None, '', '{"x": 1}'])
def test_a_lock_that_nobody_touches_is_taken_after_a_while(
    path, content, caplog
):
  with RunLock(path, touch_seconds=60.0):
    elsewhere(path)
    if content is not None:
      path.write_text(content)
    begin = time.monotonic()
    with RunLock(path, touch_seconds=0.1, patience_seconds=0.5) as lock:
      assert 0.5 <= time.monotonic() - begin < 2
      lock.require_held()


def test_the_holder_notices_that_another_run_took_the_lock(path):
  with RunLock(path, touch_seconds=0.01) as lock:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, 'name': 'another'}))
    deadline = time.monotonic() + 5
    while lock._thread.is_alive() and time.monotonic() < deadline:
      time.sleep(0.01)
    with pytest.raises(UserError, match='another run took it'):
      lock.require_held()
  assert json.loads(path.read_text())['name'] == 'another'


@pytest.mark.parametrize('number', [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_moment_without_the_disk_is_no_loss_of_the_lock(
    path, monkeypatch, number
):
  read_text, missed = Path.read_text, []

  def read(self, *arguments, **options):
    if self == path and len(missed) < 2:
      missed.append(number)
      raise OSError(number, os.strerror(number))
    return read_text(self, *arguments, **options)

  with RunLock(path, touch_seconds=0.01) as lock:
    monkeypatch.setattr(Path, 'read_text', read)
    deadline = time.monotonic() + 5
    while len(missed) < 2 and time.monotonic() < deadline:
      time.sleep(0.01)
    # It lives on, so that nobody thinks it dead.
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before and time.monotonic() < deadline:
      time.sleep(0.01)
    assert path.stat().st_mtime_ns > before
    lock.require_held()
  assert missed == [number] * 2
  assert os.listdir(path.parent) == []


def test_a_lock_that_appears_late_is_seen(path):
  seen = []
  with RunLock(path) as lock:
    content = path.read_text()
    path.unlink()
    waiting = threading.Thread(
        target=lambda: seen.append(await_lock(path, lock.name, 20.0))
    )
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    # That of an earlier run, which this host still shows, is not it.
    path.write_text(json.dumps({**json.loads(content), 'name': 'earlier'}))
    waiting.join(0.2)
    assert waiting.is_alive()
    path.write_text(content)
    waiting.join(5)
  assert seen == [None]


@pytest.mark.parametrize('content', [None, '', '{"format_version": 1}'])
def test_a_lock_that_is_not_seen_in_time_may_be_seen_later(path, content):
  if content is not None:
    path.write_text(content)
  with pytest.raises(Unavailable) as raised:
    await_lock(path, 'mine', 0.1)
  assert f'expected to see {path} as process 0 wrote it 0 s ago, found' in (
      str(raised.value)
  )
  assert 'a file system that all hosts share' in str(raised.value)


def test_a_run_in_the_same_folder_may_end_by_itself(path):
  with RunLock(path), pytest.raises(Unavailable), RunLock(path):
    pass


def test_of_many_that_find_a_stale_lock_one_gets_it(path, other_process):
  other_process.kill()
  other_process.wait()
  outcomes = []
  release = threading.Event()

  def take():
    try:
      with RunLock(path):
        outcomes.append('held')
        release.wait(10)
    except UserError:
      outcomes.append('refused')

  threads = [threading.Thread(target=take) for _ in range(8)]
  for thread in threads:
    thread.start()
  while len(outcomes) < len(threads):
    time.sleep(0.01)
  release.set()
  for thread in threads:
    thread.join()
  assert sorted(outcomes) == ['held', *['refused'] * 7]
  assert os.listdir(path.parent) == []


def test_a_file_system_without_links_has_locks_too(path, monkeypatch):

  def refuse(*_):
    raise PermissionError

  monkeypatch.setattr(run_lock.os, 'link', refuse)
  with RunLock(path):
    with pytest.raises(UserError, match='no other run'), RunLock(path):
      pass
  assert os.listdir(path.parent) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write'):
    with RunLock(tmp_path / 'file' / 'lock.json'):
      pass
