import os
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codet5p_jax.errors import UserError
from codet5p_jax.training import files
from codet5p_jax.training.checkpoints import weights as weights_module
from codet5p_jax.training.checkpoints.fingerprint import fingerprint_tree
from codet5p_jax.training.checkpoints.verify import (
    DamagedCheckpoint,
    verify,
    write_checksums,
)
from codet5p_jax.training.checkpoints.weights import (
    SavedWeights,
    load_weights,
    save_weights,
    write_weights,
)

# Rows of the table in `states`; as many as padding would make of none.
VOCAB = 16


@pytest.mark.parametrize('to_scanned', [True, False])
@pytest.mark.parametrize('from_scanned', [True, False])
def test_weights_come_back_in_any_layout(
    states, tmp_path, from_scanned, to_scanned
):
  params = states.make(scanned=from_scanned).params
  save_weights(tmp_path / 'run/model', params, {'source': 'here'}, VOCAB)
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
    save_weights(tmp_path / 'model', states.make(step=step).params, {}, VOCAB)
  expected = states.make(step=2).params
  restored, _ = load_weights(tmp_path / 'model', expected)
  states.assert_identical(restored, expected)
  assert os.listdir(tmp_path) == ['model']


@pytest.mark.parametrize('broken', ['write_checksums', 'verify', 'write_json'])
def test_a_failed_export_leaves_the_old_weights(
    states, tmp_path, monkeypatch, broken
):
  old = states.make(step=1).params
  save_weights(tmp_path / 'model', old, {}, VOCAB)

  def fail(*args, **kwargs):
    raise OSError(28, 'ignored')

  with monkeypatch.context() as patch:
    patch.setattr(weights_module, broken, fail)
    with pytest.raises(UserError, match='model: No space left on device; free'):
      save_weights(tmp_path / 'model', states.make(step=2).params, {}, VOCAB)
  states.assert_identical(load_weights(tmp_path / 'model', old)[0], old)
  assert os.listdir(tmp_path) == ['model']


def test_weights_are_found_between_the_two_renames(
    states, tmp_path, monkeypatch
):
  """A process killed there leaves the old folder under another name."""
  old, new = states.make(step=1).params, states.make(step=2).params
  save_weights(tmp_path / 'model', old, {}, VOCAB)
  rename = os.rename

  def rename_once(source, target):
    monkeypatch.setattr(os, 'rename', fail)
    rename(source, target)

  def fail(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'rename', rename_once)
  with pytest.raises(KeyboardInterrupt):
    save_weights(tmp_path / 'model', new, {}, VOCAB)
  monkeypatch.setattr(os, 'rename', rename)
  states.assert_identical(load_weights(tmp_path / 'model', old)[0], old)
  save_weights(tmp_path / 'model', new, {}, VOCAB)
  states.assert_identical(load_weights(tmp_path / 'model', new)[0], new)
  assert os.listdir(tmp_path) == ['model']


def test_weights_that_do_not_fit_are_refused(states, tmp_path):
  folder = tmp_path / 'model'
  save_weights(folder, states.make().params, {}, VOCAB)
  with pytest.raises(UserError, match='weights .*2 missing .encoder/layers_3'):
    load_weights(folder, states.abstract(layers=4).params)
  with pytest.raises(UserError, match='found no folder'):
    load_weights(tmp_path / 'none', states.abstract().params)


def test_damage_is_noticed(states, tmp_path):
  folder = tmp_path / 'model'
  save_weights(folder, states.make().params, {}, VOCAB)
  verify(folder)
  (folder / 'metadata.json').write_text('{}')
  with pytest.raises(DamagedCheckpoint, match='metadata.json has 2 bytes'):
    load_weights(folder, states.abstract().params)


def test_a_newer_format_is_refused(states, tmp_path, monkeypatch):
  folder = tmp_path / 'model'
  monkeypatch.setattr(files, 'FORMAT_VERSION', 2)
  save_weights(folder, states.make().params, {}, VOCAB)
  monkeypatch.undo()
  with pytest.raises(UserError, match='format_version 1 or older .*found 2'):
    load_weights(folder, states.abstract().params)


def test_a_real_write_error_is_one_line(states, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='file/model: a file is in the way; free'):
    save_weights(tmp_path / 'file/model', states.make().params, {}, VOCAB)
  with pytest.raises(ValueError, match='reserved key arrays'):
    save_weights(
        tmp_path / 'model', {'a': jax.numpy.ones(2)}, {'arrays': 1}, VOCAB
    )


def test_arrays_lie_in_groups_of_a_limited_size(states, tmp_path, monkeypatch):
  params = states.make().params
  monkeypatch.setattr(weights_module, '_GROUP_BYTES', 700)
  save_weights(tmp_path / 'model', params, {}, VOCAB)
  saved = SavedWeights(tmp_path / 'model')
  sizes = {}
  for path, entry in saved.arrays.items():
    leaf = saved.shapes[path]
    sizes.setdefault(entry['group'], []).append(
        leaf.size * leaf.dtype.itemsize
    )
  assert len(sizes) > 2
  assert all(len(group) == 1 or sum(group) <= 700 for group in sizes.values())
  assert sorted(os.listdir(tmp_path / 'model/arrays')) == sorted(
      map(str, sizes)
  )
  restored, _ = load_weights(tmp_path / 'model', params)
  states.assert_identical(restored, params)


def test_leaves_are_asked_for_group_by_group(tmp_path, monkeypatch):
  """What was written is gone before the next is made."""
  monkeypatch.setattr(weights_module, '_GROUP_BYTES', 100)
  made = []

  def leaves():
    for number in range(6):
      leaf = np.full(10, number, np.float32)
      made.append(weakref.ref(leaf))
      # One group, and the first leaf of the next.
      assert sum(leaf() is not None for leaf in made) <= 3
      yield f'leaf_{number}', leaf
      del leaf

  write_weights(tmp_path / 'model', leaves(), {})
  saved = SavedWeights(tmp_path / 'model')
  for number in range(6):
    assert saved.read(f'leaf_{number}').tolist() == [number] * 10


def make_table(rows, dtype=np.float32):
  return np.arange(1, 3 * rows + 1, dtype=dtype).reshape(rows, 3)


@pytest.mark.parametrize('mesh_shape', [(1, 1, 1), (1, 2, 4)])
def test_rows_that_only_pad_are_cut_and_added_again(tmp_path, mesh_shape):
  """130 rows, which 4 shards do not divide, padded to 256."""
  table, head = make_table(256), np.arange(256, dtype=np.float32)
  table[130:] = head[130:] = np.nan
  devices = np.array(jax.devices()[: np.prod(mesh_shape)])
  mesh = Mesh(devices.reshape(mesh_shape), ('replica', 'data', 'model'))
  sharding = NamedSharding(mesh, PartitionSpec('model'))
  params = {
      'token_embedder': {'embedding': jax.device_put(table, sharding)},
      'decoder': {
          'output_head': {'bias': jax.device_put(head, sharding)},
          # No table, whatever its size.
          'mlp': {'bias': jnp.ones(256)},
      },
  }
  save_weights(tmp_path / 'model', params, {}, 130)
  saved = SavedWeights(tmp_path / 'model')
  assert {path: leaf.shape for path, leaf in saved.shapes.items()} == {
      'token_embedder/embedding': (130, 3),
      'decoder/output_head/bias': (130,),
      'decoder/mlp/bias': (256,),
  }
  found = saved.read('token_embedder/embedding')
  np.testing.assert_array_equal(found, table[:130])
  restored, _ = load_weights(tmp_path / 'model', params)
  found = restored['token_embedder']['embedding']
  assert found.sharding == sharding
  np.testing.assert_array_equal(found, np.r_[table[:130], np.zeros((126, 3))])
  # A vocabulary of 131 has as many rows.
  save_weights(tmp_path / 'other', restored, {}, 131)
  assert SavedWeights(tmp_path / 'other').shapes[
      'token_embedder/embedding'
  ].shape == (131, 3)


def test_other_shapes_are_never_padded_or_cut(tmp_path):
  save_weights(
      tmp_path / 'model',
      {'mlp': {'kernel': make_table(130)}, 'output_head': {'bias': np.ones(9)}},
      {},
      9,
  )
  for path, shape in (
      (('mlp', 'kernel'), (256, 3)),
      (('output_head', 'bias'), (8,)),
      (('output_head', 'bias'), (129,)),
  ):
    target = {'mlp': {'kernel': make_table(130)},
              'output_head': {'bias': np.ones(9)}}  # fmt: skip
    target[path[0]][path[1]] = jax.ShapeDtypeStruct(shape, np.float32)
    with pytest.raises(UserError, match='1 of another shape'):
      load_weights(tmp_path / 'model', target)


@pytest.mark.parametrize('saved', ['float16', 'bfloat16', 'float32'])
@pytest.mark.parametrize('wanted', ['float16', 'bfloat16', 'float32'])
def test_weights_are_cast_to_what_the_target_asks_for(tmp_path, saved, wanted):
  numbers = np.random.default_rng(0).normal(size=(5, 7)).astype(saved)
  write_weights(tmp_path / 'model', [('a', numbers)], {})
  target = {'a': jax.ShapeDtypeStruct((5, 7), wanted)}
  restored, _ = load_weights(tmp_path / 'model', target)
  assert restored['a'].dtype == wanted
  np.testing.assert_array_equal(restored['a'], numbers.astype(wanted))


def test_weights_are_never_cast_to_integers(tmp_path):
  write_weights(tmp_path / 'model', [('a', np.ones(3, np.float16))], {})
  target = {'a': jax.ShapeDtypeStruct((3,), np.int8)}
  with pytest.raises(UserError, match='another dtype .a: expected int8'):
    load_weights(tmp_path / 'model', target)


def test_the_form_of_an_earlier_version_is_refused(states, tmp_path):
  folder = tmp_path / 'model'
  save_weights(folder, states.make().params, {}, VOCAB)
  metadata = files.read_json(folder / 'metadata.json')
  for entry in metadata['arrays'].values():
    del entry['group']
  files.write_json(folder / 'metadata.json', metadata)
  write_checksums(folder)
  with pytest.raises(UserError, match='groups of arrays .*earlier version'):
    load_weights(folder, states.abstract().params)
