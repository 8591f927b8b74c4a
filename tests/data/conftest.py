"""Vocabularies for tests: small ones trained here, and the released ones."""

import gzip
import json
import os
import pathlib
import sysconfig

import pytest

from codet5p_jax.data import vocabularies


def read_standard_library(pattern='**/*.py'):
  """Returns the text of each of the interpreter's own modules."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  texts = []
  for path in sorted(root.glob(pattern)):
    if 'site-packages' in path.parts or not path.is_file():
      continue
    content = path.read_bytes()
    try:
      texts.append(content.decode())
    except UnicodeDecodeError:
      texts.append(content.decode('latin-1'))
  return texts


@pytest.fixture(scope='session')
def standard_library():
  """Every Python file of the interpreter's standard library, shortest first.

  Neighbours of one size keep all cores busy when they are encoded together.
  """
  return sorted(read_standard_library(), key=len)


@pytest.fixture(scope='session')
def training_texts():
  """A third of a million characters of code."""
  return read_standard_library('[a-d]*.py')[:30]


def _train_bpe(texts, special_tokens):
  """Returns the pieces by id and the merges of a byte-level BPE."""
  import tokenizers

  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False
  )
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=600,
      special_tokens=list(special_tokens),
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  model = json.loads(tokenizer.to_str())['model']
  pieces = sorted(model['vocab'], key=model['vocab'].get)
  return pieces, [' '.join(pair) for pair in model['merges']]


def _write_bpe(folder, pieces, merges):
  ids = {piece: index for index, piece in enumerate(pieces)}
  (folder / 'vocab.json').write_text(json.dumps(ids), encoding='utf-8')
  lines = '\n'.join(['#version: 0.2', *merges, ''])
  (folder / 'merges.txt').write_text(lines, encoding='utf-8')
  return folder


@pytest.fixture(scope='session')
def small_codet5_files(tmp_path_factory, training_texts):
  """A folder with vocab.json and merges.txt in the form of CodeT5's."""
  pieces, merges = _train_bpe(
      training_texts, ['<pad>', '<s>', '</s>', '<unk>', '<mask>']
  )
  return _write_bpe(tmp_path_factory.mktemp('codet5'), pieces, merges)


@pytest.fixture(scope='session')
def small_codegen_files(tmp_path_factory, training_texts):
  """A folder with vocab.json and merges.txt in the form of GPT-2's."""
  pieces, merges = _train_bpe(training_texts, [])
  pieces.append('<|endoftext|>')
  return _write_bpe(tmp_path_factory.mktemp('codegen'), pieces, merges)


@pytest.fixture(scope='session')
def released_files(tmp_path_factory):
  """Folders with the files of CodeT5 and of GPT-2, by name."""
  data = os.environ.get('CODET5P_TEST_DATA')
  if not data:
    pytest.skip('the released files need CODET5P_TEST_DATA')
  folders = {}
  for name in ('codet5', 'gpt2'):
    folders[name] = tmp_path_factory.mktemp(f'released_{name}')
    for file_name in ('vocab.json', 'merges.txt'):
      packed = pathlib.Path(data, 'tokenizers', name, f'{file_name}.gz')
      content = gzip.decompress(packed.read_bytes())
      (folders[name] / file_name).write_bytes(content)
  return folders


def _make_codet5(folder, bimodal=False):
  return vocabularies.ByteLevelBPE.codet5(
      folder / 'vocab.json', folder / 'merges.txt', bimodal=bimodal
  )


def _make_codegen(folder):
  return vocabularies.ByteLevelBPE.codegen(
      folder / 'vocab.json', folder / 'merges.txt'
  )


@pytest.fixture(scope='session')
def small_vocabularies(
    small_codet5_files, small_codegen_files, training_texts
):
  """A small vocabulary of each kind, by kind."""
  return {
      'codet5': _make_codet5(small_codet5_files),
      'codet5_bimodal': _make_codet5(small_codet5_files, bimodal=True),
      'codegen': _make_codegen(small_codegen_files),
      'sentencepiece': vocabularies.SentencePiece.train(training_texts, 700),
  }


@pytest.fixture(scope='session')
def released_vocabularies(released_files):
  """The vocabulary of each released kind, by kind."""
  return {
      'codet5': _make_codet5(released_files['codet5']),
      'codet5_bimodal': _make_codet5(released_files['codet5'], bimodal=True),
      'codegen': _make_codegen(released_files['gpt2']),
  }
