"""Two processes on CPU that share a folder of checkpoints."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.training.checkpoints import agreement
from codet5p_jax.training.checkpoints.agreement import raising_together
from codet5p_jax.training.checkpoints.verify import DamagedCheckpoint

PROGRAM = """
import json, logging, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

address, index = sys.argv[1], int(sys.argv[2])
folder = pathlib.Path(sys.argv[3])
jax.distributed.initialize(address, 2, index)

from codet5p_jax.errors import UserError
from codet5p_jax.training.checkpoints import restore
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.train_step import TrainState

told, lines = {}, []
class Keep(logging.Handler):
  def emit(self, record):
    lines.append(record.getMessage())
logging.getLogger('codet5p_jax').addHandler(Keep(logging.WARNING))

mesh = Mesh(np.array(jax.devices()), ('data',))

def place(array, spec):
  return jax.make_array_from_callback(
      array.shape, NamedSharding(mesh, spec), lambda index: array[index])

def state(step):
  kernel = np.arange(8 * 3, dtype=np.float32).reshape(8, 3) + step
  stack = np.arange(2 * 4 * 5, dtype=np.float32).reshape(2, 4, 5) * step
  return TrainState(
      place(np.int32(step), PartitionSpec()),
      {'kernel': place(kernel, PartitionSpec('data', None)),
       'layers': {'kernel': place(stack, PartitionSpec(None, 'data', None))}},
      {}, {}, {})

def on_first(action):
  multihost_utils.sync_global_devices('before')
  if index == 0:
    action()
  multihost_utils.sync_global_devices('after')

def attempt(name):
  lines.clear()
  try:
    restored, cursor, _ = checkpoints.resume(state(0))
    parts = [s.data for s in restored.params['kernel'].addressable_shards]
    found = [int(restored.step), cursor['row'], float(parts[0][0, 0])]
  except UserError as error:
    found = str(error)
  told[name] = [found, checkpoints.steps(), list(lines)]

checkpoints = Checkpoints(folder, max_to_keep=9)
for step in (1, 2, 3, 4, 5):
  checkpoints.save(step, state(step), {'row': step}, {})
checkpoints.wait_until_finished()
attempt('whole')
on_first(lambda: (folder / '5/cursor/metadata').unlink())
attempt('damaged')

read_leaves = restore.read_leaves
def refuse(item, targets):
  if index == 1 and item.parent.name == '4':
    raise ValueError('DATA_LOSS: as only one process reads it')
  return read_leaves(item, targets)
restore.read_leaves = refuse
attempt('unreadable for process 1')

metadata = folder / '3/metadata/metadata'
def renew():
  from codet5p_jax.training.checkpoints.verify import write_checksums
  content = json.loads(metadata.read_text())
  content['arrays']['trainable/layers_1/kernel']['sums'][0] += 1
  metadata.write_text(json.dumps(content))
  write_checksums(folder / '3')
on_first(renew)
attempt('another content')

checkpoints.save(7, state(7), {'row': 7}, {})
checkpoints.close()
attempt('saved again')

def lose():
  for step in (1, 2, 7):
    (folder / f'{step}/checksums.json').unlink()
on_first(lose)
attempt('none is whole')
pathlib.Path(f'{folder}.{index}.json').write_text(json.dumps(told))
"""


@pytest.fixture(scope='module')
def attempts(tmp_path_factory):
  """{what was tried: what each of two processes found}, and the folder."""
  folder = tmp_path_factory.mktemp('shared') / 'checkpoints'
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  environment = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
  }
  processes = [
      subprocess.Popen(
          [sys.executable, '-c', PROGRAM, address, str(index), str(folder)],
          stdout=subprocess.DEVNULL,
          stderr=subprocess.PIPE,
          text=True,
          env=environment,
      )
      for index in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, errors) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, errors
  first, second = (
      json.loads(Path(f'{folder}.{index}.json').read_text())
      for index in range(2)
  )
  return folder, {name: (first[name], second[name]) for name in first}


def test_processes_restore_the_same_step(attempts):
  _, found = attempts
  first, second = found['whole']
  # Kernels of 8 rows over 4 devices: process 1 begins with row 4.
  assert first == [[5, 5, 5.0], [1, 2, 3, 4, 5], []]
  assert second == [[5, 5, 17.0], [1, 2, 3, 4, 5], []]


def test_what_process_0_finds_damaged_all_leave_and_one_tells(attempts):
  folder, found = attempts
  first, second = found['damaged']
  assert first[:2] == [[4, 4, 4.0], [1, 2, 3, 4]]
  assert second[:2] == [[4, 4, 16.0], [1, 2, 3, 4]]
  assert first[2] == [
      f'Checkpoint {folder}/5 is damaged: cursor/metadata is missing; it was '
      f'put into {folder}/damaged/5, and step 4 is used instead.'
  ]
  assert second[2] == []


def test_what_process_1_cannot_read_all_leave(attempts):
  folder, found = attempts
  first, second = found['unreadable for process 1']
  assert (first[0][0], second[0][0]) == (3, 3)
  assert first[1] == second[1] == [1, 2, 3]
  [line] = first[2]
  assert f'{folder}/4 is damaged: trainable cannot be read (Valu' in line
  assert 'as only one process reads it' in line


def test_content_is_compared_over_all_processes(attempts):
  _, found = attempts
  first, second = found['another content']
  assert (first[0][0], second[0][0]) == (2, 2)
  [line] = first[2]
  assert 'trainable/layers_1/kernel has other numbers than were saved' in line


def test_a_run_goes_on_and_ends_alike_on_all(attempts):
  folder, found = attempts
  for rest in found['saved again']:
    assert rest[0][:2] == [7, 7] and rest[1] == [1, 2, 7]
  first, second = found['none is whole']
  assert first == second
  assert first[0].startswith(f'expected a whole checkpoint in {folder}, found ')
  assert 'step 7: checksums.json is missing, so it is half-written' in first[0]
  assert first[1:] == [[1, 2, 7], []]
  kept = sorted(path.name for path in (folder / 'damaged').iterdir())
  assert kept == ['3', '4', '5']


# What needs no processes.


@pytest.fixture
def seen(monkeypatch):
  """Makes this one of three processes; returns what the others say."""
  said = {}

  def gather(mine):
    texts = [agreement._encode(said.get(process)) for process in range(3)]
    return [texts[0], mine, texts[2]]

  monkeypatch.setattr(agreement.jax, 'process_count', lambda: 3)
  monkeypatch.setattr(agreement.jax, 'process_index', lambda: 1)
  monkeypatch.setattr(agreement, 'gather_texts', gather)
  return said


def test_the_error_of_the_first_process_is_raised_by_all(seen):
  folder = Path('/run/checkpoints/5')
  with raising_together(folder):
    pass
  seen[2] = UserError('expected one thing')
  with pytest.raises(UserError, match='^expected one thing$') as raised:
    with raising_together(folder):
      pass
  assert not isinstance(raised.value, DamagedCheckpoint)
  mine = UserError('mine')
  with pytest.raises(UserError) as raised:
    with raising_together(folder):
      raise mine
  assert raised.value is mine
  seen[0] = DamagedCheckpoint(folder, 'a is missing')
  with pytest.raises(DamagedCheckpoint) as raised:
    with raising_together(folder):
      raise mine
  assert (raised.value.folder, raised.value.fault) == (folder, 'a is missing')


def test_other_errors_pass_at_once(seen, monkeypatch):
  monkeypatch.setattr(agreement, 'gather_texts', None)
  with pytest.raises(ZeroDivisionError):
    with raising_together(Path('/run')):
      raise ZeroDivisionError
