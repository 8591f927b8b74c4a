import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.conversion.families import FAMILIES
from codet5p_jax.conversion.huggingface_folder import (
    open_huggingface_folder,
    our_shapes,
)
from codet5p_jax.conversion.sources import is_ours, open_source
from codet5p_jax.conversion.to_ours import convert_to_ours
from codet5p_jax.errors import UserError
from codet5p_jax.training.checkpoints.fingerprint import fingerprint_tree
from codet5p_jax.training.checkpoints.layout import nest
from codet5p_jax.training.checkpoints.verify import DamagedCheckpoint
from codet5p_jax.training.checkpoints.weights import save_weights
from codet5p_jax.training.files import write_json
from codet5p_jax.training.run_folder import describe
from tests.conversion.conftest import MODELS

TABLES = [
    'shared.weight',
    'encoder.embed_tokens.weight',
    'decoder.embed_tokens.weight',
    'lm_head.weight',
]


def to_ours(path, target):
  convert_to_ours(open_huggingface_folder(path), target, lambda count: None)
  return target


@pytest.mark.parametrize('model_type', FAMILIES)
def test_a_source_is_the_same_before_and_after_conversion(
    make_folder, tmp_path, model_type
):
  theirs = open_source(make_folder(model_type).write())
  ours = open_source(to_ours(tmp_path / 'theirs', tmp_path / 'ours'))
  for source in (theirs, ours):
    assert source.model == MODELS[model_type]
    assert source.vocabulary is None and source.load_vocabulary() is None
    assert {path: leaf.shape for path, leaf in source.shapes.items()} == {
        path: leaf.shape for path, leaf in our_shapes(source.model).items()
    }
  assert theirs.name == str(tmp_path / 'theirs')
  assert ours.name == str(tmp_path / 'ours')
  for path, leaf in theirs.leaves():
    assert leaf.dtype == theirs.shapes[path].dtype == np.float16
    found = ours.read(path)
    assert (found.dtype, found.shape) == (leaf.dtype, leaf.shape)
    assert found.tobytes() == leaf.tobytes()
  config = json.loads((tmp_path / 'ours/config.json').read_text())
  assert config['source'] == theirs.name
  for source in (theirs, ours):
    tree = nest(dict(source.leaves()))
    assert config['source_fingerprint'] == fingerprint_tree(tree)


@pytest.mark.parametrize('mask', [1, 2, 4, 8, 6, 15])
def test_any_of_the_four_names_of_the_table_is_enough(make_folder, mask):
  folder = make_folder('t5')
  table = folder.tensors.pop('shared.weight')
  for index, name in enumerate(TABLES):
    if mask >> index & 1:
      folder.tensors[name] = table.copy()
  source = open_source(folder.write())
  np.testing.assert_array_equal(source.read('token_embedder/embedding'), table)


def test_tables_that_are_not_tied_are_refused(make_folder):
  folder = make_folder('t5')
  folder.tensors['lm_head.weight'] = folder.tensors['shared.weight'] + 1
  with pytest.raises(UserError, match='shared.weight and lm_head.weight'):
    open_source(folder.write())


@pytest.mark.parametrize('difference', [0, 1])
def test_names_of_the_table_may_lie_in_any_order(make_folder, difference):
  """As views do that PyTorch saved."""
  folder = make_folder('t5')
  table = folder.tensors['shared.weight']
  folder.tensors['lm_head.weight'] = np.asfortranarray(table + difference)
  path = folder.write('bin')
  if difference:
    with pytest.raises(UserError, match='shared.weight and lm_head.weight'):
      open_source(path)
  else:
    read = open_source(path).read('token_embedder/embedding')
    np.testing.assert_array_equal(read, table)


def test_the_obsolete_bias_of_cross_attention_is_ignored(make_folder):
  folder = make_folder('t5')
  name = (
      'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
  )
  folder.tensors[name] = np.ones((16, 5), np.float16)
  assert open_source(folder.write()).model == MODELS['t5']


@pytest.mark.parametrize(
    ('model_type', 'field', 'value', 'words'),
    [
        ('t5', 'd_model', 13, 'd_model is 13 but 12 by the tensors'),
        ('t5', 'vocab_size', 130, 'vocab_size is 130 but 131'),
        ('t5', 'd_kv', 6, 'd_kv is 6 but 7'),
        ('t5', 'num_heads', 4, 'num_heads is 4 but 5'),
        ('t5', 'd_ff', 28, 'd_ff is 28 but 29'),
        ('t5', 'num_layers', 1, 'num_layers is 1 but 2'),
        ('t5', 'num_decoder_layers', 4, 'num_decoder_layers is 4 but 3'),
        ('t5', 'relative_attention_num_buckets', 32, 'is 32 but 16'),
        ('codet5p_bimodal', 'embed_dim', 256, 'embed_dim is 256 but 17'),
        ('codegen', 'n_embd', 160, 'n_embd is 160 but 80'),
        ('codegen', 'n_inner', 320, 'n_inner is 320 but 53'),
        ('codet5p', 'n_layer', 9, 'encoder.n_layer is 9 but 2'),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(
    make_folder, model_type, field, value, words
):
  folder = make_folder(model_type)
  config = folder.config
  config = config['encoder'] if model_type == 'codet5p' else config
  config[field] = value
  with pytest.raises(UserError, match=words) as error:
    open_source(folder.write())
  assert '\n' not in str(error.value)


def test_missing_extra_and_misshapen_tensors_are_told(make_folder):
  folder = make_folder('codet5p')
  del folder.tensors['enc_to_dec_proj.bias']
  folder.tensors['alpha_xattn'] = np.ones(1, np.float16)
  name = 'decoder.transformer.h.2.crossattention.q_attn.weight'
  folder.tensors[name] = folder.tensors[name][:-1]
  with pytest.raises(UserError) as error:
    open_source(folder.write())
  for words in (
      '1 missing (enc_to_dec_proj.bias)',
      '1 unexpected (alpha_xattn)',
      f'of shape [79, 80] instead of [80, 80] ({name})',
  ):
    assert words in str(error.value)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16])
def test_numbers_that_are_none_are_told_when_they_come(
    make_folder, value, dtype
):
  folder = make_folder('codegen', dtype=dtype)
  folder.tensors['transformer.h.1.mlp.fc_in.weight'][3, 4] = value
  source = open_source(folder.write())
  with pytest.raises(UserError, match='NaN or infinity in decoder/layers_1'):
    list(source.leaves())


def test_what_is_no_model_folder_is_told(tmp_path, make_folder):
  with pytest.raises(UserError, match='expected a folder, found none'):
    is_ours(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='config.json of a run, .* found none'):
    open_source(tmp_path)
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(UserError, match='config.json of a run, .* found none'):
    open_source(tmp_path)
  folder = make_folder('t5')
  folder.config['model_type'] = 'bert'
  with pytest.raises(UserError, match="among t5, .* found 'bert'"):
    open_source(folder.write())
  del folder.config['model_type']
  with pytest.raises(UserError, match='found None'):
    open_source(folder.write())


@pytest.fixture
def make_run(tmp_path, random_parameters):
  """A folder as `train` leaves it, in float32."""

  def make(model, params=None):
    folder = tmp_path / 'run'
    if params is None:
      params = random_parameters(model.make_model())
    folder.mkdir(exist_ok=True)
    config = {'model': model, 'vocabulary_fingerprint': 'none', 'seed': 0}
    write_json(folder / 'config.json', describe(config))
    save_weights(folder / 'model', params, {'step': 7}, model.vocab_size)
    return folder, params

  return make


def test_a_run_is_a_source_without_padding(make_run):
  folder, params = make_run(MODELS['t5'])
  source = open_source(folder)
  table = params['token_embedder']['embedding']
  assert table.shape == (256, 12)
  np.testing.assert_array_equal(
      source.read('token_embedder/embedding'), table[:131]
  )
  layers = params['decoder']['layers']
  np.testing.assert_array_equal(
      source.read('decoder/layers_2/cross_attention/out/kernel'),
      layers['cross_attention']['out']['kernel'][2],
  )
  assert source.shapes['token_embedder/embedding'].dtype == np.float32


def test_weights_of_another_model_are_told(make_run, random_parameters):
  other = random_parameters(MODELS['codet5p_embedding'].make_model())
  folder, _ = make_run(MODELS['t5'], other)
  with pytest.raises(UserError, match=r'missing .*2 unexpected \(projection'):
    open_source(folder)


def test_a_run_that_did_not_finish_is_told(make_run):
  folder, _ = make_run(MODELS['codegen'])
  (folder / 'model').rename(folder / 'elsewhere')
  with pytest.raises(UserError, match='weights of a finished run .* finish'):
    open_source(folder)
  write_json(folder / 'config.json', {'model': None})
  with pytest.raises(UserError, match='a model in .*found NoneType'):
    open_source(folder)


def test_damage_of_ours_is_told(make_run):
  folder, _ = make_run(MODELS['codegen'])
  [file] = (folder / 'model/arrays/0').glob('d/*')
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  with pytest.raises(DamagedCheckpoint, match='another content'):
    open_source(folder)


def test_no_weight_is_on_a_device(make_run):
  folder, _ = make_run(MODELS['codegen'])
  source = open_source(folder)
  before = len(jax.live_arrays())
  assert isinstance(source.read('decoder/output_head/bias'), np.ndarray)
  assert len(jax.live_arrays()) == before
