"""Tests of exports, and of every tensor there and back."""

import dataclasses
import functools
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax import main
from codet5p_jax.conversion import to_huggingface
from codet5p_jax.conversion.families import FAMILIES
from codet5p_jax.conversion.remote_code import find_remote_code
from codet5p_jax.conversion.sources import open_source
from codet5p_jax.conversion.tensor_files import TensorFiles
from codet5p_jax.conversion.tokenizer_files import write_tokenizer
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.models.computation import Computation
from codet5p_jax.runs.convert import convert
from codet5p_jax.training.checkpoints.weights import save_weights
from codet5p_jax.training.files import write_json
from codet5p_jax.training.run_folder import describe
from tests.conversion.conftest import MODELS

# The package in which transformers keeps copies of folders' code.
_COPIES = 'transformers_modules'


def to_ours(source, tmp_path):
  convert(str(source), str(tmp_path / 'ours'))
  return tmp_path / 'ours'


@pytest.mark.parametrize(
    ('model_type', 'form'),
    [*((kind, 'safetensors') for kind in FAMILIES), ('codet5p', 'bin')],
)
def test_every_tensor_is_the_same_after_both_ways(
    make_folder, tmp_path, monkeypatch, model_type, form
):
  folder = make_folder(model_type)
  source = folder.write(form, shards=2 if form == 'bin' else 1)
  ours, back = str(tmp_path / 'ours'), str(tmp_path / 'back')
  assert main.main(['convert', str(source), ours]) == 0
  monkeypatch.setattr(to_huggingface, '_SHARD_BYTES', 5_000)
  assert main.main(['convert', ours, back]) == 0
  assert sorted(os.listdir(tmp_path)) == ['back', 'ours', 'theirs']
  files = TensorFiles(tmp_path / 'back')
  assert files.shapes.keys() == folder.tensors.keys()
  for name, tensor in folder.tensors.items():
    found = files.read(name)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
    assert found.tobytes() == tensor.tobytes(), name
  shards = list((tmp_path / 'back').glob('model-*.safetensors'))
  assert len(shards) > 1
  config = json.loads((tmp_path / 'back/config.json').read_text())
  code = find_remote_code(model_type)
  assert config.pop('architectures') == [code.architecture]
  assert config.pop('auto_map', {}) == code.auto_map
  assert config == folder.config
  index = json.loads(
      (tmp_path / 'back/model.safetensors.index.json').read_text()
  )
  total = sum(tensor.nbytes for tensor in folder.tensors.values())
  assert index['metadata']['total_size'] == total
  modules = {path.name for path in (tmp_path / 'back').glob('*.py')}
  assert modules == {file.name for file in code.files}


def test_shards_hold_at_most_a_gigabyte():
  sizes = {'a': 6 * 10**8, 'b': 4 * 10**8, 'c': 1, 'd': 2 * 10**9, 'e': 1}
  assert list(to_huggingface._shards(sizes)) == [
      ['a', 'b'], ['c'], ['d'], ['e']
  ]  # fmt: skip


@pytest.mark.parametrize('kind', ['codet5', 'sentencepiece'])
def test_the_vocabulary_travels(
    make_folder, tmp_path, small_vocabularies, kind, monkeypatch
):
  vocabulary = small_vocabularies[kind]
  model = dataclasses.replace(
      MODELS['t5'], vocab_size=vocabulary.vocab_size
  )
  monkeypatch.setitem(MODELS, 't5', model)
  source = make_folder('t5').write()
  write_tokenizer(vocabulary, source)
  ours = to_ours(source, tmp_path)
  assert load_vocabulary(ours / 'vocabulary') == vocabulary
  config = json.loads((ours / 'config.json').read_text())
  assert config['vocabulary_fingerprint'] == vocabulary.fingerprint
  convert(str(ours), str(tmp_path / 'back'))
  assert open_source(tmp_path / 'back').load_vocabulary() == vocabulary
  files = sorted(os.listdir(tmp_path / 'back'))
  expected = {
      'codet5': [
          'added_tokens.json', 'config.json', 'generation_config.json',
          'merges.txt', 'model.safetensors', 'special_tokens_map.json',
          'tokenizer_config.json', 'vocab.json',
      ],
      'sentencepiece': [
          'config.json', 'generation_config.json', 'model.safetensors',
          'vocabulary',
      ],
  }  # fmt: skip
  assert files == expected[kind]


def test_a_trained_model_can_be_written_in_float16(
    make_folder, tmp_path, monkeypatch
):
  folder = make_folder('codegen', dtype=np.float32)
  ours = to_ours(folder.write(), tmp_path)
  convert(str(ours), str(tmp_path / 'half'), dtype='float16')
  half = TensorFiles(tmp_path / 'half')
  for name, tensor in folder.tensors.items():
    np.testing.assert_array_equal(half.read(name), tensor.astype(np.float16))
  config = json.loads((tmp_path / 'half/config.json').read_text())
  assert config['torch_dtype'] == 'float16'
  with pytest.raises(UserError, match="found 'int8'"):
    convert(str(ours), str(tmp_path / 'other'), dtype='int8')
  with pytest.raises(UserError, match='only on the way to the layout of'):
    convert(str(tmp_path / 'half'), str(tmp_path / 'other'), dtype='float16')


def test_weights_too_large_for_float16_are_told(make_folder, tmp_path):
  folder = make_folder('codegen', dtype=np.float32)
  folder.tensors['transformer.h.0.mlp.fc_out.bias'][3] = 1e5
  ours = to_ours(folder.write(), tmp_path)
  with pytest.raises(UserError, match='float16 can hold .*layers_0/mlp/wo/b'):
    convert(str(ours), str(tmp_path / 'half'), dtype='float16')
  assert sorted(os.listdir(tmp_path)) == ['ours', 'theirs']


@pytest.mark.parametrize('model_type', ['codegen', 'codet5p'])
def test_sizes_that_the_layout_cannot_say_are_refused_before_writing(
    tmp_path, random_parameters, monkeypatch, model_type
):
  model = MODELS[model_type]
  if model_type == 'codegen':
    model = dataclasses.replace(model, head_dim=12)
  else:
    decoder = dataclasses.replace(model.decoder, head_dim=12)
    model = dataclasses.replace(model, decoder=decoder)
  params = random_parameters(model.make_model(Computation()))
  write_run(tmp_path / 'run', model, params)

  def write(*arguments):
    pytest.fail('it was written first')

  monkeypatch.setattr(to_huggingface, '_write_shards', write)
  with pytest.raises(UserError, match='emb_dim.* 8, 12 and 80') as error:
    convert(str(tmp_path / 'run'), str(tmp_path / 'theirs'))
  assert '\n' not in str(error.value)
  assert os.listdir(tmp_path) == ['run']


@pytest.fixture(scope='module')
def transformers(tmp_path_factory):
  """transformers, which keeps its copies of folders' code in a folder here."""
  pytest.importorskip('torch')
  module = pytest.importorskip('transformers')
  folder = str(tmp_path_factory.mktemp('code'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module.dynamic_module_utils, 'HF_MODULES_CACHE', folder)
    patch.syspath_prepend(folder)
    # Python would look for more modules of it where the first was.
    for name in [x for x in sys.modules if x.startswith(_COPIES)]:
      patch.delitem(sys.modules, name)
    yield module
    for name in [x for x in sys.modules if x.startswith(_COPIES)]:
      del sys.modules[name]


def export(tmp_path, random_parameters, model_type):
  """Returns our model, its parameters, and the folder of the export."""
  config = MODELS[model_type]
  model = config.make_model(Computation(dtype='float32'))
  params = random_parameters(model)
  write_run(tmp_path / 'run', config, params)
  convert(str(tmp_path / 'run'), str(tmp_path / 'theirs'))
  return model, params, tmp_path / 'theirs'


def load(transformers, automatic, folder):
  """Loads as users do; every tensor must be accounted for."""
  model, report = getattr(transformers, automatic).from_pretrained(
      folder, trust_remote_code=True, output_loading_info=True
  )
  assert not report['missing_keys'] and not report['unexpected_keys']
  assert str(model.dtype) == 'torch.float32'
  return model.eval()


@pytest.mark.parametrize(
    ('model_type', 'automatic'),
    [
        ('t5', 'AutoModelForSeq2SeqLM'),
        ('codet5p_bimodal', 'AutoModelForSeq2SeqLM'),
        ('codegen', 'AutoModelForCausalLM'),
        ('codet5p', 'AutoModelForSeq2SeqLM'),
    ],
)
def test_transformers_loads_an_export_and_computes_our_logits(
    tmp_path, random_parameters, transformers, model_type, automatic
):
  import torch

  model, params, folder = export(tmp_path, random_parameters, model_type)
  theirs = load(transformers, automatic, folder)
  ids = theirs.generation_config
  assert (ids.pad_token_id, ids.eos_token_id, ids.decoder_start_token_id) == (
      model.config.pad_id, model.config.eos_id, model.config.decoder_start_id
  )  # fmt: skip
  numbers = np.random.default_rng(0)
  has_encoder = model_type != 'codegen'
  source = numbers.integers(14, 131, (2, 7 if has_encoder else 1))
  target = numbers.integers(0, 131, (2, 9))

  @jax.jit
  def logits(params):
    variables = {'params': params}
    hidden = model.apply(variables, jnp.asarray(source), jnp.asarray(target))
    return model.apply(variables, method='output_head').logits(hidden)

  tokens = {'input_ids': torch.from_numpy(target)}
  if has_encoder:
    tokens = {
        'input_ids': torch.from_numpy(source),
        'decoder_input_ids': torch.from_numpy(target),
    }
  with torch.no_grad():
    expected = theirs(**tokens).logits.numpy()
  scale = np.max(np.abs(expected))
  found = logits(params)[..., :131]
  np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


def test_transformers_loads_an_export_and_computes_our_embeddings(
    tmp_path, random_parameters, transformers
):
  import torch

  model, params, folder = export(
      tmp_path, random_parameters, 'codet5p_embedding'
  )
  theirs = load(transformers, 'AutoModel', folder)
  tokens = np.random.default_rng(0).integers(11, 131, (2, 7))
  found = jax.jit(functools.partial(model.apply, method='embed'))(
      {'params': params}, jnp.asarray(tokens)
  )
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens)).numpy()
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_trained_bimodal_model_does_the_same_in_pytorch(
    tmp_path, random_parameters, transformers, monkeypatch, caplog
):
  import torch

  ids = {'match_id': 23, 'text_decoder_id': 24, 'code_decoder_id': 25}
  config = dataclasses.replace(
      MODELS['codet5p_bimodal'], initial_temperature=0.07, **ids
  )
  monkeypatch.setitem(MODELS, 'codet5p_bimodal', config)
  with caplog.at_level('INFO', 'codet5p_jax'):
    model, params, folder = export(
        tmp_path, random_parameters, 'codet5p_bimodal'
    )
  [line] = [x for x in caplog.messages if 'temperature' in x]
  assert 'no place for temperature/value, which only training' in line
  theirs = load(transformers, 'AutoModel', folder)
  numbers = np.random.default_rng(0)
  text, code = (numbers.integers(26, 131, (3, n)) for n in (7, 9))
  for row, length in enumerate((9, 6, 8)):
    code[row, length - 1 :] = config.pad_id
    code[row, length - 1] = config.eos_id
  text[1, 4:] = config.pad_id

  @jax.jit
  def compute(params):
    def apply(method, *inputs):
      return model.apply({'params': params}, *inputs, method=method)

    encoded = apply('encode', jnp.asarray(text))
    read = jnp.asarray(code).at[:, 0].set(config.match_id)
    logits = apply('match', encoded, jnp.asarray(text), read)
    return apply('embed', jnp.asarray(text)), logits

  embeddings, logits = compute(params)
  tokens = torch.from_numpy(text), torch.from_numpy(text != config.pad_id)
  codes = torch.from_numpy(code), torch.from_numpy(code != config.pad_id)
  with torch.no_grad():
    np.testing.assert_allclose(embeddings, theirs.embed(*tokens), atol=1e-5)
    expected = theirs.match_logits(*tokens, *codes).numpy()
  scale = np.max(np.abs(expected))
  np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-5)
  # And back, as a model that is used: the tokens come along.
  convert(str(folder), str(tmp_path / 'back'))
  back = open_source(tmp_path / 'back')
  assert back.model == dataclasses.replace(config, initial_temperature=None)
  assert 'temperature/value' not in back.shapes


@pytest.mark.parametrize('kind', ['codet5p_bimodal', 'codet5p_embedding'])
def test_a_released_model_comes_without_a_temperature(
    make_folder, tmp_path, kind
):
  folder = make_folder(kind)
  for name in ('match', 'text_decoder', 'code_decoder'):  # As released.
    folder.config.pop(f'{name}_token_id', None)
  ours = open_source(to_ours(folder.write(), tmp_path))
  assert ours.model == MODELS[kind]
  assert ours.model.initial_temperature is None
  assert ours.model.match_id == 32100
  assert not any('temperature' in path for path in ours.shapes)


def write_run(folder, config, params):
  folder.mkdir()
  write_json(folder / 'config.json', describe({'model': config}))
  save_weights(folder / 'model', params, {'step': 1}, config.vocab_size)
