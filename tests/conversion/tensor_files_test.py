import json
import pickle
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.conversion.tensor_files import (
    TensorFiles,
    has_tensors,
    read_json_object,
)
from codet5p_jax.errors import UserError
from tests.conversion.conftest import write_tensors

FORMS = ['safetensors', 'bin']


def equal(files, tensors):
  assert {n: (s.shape, s.dtype) for n, s in files.shapes.items()} == {
      n: (array.shape, array.dtype) for n, array in tensors.items()
  }
  for name, array in tensors.items():
    found = files.read(name)
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes(), name


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(
    ('shards', 'index'), [(1, False), (3, True), (3, False)]
)
def test_tensors_are_read_from_every_form(make_folder, form, shards, index):
  folder = make_folder('codet5p')
  path = folder.write(form, shards, index)
  assert has_tensors(path)
  equal(TensorFiles(path), folder.tensors)


def test_safetensors_come_first(make_folder):
  folder = make_folder('t5')
  path = folder.write()
  (path / 'pytorch_model.bin').write_bytes(b'not looked at')
  equal(TensorFiles(path), folder.tensors)


@pytest.mark.parametrize('form', FORMS)
def test_bfloat16_keeps_its_bits(tmp_path, form):
  bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
  if form == 'bin':
    torch = pytest.importorskip('torch')
    tensor = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    torch.save({'a': tensor}, tmp_path / 'pytorch_model.bin')
  else:
    write_tensors(
        tmp_path / 'model.safetensors', {'a': bits.view(jnp.bfloat16)}
    )
  files = TensorFiles(tmp_path)
  assert files.shapes['a'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(files.read('a').view(np.uint16), bits)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('kept', [0, 5, 0.5, -1])
def test_a_file_that_is_cut_short_is_told(make_folder, form, kept):
  path = make_folder('codet5p_embedding').write(form)
  [file] = path.glob('*model.*')
  content = file.read_bytes()
  size = int(kept * len(content)) if isinstance(kept, float) else kept
  file.write_bytes(content[:size])
  with pytest.raises(UserError, match='cut short or damaged') as error:
    TensorFiles(path)
  assert file.name in str(error.value) and '\n' not in str(error.value)


def test_a_flipped_bit_in_a_bin_is_told(make_folder):
  folder = make_folder('codet5p_embedding')
  path = folder.write('bin') / 'pytorch_model.bin'
  content = bytearray(path.read_bytes())
  weight = folder.tensors['shared.weight'].tobytes()
  content[content.index(weight) + 99] ^= 4
  path.write_bytes(content)
  with pytest.raises(UserError, match='damaged .checksum of .*data'):
    TensorFiles(path.parent)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('index', [True, False])
def test_a_missing_shard_is_told(make_folder, form, index):
  path = make_folder('t5').write(form, 3, index)
  [file] = path.glob('*-00002-of-*')
  file.unlink()
  words = f'the shard .*{file.name}' if index else '2 of 3, without number 2'
  with pytest.raises(UserError, match=words):
    TensorFiles(path)


def test_shards_of_two_models_are_told(make_folder):
  path = make_folder('t5').write(shards=3, index=False)
  (path / 'model-00001-of-00002.safetensors').write_bytes(b'')
  with pytest.raises(UserError, match='all shards of one model .*found 4 of 3'):
    TensorFiles(path)


def test_an_index_must_say_what_shards_hold(make_folder):
  path = make_folder('t5').write(shards=2)
  index = path / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  places = content['weight_map']
  name = next(iter(places))

  def write(places):
    index.write_text(json.dumps({'weight_map': places}))

  write({key: place for key, place in places.items() if key != name})
  with pytest.raises(UserError, match=f'found {name}, which is not there'):
    TensorFiles(path)
  write(places | {'another': places[name]})
  with pytest.raises(UserError, match='found no another in model-0000'):
    TensorFiles(path)
  write(places | {'another': '../elsewhere'})
  with pytest.raises(UserError, match='a weight_map from tensors to files'):
    TensorFiles(path)
  index.write_text('{')
  with pytest.raises(UserError, match='expected JSON in .*index.json'):
    TensorFiles(path)


def test_a_tensor_in_two_shards_is_told(make_folder):
  folder = make_folder('t5')
  path = folder.write(shards=2, index=False)
  write_tensors(path / 'model-00002-of-00002.safetensors', folder.tensors)
  with pytest.raises(UserError, match='each tensor once .*and in another'):
    TensorFiles(path)


class Code:
  """Would make a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), 'w')


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
  torch = pytest.importorskip('torch')
  content = {'a': torch.ones(2), 'b': Code(tmp_path / 'it ran')}
  torch.save(content, tmp_path / 'pytorch_model.bin')
  with pytest.raises(UserError, match='a pickle that runs code') as error:
    TensorFiles(tmp_path)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'it ran').exists()


def test_other_values_than_tensors_are_refused(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save({'model': {'a': torch.ones(2)}}, tmp_path / 'pytorch_model.bin')
  with pytest.raises(UserError, match='tensors by name, found other values'):
    TensorFiles(tmp_path)


def test_the_old_format_of_pytorch_is_refused(tmp_path):
  pytest.importorskip('torch')
  path = tmp_path / 'pytorch_model.bin'
  path.write_bytes(pickle.dumps({'a': 1}, protocol=2))
  with pytest.raises(UserError, match='PyTorch 1.6 and later'):
    TensorFiles(tmp_path)


def test_a_bin_without_pytorch_names_the_extra(make_folder, monkeypatch):
  path = make_folder('t5').write('bin')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match=r'install codet5p_jax\[torch\]'):
    TensorFiles(path)


def test_numbers_of_a_strange_type_are_told(tmp_path):
  write_tensors(tmp_path / 'model.safetensors', {'a': np.ones(2, np.uint32)})
  with pytest.raises(UserError, match='found U32 in a'):
    TensorFiles(tmp_path)


def test_a_folder_without_tensors_is_told(tmp_path):
  assert not has_tensors(tmp_path)
  with pytest.raises(UserError, match='model.safetensors or pytorch_model.bin'):
    TensorFiles(tmp_path)


def test_a_json_file_must_hold_an_object(tmp_path):
  (tmp_path / 'a.json').write_text('[]')
  with pytest.raises(UserError, match='a JSON object .*found a list'):
    read_json_object(tmp_path / 'a.json')
