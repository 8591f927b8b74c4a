import concurrent.futures
import errno
import functools
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.training.checkpoints import save as save_module
from codet5p_jax.training.checkpoints import steps as steps_module
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.checkpoints.verify import (
    BOOKKEEPING,
    DamagedCheckpoint,
    verify,
)
from codet5p_jax.training.train_step import TrainState

FROZEN = {'frozen_fingerprint': 'f' * 64}


def _save(
    folder, states, *steps, max_to_keep=None, keep_every=None, **layout
):
  with Checkpoints(
      folder, max_to_keep=max_to_keep, keep_every=keep_every
  ) as checkpoints:
    for step in steps:
      state = states.make(step=step, frozen=False, **layout)
      checkpoints.save(step, state, {'row': step}, {})


def test_frozen_parameters_are_never_saved(states, tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(7, states.make(), {}, FROZEN)
    checkpoints.wait_until_finished()
    arrays = checkpoints.metadata(7)['arrays']
  assert not [path for path in arrays if 'head' in path]
  described = {
      path: {key: entry[key] for key in ('shape', 'dtype')}
      for path, entry in arrays.items()
  }
  assert described['trainable/encoder/layers_1/attention/kernel'] == {
      'shape': [8, 4, 5],
      'dtype': 'float32',
  }
  assert described['optimizer/1/0/count'] == {'shape': [], 'dtype': 'int32'}
  assert arrays['objective_state/contrastive/queue']['dtype'] == 'bfloat16'


def test_json_items_carry_their_format_version(states, tmp_path):
  _save(tmp_path, states, 2)
  for path in ('cursor/metadata', 'metadata/metadata', 'checksums.json'):
    content = json.loads((tmp_path / '2' / path).read_text())
    assert content['format_version'] == 1


def test_only_the_newest_steps_are_kept(states, tmp_path):
  _save(tmp_path, states, 1, 2, 3, max_to_keep=2)
  _save(tmp_path, states, 4, max_to_keep=2)
  assert Checkpoints(tmp_path).steps() == [3, 4]
  for step in (3, 4):
    verify(tmp_path / str(step))


def test_every_nth_step_is_kept_for_good(states, tmp_path):
  _save(tmp_path, states, 1, 3, 4, max_to_keep=1, keep_every=3)
  _save(tmp_path, states, 6, 8, max_to_keep=1, keep_every=3)
  assert Checkpoints(tmp_path).steps() == [3, 6, 8]
  with pytest.raises(UserError, match='every 1 or more steps, found 0'):
    Checkpoints(tmp_path, keep_every=0)


def test_each_save_is_told_in_one_line(states, tmp_path, caplog):
  caplog.set_level(logging.INFO, 'codet5p_jax')
  told = []
  with Checkpoints(
      tmp_path, tell=lambda event, **details: told.append((event, details))
  ) as checkpoints:
    checkpoints.save(7, states.make(), {}, FROZEN)
    assert not told
    checkpoints.wait_until_finished()
    checkpoints.save(8, states.make(step=8, frozen=False), {}, {})
  on_disk = sum(
      path.stat().st_size
      for path in (tmp_path / '7').rglob('*')
      if path.is_file()
  )
  (event, cost), (_, later) = told
  assert (event, cost['step'], cost['bytes']) == ('checkpoint', 7, on_disk)
  assert 0 < cost['waited_seconds'] < cost['seconds']
  assert later['step'] == 8
  first, second = [
      record.message for record in caplog.records
      if record.name.startswith('codet5p_jax')
  ]
  assert first == (
      f'Checkpoint of step 7: {on_disk / 1e6:.1f} MB in {cost["seconds"]:.2f} '
      f's, of which training waited {cost["waited_seconds"]:.2f} s (frozen '
      f'parameters are not in it).'
  )
  assert re.fullmatch(
      r'Checkpoint of step 8: 0\.\d MB in \d+\.\d\d s, of which training '
      r'waited \d+\.\d\d s\.', second
  )


@pytest.fixture
def save_otherwise(states, tmp_path, monkeypatch):
  """Gives Orbax other parameters than those that step 2 has.

  The function takes the checkpoints and what changes the parameters, and
  returns the words of the error.
  """
  _save(tmp_path, states, 1, max_to_keep=1)
  save_arrays = save_module.ocp.args.StandardSave

  def save(checkpoints, change):
    def save_changed(tree):
      return save_arrays(change(tree) if 'encoder' in tree else tree)

    with monkeypatch.context() as patch:
      patch.setattr(save_module.ocp.args, 'StandardSave', save_changed)
      checkpoints.save(2, states.make(step=2, frozen=False), {}, {})
      with pytest.raises(DamagedCheckpoint) as raised:
        checkpoints.wait_until_finished()
    return str(raised.value)

  return save


def test_a_save_that_lacks_an_array_is_never_committed(
    states, tmp_path, save_otherwise
):
  def forget(tree):
    tree = {**tree, 'encoder': {**tree['encoder']}}
    del tree['encoder']['layers_1']
    return tree

  checkpoints = Checkpoints(tmp_path, max_to_keep=1)
  assert save_otherwise(checkpoints, forget) == (
      f'checkpoint {tmp_path}/2 is damaged: for '
      f'trainable/encoder/layers_1/attention/kernel Orbax wrote nothing '
      f"instead of {{'shape': [8, 4, 5], 'dtype': 'float32'}}; it was not "
      f'committed, go on from step 1'
  )
  assert checkpoints.steps() == [1]
  checkpoints.save(2, states.make(step=2, frozen=False), {}, {})
  checkpoints.close()
  assert checkpoints.steps() == [2]


@pytest.mark.parametrize(
    ('change', 'fault'),
    [
        (lambda x: x.at[1].add(1), 'has other numbers than were saved'),
        (lambda x: x[::-1], 'has its numbers in other places than were saved'),
    ],
)
def test_a_save_of_other_numbers_is_never_committed(
    tmp_path, save_otherwise, change, fault
):
  """As if they had changed on their way from the device to the disk."""

  def confuse(tree):
    norm = tree['encoder']['layers_1']['norm']
    norm['scale'] = jax.device_put(
        change(norm['scale']), norm['scale'].sharding
    )
    return tree

  checkpoints = Checkpoints(tmp_path, max_to_keep=1)
  # Orbax lists what it was given, and finds nothing wrong.
  assert save_otherwise(checkpoints, confuse) == (
      f'checkpoint {tmp_path}/2 is damaged: '
      f'trainable/encoder/layers_1/norm/scale {fault}; it was not committed, '
      f'go on from step 1'
  )
  assert checkpoints.steps() == [1]
  verify(tmp_path / '1')


def test_all_of_a_step_outlives_a_power_cut_before_the_one_before_goes(
    states, tmp_path, monkeypatch
):
  _save(tmp_path, states, 1, max_to_keep=1)
  synced = {True: set(), False: set()}  # While step 1 is there, and after.
  fsync = os.fsync

  def watch(descriptor):
    path = os.readlink(f'/proc/self/fd/{descriptor}')
    name = os.path.relpath(path, tmp_path)
    # As it is going to be called.
    name = re.sub(r'^2\.orbax-checkpoint-tmp[^/]*', '2', name)
    name = re.sub(r'\.(checksums\.json)\.\w+$', r'\1', name)
    synced[(tmp_path / '1').exists()].add(name)
    fsync(descriptor)

  monkeypatch.setattr(os, 'fsync', watch)
  _save(tmp_path, states, 2, max_to_keep=1)
  assert Checkpoints(tmp_path).steps() == [2]
  written = {
      path.relative_to(tmp_path).as_posix()
      for path in [tmp_path / '2', *(tmp_path / '2').rglob('*')]
  }
  # Orbax writes these when it has renamed all; a step does without.
  records = {f'2/{name}' for name in BOOKKEEPING}
  assert written > records
  assert synced[True] >= written - records
  assert synced[False] >= records | {'2', '.'}


def test_a_disk_that_forgets_is_found_at_once(states, tmp_path, monkeypatch):
  complete = save_module.complete_checksums

  def lose(folder):
    complete(folder)
    (folder / 'trainable' / 'manifest.ocdbt').write_bytes(b'')

  monkeypatch.setattr(save_module, 'complete_checksums', lose)
  told = []
  checkpoints = Checkpoints(tmp_path, tell=lambda *event: told.append(event))
  checkpoints.save(7, states.make(), {}, FROZEN)
  concurrent.futures.wait([checkpoints._commit])
  with pytest.raises(DamagedCheckpoint) as raised:
    checkpoints.check_for_errors()
  assert f'{tmp_path}/7 is damaged: trainable/manifest.ocdbt has 0 bytes' in (
      str(raised.value)
  )
  assert 'check the disk; a run that starts again goes on' in str(raised.value)
  assert not told
  checkpoints.close()  # Raises it no second time.


def test_a_save_waits_for_threads_that_a_failed_one_left(states, tmp_path):
  left = tmp_path / '1.orbax-checkpoint-tmp'

  def write():
    for number in range(100):
      left.mkdir(exist_ok=True)
      (left / str(number)).write_text('left')
      time.sleep(0.002)

  thread = threading.Thread(target=write)
  thread.start()
  while not left.exists():
    time.sleep(0.001)
  _save(tmp_path, states, 2)
  thread.join()
  _save(tmp_path, states, 3)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '3']


def test_what_cannot_be_removed_is_one_line(states, tmp_path, monkeypatch):
  (tmp_path / '1.orbax-checkpoint-tmp').mkdir()
  monkeypatch.setattr(save_module, 'remove_unfinished', functools.partial(
      save_module.remove_unfinished, patience=0.1))

  def refuse(path):
    raise PermissionError(errno.EACCES, 'Permission denied', str(path))

  with monkeypatch.context() as patch:
    patch.setattr(steps_module.shutil, 'rmtree', refuse)
    with pytest.raises(UserError, match='Permission denied') as error:
      _save(tmp_path, states, 2)
  assert '\n' not in str(error.value)


def test_reading_creates_nothing(tmp_path):
  with Checkpoints(tmp_path / 'none') as checkpoints:
    assert checkpoints.latest_step() is None
    assert checkpoints.steps() == []
    checkpoints.check_for_errors()
  assert not (tmp_path / 'none').exists()


def test_saving_runs_beside_the_training(states, tmp_path, monkeypatch):
  may_go_on = threading.Event()
  write_checksums = save_module.write_checksums

  def wait_and_write(*args, **kwargs):
    assert may_go_on.wait(20)
    write_checksums(*args, **kwargs)

  monkeypatch.setattr(save_module, 'write_checksums', wait_and_write)
  state = states.make(step=1, frozen=False)
  host = jax.tree.map(lambda x: np.array(x, copy=True), state)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {}, {})
    checkpoints.check_for_errors()
    assert checkpoints.latest_step() is None
    # The next step overwrites the buffers while they are still being written.
    spoil = jax.jit(
        lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0
    )
    jax.block_until_ready(spoil(state))
    may_go_on.set()
    checkpoints.wait_until_finished()
    target = states.abstract(step=1, frozen=False)
    restored, _, _ = checkpoints.restore(1, target)
  states.assert_identical(restored, host)


def test_a_step_is_saved_once_and_in_order(states, tmp_path):
  _save(tmp_path, states, 5)
  for step in (3, 5):
    with pytest.raises(UserError, match=f'step {step} or later, found step 5'):
      _save(tmp_path, states, step)


def test_contradictions_are_found_before_anything_is_written(
    states, tmp_path
):
  checkpoints = Checkpoints(tmp_path / 'steps')
  state = states.make()
  for arguments, message in (
      ((8, state, {}, FROZEN), 'state.step is 7'),
      ((7, state, {}, {}), 'frozen_fingerprint if, and only if'),
      ((7, states.make(frozen=False), {}, FROZEN), 'if, and only if'),
      ((7, state, {'format_version': 1}, FROZEN), 'reserved key'),
      ((7, state, {}, {**FROZEN, 'arrays': 1}), 'reserved keys'),
  ):
    with pytest.raises(ValueError, match=message):
      checkpoints.save(*arguments)
  with pytest.raises(TypeError, match='not JSON serializable'):
    checkpoints.save(7, state, {'row': np.int64(3)}, FROZEN)
  with pytest.raises(UserError, match='at least 1'):
    Checkpoints(tmp_path, max_to_keep=0)
  with pytest.raises(UserError, match='mount'):
    Checkpoints('gs://bucket/run')
  assert not (tmp_path / 'steps').exists()


def test_arrays_of_one_process_are_refused_among_several(
    states, tmp_path, monkeypatch
):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match='over all processes at trainable/'):
    Checkpoints(tmp_path).save(7, states.make(), {}, FROZEN)


# Orbax leaves callbacks behind whose event loop is closed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_full_disk_is_one_line_and_leaves_earlier_steps_whole(
    states, tmp_path, monkeypatch
):
  """A limit on file size is met like a full disk, and needs no mount."""
  # A module compiled under the limit would be cached cut off, for all to read.
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  _save(tmp_path, states, 1, max_to_keep=1)
  checkpoints = Checkpoints(tmp_path, max_to_keep=1)
  state = states.make(step=2, frozen=False)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    checkpoints.save(2, state, {}, {})
    with pytest.raises(UserError) as raised:
      checkpoints.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert str(raised.value) == (
      f'cannot write checkpoint {tmp_path}/2: File too large; free space or '
      f'mend its permissions, then go on from step 1'
  )
  assert checkpoints.steps() == [1]
  verify(tmp_path / '1')
  # With space again, the same object saves the same step.
  checkpoints.save(2, state, {}, {})
  checkpoints.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['2']
  verify(tmp_path / '2')


@pytest.mark.parametrize('late_call', ['save', 'check_for_errors', 'close'])
def test_background_errors_surface_at_the_next_call_and_once(
    states, tmp_path, monkeypatch, late_call
):
  failed = threading.Event()

  def fail(*args, **kwargs):
    failed.set()
    raise OSError(28, 'ignored')

  state = states.make(step=3, frozen=False)
  with Checkpoints(tmp_path) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(save_module, 'write_checksums', fail)
      checkpoints.save(3, state, {}, {})
      assert failed.wait(20)
      concurrent.futures.wait([checkpoints._commit])
    call = getattr(checkpoints, late_call)
    arguments = (4, states.make(step=4), {}, FROZEN)
    with pytest.raises(UserError, match='No space left.*go on from the start'):
      call(*(arguments if late_call == 'save' else ()))
    assert checkpoints.latest_step() is None
    checkpoints.save(3, state, {}, {})
  assert checkpoints.latest_step() == 3


def test_a_folder_that_cannot_be_made_is_one_line(states, tmp_path):
  (tmp_path / 'file').touch()
  checkpoints = Checkpoints(tmp_path / 'file' / 'steps')
  with pytest.raises(UserError, match='/7: Not a directory; free space or'):
    checkpoints.save(7, states.make(), {}, FROZEN)
  checkpoints.close()


def test_other_errors_are_not_disguised(states, tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise RuntimeError('a mistake of ours')

  monkeypatch.setattr(save_module, 'write_checksums', fail)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(7, states.make(), {}, FROZEN)
  with pytest.raises(RuntimeError, match='a mistake of ours'):
    checkpoints.wait_until_finished()


KILLED_IN_STEP_2 = """
import sys, time
import numpy as np
from codet5p_jax.training.checkpoints import save
from codet5p_jax.training.train_step import TrainState

def state(step):
  params = {'layers': {'scale': np.full((3, 5), step, np.float32)}}
  return TrainState(np.int32(step), params, {}, {}, {})

with save.Checkpoints(sys.argv[1]) as checkpoints:
  checkpoints.save(1, state(1), {'row': 1}, {})
  checkpoints.wait_until_finished()
  def hang(*args, **kwargs):
    print('arrays of step 2 are written', flush=True)
    time.sleep(60)
  save.write_checksums = hang
  checkpoints.save(2, state(2), {'row': 2}, {})
"""


def test_a_killed_save_leaves_the_step_before(tmp_path):
  process = subprocess.Popen(
      [sys.executable, '-c', KILLED_IN_STEP_2, str(tmp_path)],
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  with process:
    line = process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
  assert line == 'arrays of step 2 are written\n'
  assert any('orbax-checkpoint-tmp' in path.name for path in tmp_path.iterdir())

  def state(step):
    params = {'layers': {'scale': jnp.full((3, 5), step, jnp.float32)}}
    return TrainState(jnp.int32(step), params, {}, {}, {})

  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 1
    restored, cursor, _ = checkpoints.restore(None, state(0))
    assert (int(restored.step), cursor) == (1, {'row': 1})
    assert restored.params['layers']['scale'].tolist() == [[1.0] * 5] * 3
    checkpoints.save(2, state(2), {}, {})
  assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '2']


KILLED_AT_RANDOM = """
import os, random, signal, sys, time
import numpy as np
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.train_step import TrainState

def state(step):
  params = {'layers': {'scale': np.full((3, 5), step, np.float32)}}
  return TrainState(np.int32(step), params, {}, {}, {})

def save_for_ever(folder, pipe):
  checkpoints = Checkpoints(folder, max_to_keep=2)
  for step in range(1, 10**6):
    checkpoints.save(step, state(step), {'row': step}, {})
    checkpoints.wait_until_finished()
    os.write(pipe, b'%d ' % step)

chance = random.Random(5)
for number in range(5):
  reader, writer = os.pipe()
  # JAX has started nothing yet, so that all can share what was imported.
  child = os.fork()
  if child == 0:
    save_for_ever(f'{sys.argv[1]}/{number}', writer)
  os.close(writer)
  with open(reader, 'rb') as pipe:
    said = pipe.read(1)  # All is compiled.
    time.sleep(chance.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print((said + pipe.read()).split()[-1].decode(), flush=True)
"""


def test_a_save_killed_at_any_moment_leaves_the_step_before_or_its_own(
    tmp_path, caplog
):
  done = subprocess.run(
      [sys.executable, '-c', KILLED_AT_RANDOM, str(tmp_path)],
      capture_output=True,
      text=True,
      check=True,
      timeout=240,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
  )
  told = [int(word) for word in done.stdout.split()]
  assert len(told) == 5

  def state(step):
    params = {'layers': {'scale': jnp.full((3, 5), step, jnp.float32)}}
    return TrainState(jnp.int32(step), params, {}, {}, {})

  for number, step_told in enumerate(told):
    with Checkpoints(tmp_path / str(number)) as checkpoints:
      restored, cursor, _ = checkpoints.resume(state(0))
      step = int(restored.step)
      # The last one may have been killed before it could tell.
      assert step in (step_told, step_told + 1)
      assert cursor == {'row': step}
      assert restored.params['layers']['scale'].tolist() == [[step] * 5] * 3
      checkpoints.save(step + 1, state(step + 1), {}, {})
    assert checkpoints.latest_step() == step + 1
  assert not [x for x in caplog.records if x.levelno >= logging.WARNING]
