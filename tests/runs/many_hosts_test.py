"""The same training by one, two and four processes on four devices."""

import contextlib
import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from codet5p_jax.trained_model import load_trained_model
from codet5p_jax.training.checkpoints.steps import committed_steps
from codet5p_jax.training.checkpoints.verify import verify
from codet5p_jax.training.run_folder import read_metrics
from tests.faults_test import TRAIN

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 4
BATCH_SIZE = 8
TARGET_LENGTH = 11

# The command `codet5p`; once it has begun, what is planted in this process.
PROGRAM = """
import sys
from codet5p_jax import main

planted, begin = sys.argv.pop(1), main._speak_for_ourselves

def begin_and_plant():
  begin()
  exec(planted, {})

main._speak_for_ourselves = begin_and_plant
sys.exit(main.main())
"""


def train_command(run_dir, corpus):
  return [
      *TRAIN, f'DATA_DIR={corpus}', f'RUN_DIR={run_dir}',
      f'BATCH_SIZE={BATCH_SIZE}', f'TARGET_LENGTH={TARGET_LENGTH}',
      'EVALUATE_EVERY=3', 'CHECKPOINT_EVERY=1',
      '--gin.train.evaluation_batch_count=None',
  ]  # fmt: skip


def run_processes(command, num_processes, cpu_flags, planted=None):
  """Runs the command `codet5p` in so many processes.

  Args:
    command: with its arguments.
    num_processes: that share the devices.
    cpu_flags: XLA's.
    planted: {process id: what it executes}.

  Returns:
    The status of each, and what each of them printed.
  """
  with socket.create_server(('', 0)) as server:
    address = f'localhost:{server.getsockname()[1]}'
  flags = re.sub(
      'device_count=[0-9]+',
      f'device_count={DEVICES // num_processes}',
      cpu_flags,
  )
  with contextlib.ExitStack() as stack:
    processes = [
        stack.enter_context(
            subprocess.Popen(
                [sys.executable, '-c', PROGRAM,
                 (planted or {}).get(process_id, ''), *command,
                 f'--coordinator_address={address}',
                 f'--num_processes={num_processes}',
                 f'--process_id={process_id}'],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env={**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)},
            )
        )
        for process_id in range(num_processes)
    ]  # fmt: skip
    for process in processes:
      stack.callback(process.kill)
    printed = [process.communicate(timeout=400)[1] for process in processes]
  return [process.returncode for process in processes], printed


# What fills the disk at the checkpoint of step 2, in one process alone. The
# other ends a moment later, not when it has waited long enough.
FULL_FOR = {
    0: """
import errno, os, sys, time
from codet5p_jax.training.checkpoints import save
write_checksums = save.write_checksums
def write(folder, **options):
  if folder.name.startswith('2'):
    print('full at', time.time(), file=sys.stderr)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  write_checksums(folder, **options)
save.write_checksums = write
""",
    1: """
import resource, sys, time
from codet5p_jax.training.checkpoints.save import Checkpoints
save = Checkpoints.save
def save_on_full_disk(self, step, *rest):
  if step == 2:
    print('full at', time.time(), file=sys.stderr)
    limit = (500, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  save(self, step, *rest)
Checkpoints.save = save_on_full_disk
""",
}
SOON = """
from codet5p_jax.training import distributed
distributed._LISTEN_SECONDS, distributed._ORDERLY_SECONDS = 0.1, 1.0
"""


@dataclasses.dataclass(frozen=True)
class Failure:
  """A start of a run that found the disk full.

  Attributes:
    culprit: the process that found it.
    statuses: of both processes.
    printed: by each.
    seconds: from then to the end of both.
    steps: checkpoints that it left.
  """

  culprit: int
  statuses: list[int]
  printed: list[str]
  seconds: float
  steps: list[int]


@pytest.fixture(scope='module')
def failures():
  """Fails a run of two processes; of each start what came of it."""
  return []


@pytest.fixture(scope='module')
def runs(small_corpus, tmp_path_factory, failures, cpu_flags):
  """{number of processes: the folder of their run}; that of two failed."""
  folders = {}
  for num_processes in (1, 2, 4):
    folder = tmp_path_factory.mktemp('runs') / f'of_{num_processes}'
    command = train_command(folder, small_corpus)
    for culprit in (0, 1) if num_processes == 2 else ():
      planted = {0: SOON, 1: SOON}
      planted[culprit] += FULL_FOR[culprit]
      statuses, printed = run_processes(command, 2, cpu_flags, planted)
      [full_at] = re.findall('full at (.*)', printed[culprit])
      failures.append(
          Failure(
              culprit,
              statuses,
              printed,
              time.time() - float(full_at),
              committed_steps(folder / 'checkpoints'),
          )
      )
    statuses, printed = run_processes(command, num_processes, cpu_flags)
    # Threads that wait for others end with the program, without a signal.
    assert statuses == [0] * num_processes, printed
    folders[num_processes] = folder
  return folders


def rows(folder, kind):
  """{step: {metric: number}} of the metrics that tell no time."""
  told = [
      (row['step'], {k: v for k, v in row.items() if '/' in k or k in REPEATED})
      for row in read_metrics(folder / 'metrics.jsonl')
      if row['kind'] == kind
  ]
  assert len(dict(told)) == len(told), 'a row is there twice'
  return dict(told)


REPEATED = ('grad_norm', 'learning_rate')


@pytest.mark.parametrize('num_processes', [2, 4])
@pytest.mark.parametrize(
    ('kind', 'steps', 'tolerance'),
    [('train', [1, 2, 3], 1e-5), ('evaluation', [3], 1e-6)],
)
def test_metrics_do_not_depend_on_the_number_of_processes(
    runs, num_processes, kind, steps, tolerance
):
  expected, found = rows(runs[1], kind), rows(runs[num_processes], kind)
  assert list(expected) == list(found) == steps
  for step in steps:
    assert expected[step].keys() == found[step].keys()
    for name, value in expected[step].items():
      assert found[step][name] == pytest.approx(value, rel=tolerance), name


def test_no_number_of_processes_divides_what_is_evaluated(runs):
  tokens = rows(runs[1], 'evaluation')[3]['causal_lm/tokens']
  num_rows, rest = divmod(tokens, TARGET_LENGTH - 1)  # <s> is no target.
  assert rest == 0
  assert num_rows % 2 == 1 and num_rows > BATCH_SIZE


@pytest.mark.parametrize('num_processes', [1, 2, 4])
def test_one_process_writes(runs, num_processes):
  folder = runs[num_processes]
  starts = 3 if num_processes == 2 else 1
  assert len(list((folder / 'events').iterdir())) == starts
  assert not list(folder.glob('.*'))
  left = {path.name for path in folder.iterdir()}
  assert left == {path.name for path in runs[1].iterdir()}


@pytest.mark.parametrize('num_processes', [2, 4])
def test_what_several_processes_saved_serves_one(runs, num_processes):
  for step in (2, 3):
    verify(runs[num_processes] / 'checkpoints' / str(step))
  expected, found = (
      load_trained_model(str(runs[n])).all_params for n in (1, num_processes)
  )
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected
  )


@pytest.mark.parametrize('culprit', [0, 1])
def test_a_save_that_fails_in_one_process_ends_all(runs, failures, culprit):
  failure = failures[culprit]
  assert (failure.culprit, failure.statuses) == (culprit, [2, 2])
  assert failure.seconds < 30
  words = ('No space left on device', 'File too large')[culprit]
  for told in failure.printed:
    assert 'Traceback' not in told
    [line] = [x for x in told.split('\n') if x.startswith('codet5p: ')]
    assert f'cannot write checkpoint {runs[2]}/checkpoints/2: {words}' in line
    assert 'then go on from step 1' in line
  other = failure.printed[1 - culprit]
  assert f'expected process {culprit} on ' in other
  assert failure.steps == [1]
