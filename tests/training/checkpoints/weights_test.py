import os

import jax
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.training import files
from codet5p_jax.training.checkpoints import weights as weights_module
from codet5p_jax.training.checkpoints.fingerprint import fingerprint_tree
from codet5p_jax.training.checkpoints.verify import DamagedCheckpoint, verify
from codet5p_jax.training.checkpoints.weights import load_weights, save_weights


@pytest.mark.parametrize('to_scanned', [True, False])
@pytest.mark.parametrize('from_scanned', [True, False])
def test_weights_come_back_in_any_layout(
    states, tmp_path, from_scanned, to_scanned
):
  params = states.make(scanned=from_scanned).params
  save_weights(tmp_path / 'run/model', params, {'source': 'here'})
  layout = {'scanned': to_scanned, 'mesh_shape': (2, 2, 2)}
  restored, metadata = load_weights(
      tmp_path / 'run/model', states.abstract(**layout).params
  )
  states.assert_identical(restored, states.make(**layout).params)
  assert fingerprint_tree(restored) == fingerprint_tree(params)
  assert metadata['source'] == 'here'
  assert os.listdir(tmp_path / 'run') == ['model']


def test_old_weights_are_replaced(states, tmp_path):
  for step in (1, 2):
    save_weights(tmp_path / 'model', states.make(step=step).params, {})
  expected = states.make(step=2).params
  restored, _ = load_weights(tmp_path / 'model', expected)
  states.assert_identical(restored, expected)
  assert os.listdir(tmp_path) == ['model']


@pytest.mark.parametrize('broken', ['write_checksums', 'verify', 'write_json'])
def test_a_failed_export_leaves_the_old_weights(
    states, tmp_path, monkeypatch, broken
):
  old = states.make(step=1).params
  save_weights(tmp_path / 'model', old, {})

  def fail(*args, **kwargs):
    raise OSError(28, 'ignored')

  with monkeypatch.context() as patch:
    patch.setattr(weights_module, broken, fail)
    with pytest.raises(UserError, match='model: No space left on device; free'):
      save_weights(tmp_path / 'model', states.make(step=2).params, {})
  states.assert_identical(load_weights(tmp_path / 'model', old)[0], old)
  assert os.listdir(tmp_path) == ['model']


def test_weights_are_found_between_the_two_renames(
    states, tmp_path, monkeypatch
):
  """A process killed there leaves the old folder under another name."""
  old, new = states.make(step=1).params, states.make(step=2).params
  save_weights(tmp_path / 'model', old, {})
  rename = os.rename

  def rename_once(source, target):
    monkeypatch.setattr(os, 'rename', fail)
    rename(source, target)

  def fail(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'rename', rename_once)
  with pytest.raises(KeyboardInterrupt):
    save_weights(tmp_path / 'model', new, {})
  monkeypatch.setattr(os, 'rename', rename)
  states.assert_identical(load_weights(tmp_path / 'model', old)[0], old)
  save_weights(tmp_path / 'model', new, {})
  states.assert_identical(load_weights(tmp_path / 'model', new)[0], new)
  assert os.listdir(tmp_path) == ['model']


def test_weights_that_do_not_fit_are_refused(states, tmp_path):
  folder = tmp_path / 'model'
  save_weights(folder, states.make().params, {})
  with pytest.raises(UserError, match='weights .*2 missing .encoder/layers_3'):
    load_weights(folder, states.abstract(layers=4).params)
  with pytest.raises(UserError, match='found no folder'):
    load_weights(tmp_path / 'none', states.abstract().params)


def test_damage_is_noticed(states, tmp_path):
  folder = tmp_path / 'model'
  save_weights(folder, states.make().params, {})
  verify(folder)
  (folder / 'metadata.json').write_text('{}')
  with pytest.raises(DamagedCheckpoint, match='metadata.json has 2 bytes'):
    load_weights(folder, states.abstract().params)


def test_a_newer_format_is_refused(states, tmp_path, monkeypatch):
  folder = tmp_path / 'model'
  monkeypatch.setattr(files, 'FORMAT_VERSION', 2)
  save_weights(folder, states.make().params, {})
  monkeypatch.undo()
  with pytest.raises(UserError, match='format_version 1 or older .*found 2'):
    load_weights(folder, states.abstract().params)


def test_a_real_write_error_is_one_line(states, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='file/model: a file is in the way; free'):
    save_weights(tmp_path / 'file/model', states.make().params, {})
  with pytest.raises(ValueError, match='reserved key arrays'):
    save_weights(tmp_path / 'model', {'a': jax.numpy.ones(2)}, {'arrays': 1})
