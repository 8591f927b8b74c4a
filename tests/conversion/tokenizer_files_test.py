import json

import pytest

from codet5p_jax.conversion.tokenizer_files import (
    has_tokenizer,
    read_tokenizer,
    write_tokenizer,
)
from codet5p_jax.errors import UserError

TEXTS = (
    'def f(x):\n\t\treturn  x  # <extra_id_0> [ENC]\n',
    '<s>a</s><pad> <mask> <unk><|endoftext|>\n'
    + ' ' * 40 + '\t' * 12 + '\u00e9',  # fmt: skip
    ' [TDEC] [CDEC]<extra_id_99>  x',
)


@pytest.mark.parametrize(
    'kind', ['codet5', 'codet5_bimodal', 'codegen', 'sentencepiece']
)
def test_a_vocabulary_comes_back(small_vocabularies, tmp_path, kind):
  vocabulary = small_vocabularies[kind]
  assert not has_tokenizer(tmp_path)
  write_tokenizer(vocabulary, tmp_path)
  assert has_tokenizer(tmp_path)
  assert read_tokenizer(tmp_path, kind) == vocabulary
  if kind != 'codegen':
    assert read_tokenizer(tmp_path, 'codet5') == vocabulary


@pytest.mark.parametrize('kind', ['codet5', 'codet5_bimodal', 'codegen'])
def test_transformers_reads_the_files_and_gives_our_ids(
    small_vocabularies, tmp_path, kind
):
  transformers = pytest.importorskip('transformers')
  vocabulary = small_vocabularies[kind]
  write_tokenizer(vocabulary, tmp_path)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    assert tokenizer(text).input_ids == vocabulary.encode_as_released(text)
  expected = ['<s>', '</s>', '<pad>']
  if kind == 'codegen':
    expected = ['<|endoftext|>'] * 3
  found = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
  assert found == expected


def test_files_are_those_of_the_released_repositories(
    small_vocabularies, tmp_path
):
  def written(kind, name):
    folder = tmp_path / kind
    if not folder.exists():
      folder.mkdir()
      write_tokenizer(small_vocabularies[kind], folder)
    return json.loads((folder / name).read_text())

  size = small_vocabularies['codet5'].vocab_size
  pieces = written('codet5', 'vocab.json')
  assert pieces['<extra_id_99>'] == size - 100
  assert pieces['<extra_id_0>'] == size - 1
  assert written('codet5', 'added_tokens.json') == {}
  specials = written('codet5', 'special_tokens_map.json')
  additional = specials['additional_special_tokens']
  assert [token['content'] for token in additional[::99]] == [
      '<extra_id_99>', '<extra_id_0>'
  ]  # fmt: skip
  assert specials['mask_token'] == {
      'content': '<mask>', 'single_word': False, 'lstrip': True,
      'rstrip': False, 'normalized': True,
  }  # fmt: skip
  assert written('codet5_bimodal', 'added_tokens.json') == {
      '[ENC]': size, '[TDEC]': size + 1, '[CDEC]': size + 2
  }  # fmt: skip
  assert written('codet5_bimodal', 'vocab.json') == pieces
  added = written('codegen', 'added_tokens.json')
  first = len(written('codegen', 'vocab.json'))
  assert len(added) == 38
  assert (added[' ' * 31], added['  ']) == (first, first + 29)
  assert (added['\t' * 9], added['\t\t']) == (first + 30, first + 37)


def test_damaged_files_are_told(small_vocabularies, tmp_path):
  write_tokenizer(small_vocabularies['codegen'], tmp_path)
  (tmp_path / 'vocab.json').write_text('{"a": 1')
  with pytest.raises(UserError, match='vocab.json should be JSON'):
    read_tokenizer(tmp_path, 'codegen')
