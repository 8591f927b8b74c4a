"""Every kind of damage to the newest checkpoint of a run.

Each is noticed, the checkpoint before is used, the damaged one is kept aside
as it is, and one line says so.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.training.checkpoints import restore as restore_module
from codet5p_jax.training.checkpoints import save as save_module
from codet5p_jax.training.checkpoints import verify as verify_module
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.checkpoints.verify import (
    BOOKKEEPING,
    CHECKSUMS,
    DamagedCheckpoint,
    write_checksums,
)
from tests.training.checkpoints.damages import (
    CASES,
    NEW,
    OLD,
    delete,
    empty,
    flip_a_bit,
    truncate,
)

# Few parts to read: a case takes as long as they do.
LAYOUT = {'frozen': False, 'mesh_shape': (1, 1, 2)}


@pytest.fixture(scope='module')
def saved(states, tmp_path_factory):
  """Two steps; not to be changed."""
  folder = tmp_path_factory.mktemp('saved') / 'checkpoints'
  with Checkpoints(folder) as checkpoints:
    for step in (OLD, NEW):
      state = states.make(step=step, **LAYOUT)
      checkpoints.save(step, state, {'row': step}, {})
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  """A copy of them, to be damaged."""
  return Path(
      shutil.copytree(
          saved, tmp_path / 'checkpoints', copy_function=shutil.copyfile
      )
  )


@pytest.fixture
def told(caplog):
  """Returns the lines that were logged by this package as warnings."""
  return lambda: [
      record.message for record in caplog.records
      if record.name.startswith('codet5p_jax') and record.levelname == 'WARNING'
  ]


def content(path: Path) -> dict[str, str]:
  """Everything below a path, or the path itself."""
  return {
      found.relative_to(path).as_posix(): (
          hashlib.sha256(found.read_bytes()).hexdigest()
          if found.is_file() else 'no file'
      )
      for found in [path, *path.rglob('*')]
  }


def test_there_are_more_than_fifty_kinds_of_damage():
  assert len(CASES) >= 100


# Orbax leaves callbacks behind whose event loop is closed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('kind', CASES)
def test_damage_is_noticed_told_and_kept_aside(states, folder, told, kind):
  damage, words = CASES[kind]
  before = content(folder / str(OLD))
  whole = content(folder / str(NEW))
  damage(folder / str(NEW))
  damaged = content(folder / str(NEW))
  assert damaged != whole, 'the case damages nothing'

  with Checkpoints(folder) as checkpoints:
    state, cursor, _ = checkpoints.resume(
        states.abstract(step=OLD, **LAYOUT)
    )
    assert checkpoints.steps() == [OLD]

  assert cursor == {'row': OLD}
  assert int(state.step) == OLD
  assert content(folder / str(OLD)) == before
  assert content(folder / 'damaged' / str(NEW)) == damaged
  [line] = told()
  assert line.startswith(f'Checkpoint {folder}/{NEW} is damaged: ')
  assert words in line
  assert line.endswith(
      f'; it was put into {folder}/damaged/{NEW}, and step {OLD} is used '
      f'instead.'
  )
  assert '\n' not in line


def test_what_is_used_instead_is_the_old_state(states, folder):
  (folder / f'{NEW}/cursor/metadata').unlink()
  state, _, metadata = Checkpoints(folder).resume(
      states.abstract(step=OLD, **LAYOUT)
  )
  states.assert_identical(state, states.make(step=OLD, **LAYOUT))
  assert metadata['step'] == OLD


def test_nothing_is_set_aside_from_a_whole_folder(states, folder, told):
  before = content(folder)
  state, _, _ = Checkpoints(folder).resume(
      states.abstract(step=NEW, **LAYOUT)
  )
  states.assert_identical(state, states.make(step=NEW, **LAYOUT))
  assert content(folder) == before
  assert not told()


def test_training_goes_on_and_may_be_damaged_again(states, folder, told):
  checkpoints = Checkpoints(folder, max_to_keep=2)
  target = states.abstract(step=OLD, **LAYOUT)
  for number in range(3):
    (folder / f'{NEW}/{CHECKSUMS}').unlink()
    assert int(checkpoints.resume(target)[0].step) == OLD
    assert len(told()) == number + 1
    state = states.make(step=NEW, **LAYOUT)
    checkpoints.save(NEW, state, {'row': 5}, {})
    checkpoints.wait_until_finished()
  checkpoints.close()
  assert checkpoints.steps() == [OLD, NEW]
  kept = sorted(path.name for path in (folder / 'damaged').iterdir())
  assert kept == [f'{NEW}', f'{NEW}-2', f'{NEW}-3']
  # They are no steps to any who counts.
  assert checkpoints.latest_step() == NEW
  checkpoints.save(20, states.make(step=20, **LAYOUT), {}, {})
  checkpoints.close()
  assert checkpoints.steps() == [NEW, 20]
  assert len(list((folder / 'damaged').iterdir())) == 3


def test_several_damaged_steps_are_set_aside_with_a_line_each(
    states, folder, told
):
  shutil.copytree(folder / f'{NEW}', folder / '12')
  (folder / f'{NEW}/{CHECKSUMS}').unlink()
  state, _, _ = Checkpoints(folder).resume(
      states.abstract(step=OLD, **LAYOUT)
  )
  assert int(state.step) == OLD
  twelfth, eleventh = told()
  assert f'{folder}/12 is damaged: metadata/metadata is that of' in twelfth
  assert f'{folder}/{NEW} is damaged: {CHECKSUMS} is missing' in eleventh
  assert all(f'step {OLD} is used instead' in line for line in told())


def test_where_none_is_whole_nothing_is_moved_and_nothing_starts_anew(
    states, folder, told
):
  for step in (OLD, NEW):
    (folder / f'{step}/cursor/metadata').unlink()
  before = content(folder)
  checkpoints = Checkpoints(folder)
  for _ in range(2):  # The second start must not find an empty folder.
    with pytest.raises(UserError) as raised:
      checkpoints.resume(states.abstract(**LAYOUT))
    assert str(raised.value) == (
        f'expected a whole checkpoint in {folder}, found damage in all (step '
        f'{NEW}: cursor/metadata is missing, step {OLD}: cursor/metadata is '
        f'missing); restore one from a copy, or move them away to start anew'
    )
  assert content(folder) == before
  assert not told()


def test_many_damaged_steps_are_counted(states, folder):
  (folder / f'{OLD}/{CHECKSUMS}').unlink()
  for step in (4, 5, 6):
    shutil.copytree(folder / f'{OLD}', folder / f'{step}')
  shutil.rmtree(folder / f'{NEW}')
  with pytest.raises(UserError, match=r'\(step 6: .*, step 4: .*, and 1 more'):
    Checkpoints(folder).resume(states.abstract(**LAYOUT))


def test_a_folder_of_damaged_checkpoints_is_not_that_of_a_new_run(folder):
  checkpoints = Checkpoints(folder)
  checkpoints.require_fresh()  # There are steps, and nothing was set aside.
  (folder / 'damaged').mkdir()
  for step in (OLD, NEW):
    (folder / f'{step}').rename(folder / 'damaged' / f'{step}')
  with pytest.raises(UserError, match=f'damaged ones alone, in {folder}/dam'):
    checkpoints.require_fresh()
  shutil.rmtree(folder / 'damaged')
  checkpoints.require_fresh()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'frozen': True}, 'frozen parameters with fingerprint'),
        ({'layers': 2}, '6 unexpected'),
        ({'newer': True}, 'format_version 1 or older'),
    ],
)
def test_what_does_not_fit_is_refused_and_never_set_aside(
    states, folder, told, changes, message
):
  changes = dict(changes)
  if changes.pop('newer', False):
    path = folder / f'{NEW}/metadata/metadata'
    text = json.loads(path.read_text())
    path.write_text(json.dumps({**text, 'format_version': 2}))
    write_checksums(folder / f'{NEW}')
  before = content(folder)
  target = states.abstract(**{**LAYOUT, **changes})
  fingerprint = 'f' * 64 if changes.get('frozen') else None
  with pytest.raises(UserError, match=message) as raised:
    Checkpoints(folder).resume(target, frozen_fingerprint=fingerprint)
  assert not isinstance(raised.value, DamagedCheckpoint)
  assert content(folder) == before
  assert not told()


def test_frozen_parameters_need_their_fingerprint(states, folder):
  with pytest.raises(ValueError, match='need their frozen_fingerprint'):
    Checkpoints(folder).resume(states.abstract())


def test_an_empty_folder_has_nothing_to_resume(states, tmp_path):
  with pytest.raises(UserError, match=r'expected a checkpoint in .* none; che'):
    Checkpoints(tmp_path).resume(states.abstract(**LAYOUT))


def test_memory_that_is_full_is_no_damage(states, folder, monkeypatch, told):
  before = content(folder)

  def exhaust(*unused):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

  monkeypatch.setattr(restore_module, 'read_leaves', exhaust)
  with pytest.raises(jax.errors.JaxRuntimeError):
    Checkpoints(folder).resume(states.abstract(**LAYOUT))
  assert content(folder) == before
  assert not told()


def refuse_to_open(number, monkeypatch):
  """Hashing a file fails."""

  def refuse(path, mode='r'):
    raise OSError(number, os.strerror(number), str(path))

  monkeypatch.setattr(verify_module, 'open', refuse, raising=False)


def refuse_to_list(number, monkeypatch):
  """Reading the names in one folder fails."""
  scandir = os.scandir

  def refuse(path='.'):
    if str(path).endswith(f'{NEW}/optimizer/d'):
      raise OSError(number, os.strerror(number), str(path))
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refuse)


def refuse_to_read(number, monkeypatch):
  """Reading JSON fails."""
  read_text = Path.read_text

  def refuse(path, **options):
    if path.parent.name == 'cursor':
      raise OSError(number, os.strerror(number), str(path))
    return read_text(path, **options)

  monkeypatch.setattr(Path, 'read_text', refuse)


def refuse_to_make_arrays(number, monkeypatch):
  """Orbax fails."""

  def refuse(item, targets):
    raise OSError(number, os.strerror(number), str(item))

  monkeypatch.setattr(restore_module, 'read_leaves', refuse)


@pytest.mark.parametrize('number', [errno.EMFILE, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize(
    'refuse',
    [refuse_to_open, refuse_to_list, refuse_to_read, refuse_to_make_arrays],
)
def test_what_this_machine_cannot_read_is_no_damage(
    states, folder, monkeypatch, told, refuse, number
):
  before = content(folder)
  with monkeypatch.context() as patch:
    refuse(number, patch)
    with pytest.raises(UserError) as raised:
      Checkpoints(folder).resume(states.abstract(step=OLD, **LAYOUT))
  assert not isinstance(raised.value, DamagedCheckpoint)
  line = str(raised.value)
  assert line.startswith('cannot read ') and f'{folder}/{NEW}' in line
  assert os.strerror(number) in line
  assert line.endswith('; mend that, and try again')
  assert content(folder) == before
  assert not told()


@pytest.mark.parametrize('number', [errno.EIO, errno.ELOOP])
@pytest.mark.parametrize('refuse', [refuse_to_open, refuse_to_list])
def test_what_the_disk_has_lost_is_damage(
    states, folder, monkeypatch, refuse, number
):
  with monkeypatch.context() as patch:
    refuse(number, patch)
    with pytest.raises(DamagedCheckpoint, match='a file cannot be read'):
      Checkpoints(folder).restore(NEW, states.abstract(step=OLD, **LAYOUT))


@pytest.mark.parametrize(
    'words', ['RESOURCE_EXHAUSTED: open files', 'PERMISSION_DENIED: \n"d/4"']
)
def test_what_tensorstore_says_of_the_machine_is_no_damage(
    states, folder, monkeypatch, told, words
):
  before = content(folder)

  def refuse(item, targets):
    raise ValueError(words)

  monkeypatch.setattr(restore_module, 'read_leaves', refuse)
  with pytest.raises(UserError) as raised:
    Checkpoints(folder).resume(states.abstract(step=OLD, **LAYOUT))
  assert str(raised.value) == (
      f'cannot read trainable of checkpoint {folder}/{NEW} (ValueError: '
      f'{" ".join(words.split())}); mend that, and try again'
  )
  assert not isinstance(raised.value, DamagedCheckpoint)
  assert content(folder) == before
  assert not told()


def test_what_cannot_be_moved_is_one_line(states, folder, monkeypatch):
  (folder / f'{NEW}/{CHECKSUMS}').unlink()

  def refuse(checkpoint):
    raise PermissionError(13, 'Permission denied', str(checkpoint))

  monkeypatch.setattr(save_module, 'set_aside', refuse)
  with pytest.raises(UserError) as raised:
    Checkpoints(folder).resume(states.abstract(step=OLD, **LAYOUT))
  assert str(raised.value) == (
      f'cannot set aside the damaged checkpoint {folder}/{NEW}: Permission '
      f'denied; mend the permissions of its folder, or move it away'
  )


def test_metadata_that_are_damaged_name_the_whole_step(folder):
  (folder / f'{NEW}/metadata/metadata').write_text('{')
  with pytest.raises(DamagedCheckpoint, match=f'{OLD} before it is whole;'):
    Checkpoints(folder).metadata(NEW)
  with pytest.raises(UserError, match=r'expected step 5 in .*steps \[3, 11\]'):
    Checkpoints(folder).metadata(5)


# Orbax rewrites its records of a step after the checksums were written; a
# process killed then leaves them unlisted. Nothing of a state is in them.


def forget_bookkeeping(step_dir: Path) -> None:
  text = json.loads((step_dir / CHECKSUMS).read_text())
  for name in BOOKKEEPING:
    del text['files'][name]
  (step_dir / CHECKSUMS).write_text(json.dumps(text))


@pytest.mark.parametrize('damage', [truncate, flip_a_bit, delete, empty])
@pytest.mark.parametrize('name', sorted(BOOKKEEPING))
def test_records_that_are_not_listed_are_not_needed(
    states, folder, told, name, damage
):
  forget_bookkeeping(folder / f'{NEW}')
  damage(folder / f'{NEW}' / name, name)
  checkpoints = Checkpoints(folder)
  state, _, _ = checkpoints.resume(states.abstract(step=NEW, **LAYOUT))
  states.assert_identical(state, states.make(step=NEW, **LAYOUT))
  assert not told()
  # Orbax itself refuses a folder with such a record.
  checkpoints.save(20, states.make(step=20, **LAYOUT), {}, {})
  checkpoints.close()
  assert checkpoints.steps() == [OLD, NEW, 20]
  assert not told()
  state, _, _ = checkpoints.restore(NEW, states.abstract(step=NEW, **LAYOUT))
  states.assert_identical(state, states.make(step=NEW, **LAYOUT))


@pytest.mark.parametrize('damage', ['record', 'file'])
def test_damage_of_an_older_step_does_not_stop_a_save(
    states, folder, told, damage
):
  if damage == 'record':
    (folder / f'{OLD}/_CHECKPOINT_METADATA').write_text('{')
    fault = '_CHECKPOINT_METADATA has 1 bytes where '
  else:
    shutil.rmtree(folder / f'{OLD}')
    (folder / f'{OLD}').touch()
    fault = 'it is no folder'
  checkpoints = Checkpoints(folder, max_to_keep=2)
  checkpoints.resume(states.abstract(step=NEW, **LAYOUT))
  checkpoints.save(20, states.make(step=20, **LAYOUT), {}, {})
  checkpoints.close()
  assert checkpoints.steps() == [NEW, 20]
  [line] = told()
  assert line.startswith(f'Checkpoint {folder}/{OLD} is damaged: {fault}')
  assert line.endswith(f'; it was put into {folder}/damaged/{OLD}.')


# The sums that stand for the content.


def test_checkpoints_without_sums_are_restored_as_before(states, folder):
  path = folder / f'{NEW}/metadata/metadata'
  metadata = json.loads(path.read_text())
  for entry in metadata['arrays'].values():
    assert entry.pop('sums')
  path.write_text(json.dumps(metadata))
  write_checksums(folder / f'{NEW}')
  state, _, _ = Checkpoints(folder).restore(
      NEW, states.abstract(step=NEW, **LAYOUT)
  )
  states.assert_identical(state, states.make(step=NEW, **LAYOUT))


@pytest.mark.parametrize(
    ('change', 'fault'),
    [
        (lambda x: x.at[1, 2, 3].add(1), 'has other numbers than were saved'),
        (lambda x: x.at[0, 0, 0].multiply(-1), 'has other numbers than'),
        (lambda x: x[::-1], 'has its numbers in other places than were saved'),
        (lambda x: x.at[5:].set(0), 'has other numbers than were saved'),
    ],
)
def test_arrays_that_arrive_otherwise_are_named(
    states, folder, monkeypatch, change, fault
):
  """As if a restore had read only a part, or put parts elsewhere."""
  path = 'encoder/layers_1/attention/kernel'
  read_leaves = restore_module.read_leaves

  def read(item, targets):
    leaves = read_leaves(item, targets)
    if path in leaves:
      leaf = leaves[path]
      leaves[path] = jax.device_put(change(leaf), leaf.sharding)
    return leaves

  monkeypatch.setattr(restore_module, 'read_leaves', read)
  with pytest.raises(DamagedCheckpoint) as raised:
    Checkpoints(folder).restore(NEW, states.abstract(step=NEW, **LAYOUT))
  assert f'is damaged: trainable/{path} {fault}' in str(raised.value)


@pytest.mark.parametrize('wrong', [0, 1])
@pytest.mark.parametrize(
    'path', ['encoder/layers_1/norm/scale', 'encoder/final_norm/scale']
)
def test_a_single_wrong_copy_is_noticed(
    states, folder, monkeypatch, path, wrong
):
  """As if one of the hosts, that all read, had read otherwise."""
  read_leaves = restore_module.read_leaves

  def read(item, targets):
    leaves = read_leaves(item, targets)
    if path in leaves:
      copies = [shard.data for shard in leaves[path].addressable_shards]
      assert len(copies) == 2
      copies[wrong] = copies[wrong].at[4].add(1)
      leaves[path] = jax.make_array_from_single_device_arrays(
          leaves[path].shape, leaves[path].sharding, copies
      )
    return leaves

  monkeypatch.setattr(restore_module, 'read_leaves', read)
  with pytest.raises(DamagedCheckpoint, match=f'{path} has other numbers'):
    Checkpoints(folder).restore(NEW, states.abstract(step=NEW, **LAYOUT))


def test_eight_then_four_then_eight_devices_keep_the_sums(states, tmp_path):
  """Saved on each mesh in turn, from what was restored on the one before."""
  state = states.make(step=1, **LAYOUT)
  sums = []
  with Checkpoints(tmp_path) as checkpoints:
    for step, mesh_shape in enumerate([(1, 4, 2), (1, 2, 2), (2, 2, 2)], 1):
      target = states.abstract(mesh_shape=mesh_shape, frozen=False, step=1)
      if step > 1:
        state, _, _ = checkpoints.resume(target)
        assert state.params['token_embedder'][
            'embedding'
        ].sharding.num_devices == np.prod(mesh_shape)
      state = dataclasses.replace(state, step=jnp.int32(step))
      checkpoints.save(step, state, {}, {})
      checkpoints.wait_until_finished()
      arrays = checkpoints.metadata(step)['arrays']
      sums.append({path: entry['sums'] for path, entry in arrays.items()})
  assert sums[0] == sums[1] == sums[2]
  assert len({tuple(pair) for pair in sums[0].values()}) > 10
