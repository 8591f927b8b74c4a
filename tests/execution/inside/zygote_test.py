"""Tests of what makes the processes of a program, beyond sandbox_test.py."""

import subprocess
import sys
import time

from codet5p_jax.execution.inside import confinement, zygote


class _SlowChecker:
  """A process for tests that takes its time to begin."""

  process = 0

  def begin(self, to_solution, trusted):
    time.sleep(0.5)

  def verdict(self, until):
    return ['passed' if time.monotonic() < until else 'timed_out', '']

  def is_as_before(self):
    return True


class _Forks(zygote._Forks):

  def fork(self, kept, run, seconds=None):
    sleeper = [sys.executable, '-c', 'import time; time.sleep(60)']
    return subprocess.Popen(sleeper, start_new_session=True).pid

  def ready_checker(self):
    time.sleep(0.5)
    return _SlowChecker()


def test_the_time_of_the_first_test_begins_when_tests_can_run():
  forks = _Forks(confinement.Confinement(filtered=False), requests=0)
  request = {'sources': [''], 'tests': 2, 'seconds': 0.4, 'trusted': True}
  outcomes = zygote._run_program(request, forks)
  assert [status for status, _, _ in outcomes] == ['passed', 'passed']
  assert all(seconds < 0.4 for _, _, seconds in outcomes)
