"""Sandboxes for tests."""

import os
import shutil
from collections.abc import Iterator

import pytest
from codet5p_jax.execution.inside.confinement import Limits
from codet5p_jax.execution.isolation import BUBBLEWRAP
from codet5p_jax.execution.sandbox import Outcome, Program, Sandbox

# Unlike those of any other sandbox on this machine, so that the processes of
# these tests are known by their command lines.
LIMITS = Limits(memory_bytes=1 << 29, file_bytes=(1 << 22) + os.getpid())


@pytest.fixture(scope='session')
def box() -> Iterator[Sandbox]:
  """A sandbox; the tests of one process share it."""
  if shutil.which('bwrap') is None:
    pytest.skip('needs bubblewrap (Debian package bubblewrap)')
  with Sandbox(BUBBLEWRAP, workers=1, limits=LIMITS) as started:
    yield started


@pytest.fixture
def run(box):
  """Runs one program and returns the outcomes of its tests."""

  def run(
      solution: str, *tests: str, tested=('f',), seconds=10.0, **fields
  ) -> list[Outcome]:
    program = Program(solution, tests, tested, seconds, **fields)
    ((_, outcomes),) = box.run([program])
    return outcomes

  return run
