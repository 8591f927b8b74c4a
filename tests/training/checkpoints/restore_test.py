import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from codet5p_jax.errors import UserError
from codet5p_jax.training.checkpoints import restore as restore_module
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.checkpoints.verify import (
    DamagedCheckpoint,
    write_checksums,
)

FINGERPRINT = 'f' * 64
CURSOR = {'row': 12, 'epoch': [1, None]}
METADATA = {'frozen_fingerprint': FINGERPRINT, 'model': {'class': 'T5'}}


@pytest.fixture(scope='module')
def folders(states, tmp_path_factory):
  """Folders with one step, saved scanned and saved unrolled."""
  folders = {}
  for scanned in (True, False):
    folder = folders[scanned] = tmp_path_factory.mktemp('run') / 'checkpoints'
    with Checkpoints(folder) as checkpoints:
      checkpoints.save(7, states.make(scanned=scanned), CURSOR, METADATA)
  return folders


@pytest.mark.parametrize('mesh_shape', [(1, 4, 2), (2, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize('to_scanned', [True, False])
@pytest.mark.parametrize('from_scanned', [True, False])
def test_every_layout_and_mesh_gives_the_same_bits(
    states, folders, from_scanned, to_scanned, mesh_shape
):
  target = states.abstract(scanned=to_scanned, mesh_shape=mesh_shape)
  restored, cursor, metadata = Checkpoints(folders[from_scanned]).restore(
      None, target, frozen_fingerprint=FINGERPRINT
  )
  expected = states.make(scanned=to_scanned, mesh_shape=mesh_shape)
  states.assert_identical(
      restored.replace(frozen_params={}), expected.replace(frozen_params={})
  )
  for found, wanted in zip(
      jax.tree.leaves(restored), jax.tree.leaves(target), strict=True
  ):
    assert isinstance(found.sharding, NamedSharding)
    assert found.sharding == wanted.sharding
  assert cursor == CURSOR
  assert metadata['step'] == 7
  assert METADATA.items() <= metadata.items()
  assert restored.frozen_params == target.frozen_params


def test_a_target_without_shardings_is_restored_on_one_device(states, folders):
  target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states.make()
  )
  restored, _, _ = Checkpoints(folders[True]).restore(
      7, target, frozen_fingerprint=FINGERPRINT
  )
  states.assert_identical(restored.opt_state, states.make().opt_state)


def test_an_empty_objective_state_is_restored(states, tmp_path):
  state = states.make(frozen=False, objective_state=False)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(7, state, {}, {})
    restored, cursor, _ = checkpoints.restore(None, state)
  states.assert_identical(restored, state)
  assert cursor == {}


def test_fields_that_are_none_are_not_read(states, folders, monkeypatch):
  read = []
  read_leaves = restore_module.read_leaves
  monkeypatch.setattr(
      restore_module,
      'read_leaves',
      lambda folder, targets: (
          read.append(folder.name) or read_leaves(folder, targets)
      ),
  )
  target = states.abstract().replace(
      opt_state=None, objective_state=None, health=None
  )
  restored, cursor, _ = Checkpoints(folders[True]).restore(
      7, target, frozen_fingerprint=FINGERPRINT
  )
  states.assert_identical(restored.params, states.make().params)
  assert (restored.opt_state, restored.objective_state) == (None, None)
  assert (cursor, read) == (CURSOR, ['trainable'])


@pytest.mark.parametrize(
    ('layout', 'found'),
    [
        (
            {'layers': 4},
            '6 missing (trainable/encoder/layers_3/attention/kernel, '
            'trainable/encoder/layers_3/norm/scale, '
            'optimizer/1/0/mu/encoder/layers_3/attention/kernel, '
            'optimizer/1/0/mu/encoder/layers_3/norm/scale, '
            'optimizer/1/0/nu/encoder/layers_3/attention/kernel, ...);',
        ),
        ({'layers': 2}, '6 unexpected (trainable/encoder/layers_2/'),
        ({'layers': 2, 'scanned': False}, '6 unexpected (trainable/encoder'),
        (
            {'objective_state': False},
            '2 unexpected (objective_state/contrastive/next, '
            'objective_state/contrastive/queue);',
        ),
    ],
)
def test_another_tree_is_refused_before_arrays_are_read(
    states, folders, monkeypatch, layout, found
):
  monkeypatch.setattr(restore_module, 'read_leaves', None)
  with pytest.raises(UserError) as raised:
    Checkpoints(folders[True]).restore(
        7, states.abstract(**layout), frozen_fingerprint=FINGERPRINT
    )
  assert f', found {found}' in str(raised.value)
  assert '\n' not in str(raised.value)


def test_another_shape_or_dtype_is_refused(states, folders):
  target = states.abstract()
  target.params['encoder']['layers']['norm'] = {
      'scale': jax.ShapeDtypeStruct((3, 9), np.float32)
  }
  embedder = target.params['token_embedder']
  embedder['embedding'] = jax.ShapeDtypeStruct((16, 8), jax.numpy.bfloat16)
  with pytest.raises(UserError) as raised:
    Checkpoints(folders[False]).restore(
        7, target, frozen_fingerprint=FINGERPRINT
    )
  message = str(raised.value)
  assert (
      '3 of another shape (trainable/encoder/layers_0/norm/scale: expected '
      '[9], found [8], ' in message
  )
  assert (
      '1 of another dtype (trainable/token_embedder/embedding: expected '
      'bfloat16, found float32)' in message
  )


def test_another_frozen_source_is_refused(states, folders):
  checkpoints = Checkpoints(folders[True])
  with pytest.raises(UserError, match=f'{"0" * 64}, found {FINGERPRINT}'):
    checkpoints.restore(7, states.abstract(), frozen_fingerprint='0' * 64)
  with pytest.raises(UserError, match=f'fingerprint none, found {FINGERPRINT}'):
    checkpoints.restore(7, states.abstract(frozen=False))
  with pytest.raises(ValueError, match='need their frozen_fingerprint'):
    checkpoints.restore(7, states.abstract())


def test_a_step_that_is_not_there_is_the_users_error(
    states, folders, tmp_path
):
  with pytest.raises(UserError, match=r'expected step 3 in .*found steps \[7'):
    Checkpoints(folders[True]).restore(3, states.abstract())
  with pytest.raises(UserError, match='expected a checkpoint in .*found none'):
    Checkpoints(tmp_path).restore(None, states.abstract())


def test_a_damaged_newest_step_names_the_whole_one_before(states, tmp_path):
  target = states.abstract(frozen=False)
  checkpoints = Checkpoints(tmp_path)
  for step in (1, 2, 3):
    checkpoints.save(step, states.make(step=step, frozen=False), {}, {})
  checkpoints.close()
  for step in (2, 3):
    (tmp_path / f'{step}/trainable/manifest.ocdbt').write_bytes(b'')
  with pytest.raises(DamagedCheckpoint) as raised:
    checkpoints.restore(None, target)
  message = str(raised.value)
  assert f'checkpoint {tmp_path}/3 is damaged: trainable/man' in message
  assert 'step 1 before it is whole; `codet5p train` sets' in message
  for step in (2, 3):
    shutil.move(tmp_path / f'{step}', tmp_path / f'damaged_{step}')
  assert checkpoints.restore(None, target)[2]['step'] == 1
  (tmp_path / '1/checksums.json').unlink()
  with pytest.raises(DamagedCheckpoint, match='half-written; no whole'):
    checkpoints.restore(None, target)


def test_a_newer_format_is_refused(states, folders, tmp_path):
  shutil.copytree(folders[True] / '7', tmp_path / '7')
  path = tmp_path / '7/metadata/metadata'
  content = json.loads(path.read_text())
  path.write_text(json.dumps({**content, 'format_version': 2}))
  write_checksums(tmp_path / '7')
  with pytest.raises(UserError, match='format_version 1 or older .*found 2'):
    Checkpoints(tmp_path).restore(
        7, states.abstract(), frozen_fingerprint=FINGERPRINT
    )


def test_a_checkpoint_of_before_bad_steps_begins_their_count_anew(
    states, tmp_path, caplog
):
  """Former versions had a state without `health`."""
  state = states.make(frozen=False)
  health = {'bad_in_a_row': np.int32(3), 'losses': {'a': {'mean': np.ones(())}}}
  target = state.replace(health=states.place(health, (1, 4, 2)))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(7, state, {}, {})
    checkpoints.wait_until_finished()
    assert not (tmp_path / '7' / 'health').exists()
    with caplog.at_level('INFO', 'codet5p_jax'):
      restored, _, _ = checkpoints.restore(None, target)
    zeros = jax.tree.map(np.zeros_like, target.health)
    states.assert_identical(restored, state.replace(health=zeros))
    for found, wanted in zip(
        jax.tree.leaves(restored.health), jax.tree.leaves(target.health)
    ):
      assert found.sharding == wanted.sharding
    [line] = [r.getMessage() for r in caplog.records if 'health' in r.message]
    assert line == f'{tmp_path}/7 holds no health yet, which begins anew.'
    # One that has it must have all of it.
    checkpoints.save(8, target.replace(step=state.step + 1), {}, {})
    with pytest.raises(UserError, match=r'1 missing \(health/losses/b/mean\)'):
      checkpoints.restore(
          8, target.replace(health={**health, 'losses': {
              name: {'mean': np.ones(())} for name in 'ab'
          }})
      )  # fmt: skip
