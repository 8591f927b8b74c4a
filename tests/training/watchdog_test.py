import subprocess
import sys

from codet5p_jax.errors import HUNG_STATUS

BEGIN = """
import sys, threading, time
from pathlib import Path
from codet5p_jax.training import watchdog
watchdog._GRACE_SECONDS = 0.5
folder = Path(sys.argv[1])
"""
LIVELY = """
with watchdog.Watchdog(folder) as dog:
  for step in range(30):
    dog.expect(f'step {step}', 0.5)
    time.sleep(0.05)
  dog.expect('what may take its time', None)
  time.sleep(1.2)
time.sleep(1.2)
print('done')
"""
HANGING = """
def wait_for_a_host_that_never_comes():
  threading.Event().wait()

with watchdog.Watchdog(folder) as dog:
  dog.expect('step 11', 5)
  dog.expect('step 12', 0.5)
  wait_for_a_host_that_never_comes()
"""
# Compiled code that keeps Python's lock: no other thread runs any more.
GREEDY = """
import re

def match_for_ever():
  re.match('(a+)+$', 'a' * 60 + 'b')

with watchdog.Watchdog(folder) as dog:
  dog.expect('step 12', 0.5)
  match_for_ever()
"""


def run(program, folder):
  return subprocess.run(
      [sys.executable, '-c', BEGIN + program, str(folder)],
      capture_output=True,
      text=True,
      timeout=30,
  )


def test_a_process_that_shows_signs_of_life_is_let_be(tmp_path):
  ended = run(LIVELY, tmp_path / 'hangs')
  assert (ended.returncode, ended.stdout) == (0, 'done\n'), ended.stderr
  assert not (tmp_path / 'hangs').exists()


def test_a_process_that_hangs_says_where_and_ends(tmp_path):
  ended = run(HANGING, tmp_path / 'hangs')
  assert ended.returncode == HUNG_STATUS
  [line] = ended.stderr.split('\n')[1:-1]  # After the progress bar.
  assert 'expected step 12 to end within 0 s' in line or '1 s' in line
  stacks = tmp_path / 'hangs' / 'process_0.txt'
  assert str(stacks) in line
  assert 'wait_for_a_host_that_never_comes' in stacks.read_text()


def test_stacks_go_to_the_error_output_where_no_file_can_be_written(tmp_path):
  (tmp_path / 'hangs').write_text('')
  ended = run(HANGING, tmp_path / 'hangs')
  assert ended.returncode == HUNG_STATUS
  assert 'wait_for_a_host_that_never_comes' in ended.stderr
  assert 'codet5p: expected step 12' in ended.stderr.splitlines()[-1]


def test_a_thread_that_keeps_all_others_from_running_ends_too(tmp_path):
  ended = run(GREEDY, tmp_path / 'hangs')
  assert ended.returncode not in (0, None)
  assert 'match_for_ever' in ended.stderr
