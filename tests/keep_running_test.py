"""Tests of the script that starts a command again."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / 'tpu_scripts/keep_running.sh'
# Ends with the statuses given, one after the other; counts its starts.
COMMAND = """
import os, pathlib, signal, sys, time
starts = pathlib.Path(sys.argv[1])
statuses = sys.argv[2].split(',')
made = starts.read_text() if starts.exists() else ''
starts.write_text(made + '.')
status = statuses[min(len(made), len(statuses) - 1)]
print('training: %d%%|##' % len(made), end='\\r', file=sys.stderr)
if '/' in status:
  status, words = status.split('/')
  print(words.removesuffix(' of JAX'), file=sys.stderr)
  if words.endswith(' of JAX'):
    print('-' * 20, file=sys.stderr)
    print('For simplicity, JAX has removed its frames.', file=sys.stderr)
    print('*** Check failure stack trace: ***', file=sys.stderr)
    print('    @     0x7f18f38a71f5  (unknown)', file=sys.stderr)
if status == 'sleep':
  time.sleep(60)
if status == 'save':
  def save(*_):
    time.sleep(0.3)
    print('saving', file=sys.stderr, flush=True)
    starts.with_name('saved').touch()
    sys.exit(75)
  signal.signal(signal.SIGTERM, save)
  starts.with_name('ready').touch()
  time.sleep(60)
if int(status) < 0:
  os.kill(os.getpid(), -int(status))
sys.exit(int(status))
"""


def command(tmp_path, statuses):
  program = tmp_path / 'program.py'
  program.write_text(COMMAND)
  return [
      str(SCRIPT), sys.executable, str(program), str(tmp_path / 'starts'),
      statuses,
  ]  # fmt: skip


def keep_running(tmp_path, statuses, **settings):
  ended = subprocess.run(
      command(tmp_path, statuses),
      capture_output=True,
      text=True,
      timeout=60,
      env={**os.environ, 'RESTART_SECONDS': '0.01', **settings},
  )
  return ended, len((tmp_path / 'starts').read_text())


@pytest.mark.parametrize('status', [0, 2, 130])
def test_what_is_done_or_to_be_mended_is_not_started_again(tmp_path, status):
  ended, starts = keep_running(tmp_path, str(status))
  assert (ended.returncode, starts) == (status, 1)


def test_a_killed_command_is_started_until_it_is_done(tmp_path):
  statuses = '-9/step 1,1/step 2,70/step 3,75,75,75,75,0'
  ended, starts = keep_running(tmp_path, statuses)
  assert (ended.returncode, starts) == (0, 8)
  assert ended.stderr.count('starting again') == 3


def test_it_gives_up_after_three_failures_that_are_the_same(tmp_path):
  statuses = '1/other,1/a bug,1/a bug,75,1/a bug'
  ended, starts = keep_running(tmp_path, statuses)
  assert (ended.returncode, starts) == (1, 7)
  assert ended.stderr.splitlines()[-1] == (
      'keep_running: gave up after status 1 and the same last line 3 times in '
      'a row: a bug'
  )


def test_failures_that_differ_only_in_numbers_are_the_same(tmp_path):
  words = [f'F11{day} 20:0{day} 1234{day} 0x7f{day}a lost' for day in range(3)]
  ended, starts = keep_running(tmp_path, ','.join(f'-6/{w}' for w in words))
  assert (ended.returncode, starts) == (128 + 6, 3)
  assert ended.stderr.splitlines()[-1].endswith(f'in a row: {words[-1]}')


def test_another_line_begins_a_new_row(tmp_path):
  statuses = '1/a bug,1/a bug,1/another,1/a bug,1/a bug,-9/a bug,0'
  ended, starts = keep_running(tmp_path, statuses)
  assert (ended.returncode, starts) == (0, 7)


def test_what_jax_adds_below_errors_is_not_their_line(tmp_path):
  statuses = '1/one of JAX,1/another of JAX,1/one of JAX,0'
  ended, starts = keep_running(tmp_path, statuses)
  assert (ended.returncode, starts) == (0, 4)


def test_a_long_run_begins_a_new_row(tmp_path):
  statuses = ','.join(['1/a bug'] * 5 + ['0'])
  ended, starts = keep_running(tmp_path, statuses, LONG_RUN_SECONDS='0')
  assert (ended.returncode, starts) == (0, 6)


def test_what_may_come_by_itself_is_waited_for(tmp_path):
  statuses = ','.join(['69/no process 1'] * 6 + ['0'])
  ended, starts = keep_running(tmp_path, statuses)
  assert (ended.returncode, starts) == (0, 7)
  assert 'status 69, 6 times in a row; starting again' in ended.stderr


def test_waiting_is_no_part_of_a_row(tmp_path):
  statuses = '1/a bug,69/gone,69/gone,1/a bug,69/gone,1/a bug,0'
  ended, starts = keep_running(tmp_path, statuses)
  assert (ended.returncode, starts) == (1, 6)


def test_what_the_command_says_is_passed_on_and_not_kept(tmp_path):
  # Progress bars of weeks would fill a small /tmp.
  program = tmp_path / 'program.py'
  program.write_text(
      'import glob, os, sys\n'
      'for step in range(9999):\n'
      "  print('training: 9%|##', end=chr(13), file=sys.stderr)\n"
      "print('a bug', file=sys.stderr, flush=True)\n"
      "files = glob.glob(os.environ['TMPDIR'] + '/*/*')\n"
      'print(sum(os.stat(file).st_size for file in files))\n'
      'sys.exit(2)\n'
  )
  ended = subprocess.run(
      [SCRIPT, sys.executable, program],
      capture_output=True, text=True, env={**os.environ, 'TMPDIR': tmp_path},
  )  # fmt: skip
  assert len(ended.stderr) > 9999 * 10
  assert ended.stderr.endswith('a bug\n')
  assert int(ended.stdout) < 1000


def test_being_told_to_end_is_passed_on(tmp_path):
  process = subprocess.Popen(command(tmp_path, 'sleep'))
  while not (tmp_path / 'starts').exists():
    time.sleep(0.01)
  time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  assert process.wait(10) == 128 + signal.SIGTERM
  assert (tmp_path / 'starts').read_text() == '.'


def test_a_signal_to_the_whole_group_leaves_a_run_time_to_save(tmp_path):
  # As of a machine that is shut down, which ends every process.
  process = subprocess.Popen(command(tmp_path, 'save'), start_new_session=True)
  while not (tmp_path / 'ready').exists():
    time.sleep(0.01)
  os.killpg(process.pid, signal.SIGTERM)
  assert process.wait(10) == 75
  assert (tmp_path / 'saved').exists()


def test_without_a_command_it_says_so():
  ended = subprocess.run([SCRIPT], capture_output=True, text=True)
  assert ended.returncode == 2
  assert 'expected a command' in ended.stderr
