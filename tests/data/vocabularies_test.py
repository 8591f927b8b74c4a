"""Tests of the vocabularies: losslessness, released ids, folders, words.

That ids equal transformers' is shown in vocabularies_parity_test.py.
"""

import json
import pickle
import re
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from codet5p_jax import errors
from codet5p_jax.data import vocabularies

KINDS = ['codet5', 'codet5_bimodal', 'codegen', 'sentencepiece']
RELEASED_KINDS = KINDS[:3]
SPECIAL_STRINGS = [
    '<pad>', '<s>', '</s>', '<unk>', '<mask>', '<extra_id_0>', '<extra_id_99>',
    '<|endoftext|>', '[ENC]', '[TDEC]', '[CDEC]', '[CLM]', '[MATCH]',
    '<0x41>', '<extra_id_100>', '</s', '\u2581', '\u2047',
]  # fmt: skip
# Special strings, whitespace and code between runs of random characters.
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(SPECIAL_STRINGS),
        st.text(' \t\n\r\u00a0\u2003', max_size=40),
        st.sampled_from(['def', ' self', 'return x_1', '):\n', "n't", '\x00']),
    ),
    max_size=12,
).map(''.join)


def test_mask_and_sentinels_swallow_the_whitespace_before_them_as_released(
    small_vocabularies,
):
  vocabulary = small_vocabularies['codet5']
  tokens = vocabulary.task_tokens
  for name, special_id in (('<mask>', 4), ('<extra_id_3>', tokens.sentinel(3))):
    ids = vocabulary.encode_as_released(f'a \n\t{name} b')
    a, b = vocabulary.encode('a'), vocabulary.encode(' b')
    assert ids == [tokens.bos, *a, special_id, *b, tokens.eos]


def test_other_specials_keep_the_whitespace_around_them_as_released(
    small_vocabularies,
):
  vocabulary = small_vocabularies['codet5_bimodal']
  match = vocabulary.task_tokens.match
  space = vocabulary.encode(' ')
  ids = vocabulary.encode_as_released(' [ENC] ')
  assert ids == [1, *space, match, *space, 2]


def test_our_own_vocabulary_was_never_released(small_vocabularies):
  with pytest.raises(errors.UserError, match='use encode'):
    small_vocabularies['sentencepiece'].encode_as_released('a')


# Encoding and decoding ------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_decoding_gives_random_text_back_and_no_special_id_occurs(
    kind, small_vocabularies
):
  vocabulary = small_vocabularies[kind]
  tokens = vocabulary.task_tokens
  reserved = {tokens.pad, tokens.bos, tokens.eos, tokens.unk, tokens.clm}
  reserved |= {tokens.match, tokens.tdec, tokens.cdec, *tokens.sentinels}

  @hypothesis.settings(deadline=None, max_examples=300)
  @hypothesis.given(TEXTS)
  def check(text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert not (vocabulary.special_ids | reserved) & set(ids)
    assert all(0 <= i < vocabulary.vocab_size for i in ids)

  check()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('text', SPECIAL_STRINGS)
def test_special_strings_are_plain_text(kind, text, small_vocabularies):
  vocabulary = small_vocabularies[kind]
  ids = vocabulary.encode(text)
  assert not vocabulary.special_ids & set(ids)
  assert vocabulary.decode(ids) == text


@pytest.mark.parametrize('kind', ['codet5', 'codegen'])
def test_released_vocabularies_are_lossless_on_random_text(
    kind, released_vocabularies
):
  vocabulary = released_vocabularies[kind]

  @hypothesis.settings(deadline=None)
  @hypothesis.given(TEXTS)
  def check(text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert not vocabulary.special_ids & set(ids)

  check()


@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_encodes_as_its_texts_do(kind, small_vocabularies):
  vocabulary = small_vocabularies[kind]
  texts = ['', 'def f(x):\n  return x', '\u2581 \u2581', '<s>', '\x00']
  batch = vocabulary.encode_batch(iter(texts))
  assert batch == [vocabulary.encode(text) for text in texts]
  assert vocabulary.encode_batch([]) == []


def test_lines_encoded_apart_give_the_ids_of_the_whole(small_vocabularies):
  vocabulary = small_vocabularies['sentencepiece']

  @hypothesis.settings(deadline=None)
  @hypothesis.given(st.lists(TEXTS, max_size=4).map('\n'.join))
  def check(text):
    # A batch is encoded without regard to lines.
    assert vocabulary.encode(text) == vocabulary.encode_batch([text])[0]

  check()


@pytest.mark.parametrize('kind', KINDS)
def test_a_lone_surrogate_is_an_error(kind, small_vocabularies):
  vocabulary = small_vocabularies[kind]
  message = 'character 1 is the lone surrogate U\\+D83D'
  with pytest.raises(errors.UserError, match=message):
    vocabulary.encode('a\ud83d')
  with pytest.raises(errors.UserError, match=message):
    vocabulary.encode_batch(['a', 'b\ud83d'])


@pytest.mark.parametrize('kind', KINDS)
def test_decode_skips_special_ids_and_those_outside(kind, small_vocabularies):
  vocabulary = small_vocabularies[kind]
  tokens = vocabulary.task_tokens
  [a] = vocabulary.encode('a')
  ids = [tokens.pad, a, tokens.sentinel(0), -100, a, tokens.eos]
  ids += [vocabulary.vocab_size, vocabulary.padded_vocab_size + 5]
  assert vocabulary.decode(ids) == 'aa'
  assert vocabulary.decode(np.array(ids, np.int32)) == 'aa'
  assert vocabulary.decode(np.array(ids).tolist()) == 'aa'
  shown = vocabulary.decode(ids, skip_special_ids=False)
  assert shown.replace('<|endoftext|>', '').startswith(
      ('<pad>a<extra_id_0>a', 'a<extra_id_0>a')
  )


def test_decode_shows_a_character_cut_in_two_as_a_replacement(
    small_vocabularies,
):
  vocabulary = small_vocabularies['codet5']
  ids = vocabulary.encode('a\U0001f600')
  assert vocabulary.decode(ids[:-1]) == 'a\ufffd'


def test_released_sizes_are_logical_and_tables_are_padded(
    released_vocabularies,
):
  sizes = {
      kind: (vocabulary.vocab_size, vocabulary.padded_vocab_size)
      for kind, vocabulary in released_vocabularies.items()
  }
  assert sizes == {
      'codet5': (32_100, 32_128),
      'codet5_bimodal': (32_103, 32_128),
      'codegen': (51_200, 51_200),
  }


def test_codegen_takes_the_longest_run_of_whitespace_first(
    released_vocabularies,
):
  vocabulary = released_vocabularies['codegen']
  assert vocabulary.encode(' ' * 33) == [50_257, 50_286]
  assert vocabulary.encode('\t' * 10) == [50_287, 197]
  assert vocabulary.encode('a\n  b') == [64, 198, 50_286, 65]


# Words ------------------------------------------------------------------------


def slow_word_starts(vocabulary, text, ids):
  """Walks over tokens, words and bytes one by one."""
  first_bytes, position = set(), 0
  for word in re.findall(r'[A-Za-z0-9_]+|\s+|.', text, re.DOTALL):
    first_bytes.add(position)
    position += len(word.encode())
  starts, position = [], 0
  for i in ids:
    starts.append(position in first_bytes)
    position += len(vocabulary._pieces[i])
  assert position == len(text.encode())
  return starts


@pytest.mark.parametrize('kind', KINDS)
def test_word_starts_equal_those_of_a_slow_walk(kind, small_vocabularies):
  vocabulary = small_vocabularies[kind]

  @hypothesis.settings(deadline=None)
  @hypothesis.given(TEXTS)
  def check(text):
    ids, starts = vocabulary.encode_with_word_starts(text)
    assert (ids.dtype, starts.dtype) == (np.int32, np.bool_)
    assert ids.tolist() == vocabulary.encode(text)
    assert starts.tolist() == slow_word_starts(vocabulary, text, ids)
    assert starts[:1].all()

  check()


@pytest.mark.parametrize('kind', RELEASED_KINDS)
def test_word_starts_of_code_equal_those_of_a_slow_walk(
    kind, released_vocabularies, training_texts
):
  vocabulary = released_vocabularies[kind]
  for text in training_texts[:5]:
    ids, starts = vocabulary.encode_with_word_starts(text)
    assert starts.tolist() == slow_word_starts(vocabulary, text, ids)


def test_a_token_that_straddles_two_words_joins_them(released_vocabularies):
  """The pieces are foo, ' (', bar, '):', and a newline."""
  vocabulary = released_vocabularies['codet5']
  ids, starts = vocabulary.encode_with_word_starts('foo (bar):\n')
  pieces = [vocabulary.decode([i]) for i in ids]
  assert pieces == ['foo', ' (', 'bar', '):', '\n']
  assert starts.tolist() == [True] * 5
  # Here 'n' ends the first word and the quote is joined by what straddles.
  ids, starts = vocabulary.encode_with_word_starts(" xyzzy='")
  pieces = [vocabulary.decode([i]) for i in ids]
  assert (''.join(pieces), starts[0]) == (" xyzzy='", True)
  assert not starts[1]


def test_word_starts_need_the_ids_of_the_text(small_vocabularies):
  vocabulary = small_vocabularies['codet5']
  ids = vocabulary.encode('foo bar')
  for wrong in (ids[1:], [1, *ids], [*ids, 2]):
    with pytest.raises(ValueError, match='exactly the ids'):
      vocabulary.word_starts('foo bar', wrong)


# Folders and identity -------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_a_saved_folder_loads_to_the_same_vocabulary(
    kind, small_vocabularies, tmp_path
):
  vocabulary = small_vocabularies[kind]
  folder = tmp_path / 'run' / 'vocabulary'
  vocabulary.save(folder)
  loaded = vocabularies.load_vocabulary(folder)
  assert type(loaded) is type(vocabulary) and loaded.kind == kind
  assert loaded == vocabulary and hash(loaded) == hash(vocabulary)
  assert loaded.task_tokens == vocabulary.task_tokens
  assert loaded.vocab_size == vocabulary.vocab_size
  text = 'def f(x):\n  return "<s>" + x'
  assert loaded.encode(text) == vocabulary.encode(text)
  assert loaded.decode(loaded.encode(text)) == text
  description = json.loads((folder / 'vocabulary.json').read_text())
  assert description['format_version'] == 1
  assert description['fingerprint'] == vocabulary.fingerprint
  # Nothing is left beside it.
  assert [path.name for path in folder.parent.iterdir()] == ['vocabulary']


def test_saving_again_changes_nothing_and_another_vocabulary_is_an_error(
    small_vocabularies, tmp_path
):
  folder = tmp_path / 'vocabulary'
  folder.mkdir()
  small_vocabularies['codet5'].save(folder)
  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  small_vocabularies['codet5'].save(folder)
  assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
  with pytest.raises(errors.UserError, match='already holds another'):
    small_vocabularies['codegen'].save(folder)


def test_a_place_that_cannot_be_written_is_an_error(
    small_vocabularies, tmp_path
):
  (tmp_path / 'file').write_text('')
  for folder in (tmp_path / 'file', tmp_path / 'file' / 'vocabulary'):
    with pytest.raises(errors.UserError, match='cannot write'):
      small_vocabularies['codet5'].save(folder)
  assert [path.name for path in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize('kind', ['codet5', 'codegen', 'sentencepiece'])
def test_a_damaged_folder_is_an_error_of_one_line(
    kind, small_vocabularies, tmp_path
):
  def damage(name, change):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    small_vocabularies[kind].save(folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if change is not None:
      (folder / name).write_bytes(change(content))
    with pytest.raises(errors.UserError) as caught:
      vocabularies.load_vocabulary(folder)
    message = str(caught.value)
    assert '\n' not in message and str(folder) in message
    return message

  small_vocabularies[kind].save(tmp_path / '0')
  for path in (tmp_path / '0').iterdir():
    if path.name == 'vocabulary.json':
      assert 'no vocabulary.json' in damage(path.name, None) or (
          'the files of Hugging Face' in damage(path.name, None)
      )
    else:
      assert 'cannot read it' in damage(path.name, None)
      assert 'is damaged' in damage(path.name, lambda old: old[:-1])
      assert 'is damaged' in damage(path.name, lambda old: b'')
  assert 'should be JSON' in damage('vocabulary.json', lambda old: old[:-3])
  assert 'format_version 1' in damage(
      'vocabulary.json', lambda old: old.replace(b'version": 1', b'version": 2')
  )
  assert 'should name a kind' in damage(
      'vocabulary.json', lambda old: old.replace(kind.encode(), b'word')
  )


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
  with pytest.raises(errors.UserError, match='vocabulary.json'):
    vocabularies.load_vocabulary(tmp_path / 'nowhere')


@pytest.mark.parametrize('kind', KINDS)
def test_a_vocabulary_can_be_sent_to_another_process(kind, small_vocabularies):
  vocabulary = small_vocabularies[kind]
  copy = pickle.loads(pickle.dumps(vocabulary))
  assert copy == vocabulary
  assert copy.encode('if x:\n\treturn') == vocabulary.encode('if x:\n\treturn')


def test_kinds_on_the_same_files_are_not_equal(small_vocabularies):
  assert len(set(small_vocabularies.values())) == len(KINDS)
  assert small_vocabularies['codet5'] != small_vocabularies['codet5_bimodal']
  assert small_vocabularies['codet5'] != 'codet5'


def test_the_fingerprint_does_not_depend_on_how_the_files_are_spelled(
    small_codet5_files, small_vocabularies, tmp_path
):
  """Escaped or not, in any order, with the sentinels or without."""
  ids = json.loads((small_codet5_files / 'vocab.json').read_text())
  for k in range(99, -1, -1):
    ids[f'<extra_id_{k}>'] = len(ids)
  reordered = dict(reversed(ids.items()))
  (tmp_path / 'vocab.json').write_text(
      json.dumps(reordered, ensure_ascii=False, indent=1), encoding='utf-8'
  )
  merges = (small_codet5_files / 'merges.txt').read_bytes()
  (tmp_path / 'merges.txt').write_bytes(merges.replace(b'\n', b'\r\n'))
  again = vocabularies.ByteLevelBPE.codet5(
      tmp_path / 'vocab.json', tmp_path / 'merges.txt'
  )
  assert again.fingerprint == small_vocabularies['codet5'].fingerprint


# Making them ----------------------------------------------------------------


def test_files_of_another_vocabulary_are_an_error(
    small_codet5_files, small_codegen_files, tmp_path
):
  make_codet5 = vocabularies.ByteLevelBPE.codet5
  with pytest.raises(errors.UserError, match='cannot read it'):
    make_codet5(tmp_path / 'vocab.json', small_codet5_files / 'merges.txt')
  with pytest.raises(errors.UserError, match='should begin with <pad>'):
    make_codet5(
        small_codegen_files / 'vocab.json', small_codegen_files / 'merges.txt'
    )
  (tmp_path / 'merges.txt').write_text('a \u0142\n', encoding='utf-8')
  with pytest.raises(errors.UserError, match='does not belong to') as caught:
    make_codet5(small_codet5_files / 'vocab.json', tmp_path / 'merges.txt')
  assert '\n' not in str(caught.value)


def test_merges_that_could_spell_a_special_token_are_an_error(
    small_codet5_files, tmp_path
):
  """Or a text could encode to a special id."""
  merges = (small_codet5_files / 'merges.txt').read_text(encoding='utf-8')
  merges += '< s\n<s >\n'
  (tmp_path / 'merges.txt').write_text(merges, encoding='utf-8')
  with pytest.raises(errors.UserError, match='does not belong to'):
    vocabularies.ByteLevelBPE.codet5(
        small_codet5_files / 'vocab.json', tmp_path / 'merges.txt'
    )


def test_sentencepiece_reads_the_model_it_wrote(small_vocabularies, tmp_path):
  vocabulary = small_vocabularies['sentencepiece']
  vocabulary.save(tmp_path / 'vocabulary')
  [model_file] = (tmp_path / 'vocabulary').glob('*.model')
  assert vocabularies.SentencePiece.from_file(model_file) == vocabulary
  with pytest.raises(errors.UserError, match='cannot read it'):
    vocabularies.SentencePiece.from_file(tmp_path / 'no.model')


def test_a_sentencepiece_model_that_loses_text_is_an_error(
    training_texts, tmp_path, monkeypatch
):
  """As it would if it dropped the whitespace at the ends."""
  from codet5p_jax.data import sentencepiece_models

  settings = sentencepiece_models._TRAINING_SETTINGS
  monkeypatch.setitem(settings, 'remove_extra_whitespaces', True)
  with pytest.raises(errors.UserError, match='keep every character'):
    vocabularies.SentencePiece.train(training_texts, 700)


def test_training_on_a_lone_surrogate_is_an_error():
  with pytest.raises(errors.UserError, match='lone surrogate'):
    vocabularies.SentencePiece.train(['x = 1\n' * 2000, '\udc80'], 700)


def test_importing_the_module_imports_no_heavy_library():
  program = (
      'import sys, codet5p_jax.data.vocabularies\n'
      'heavy = "jax seqio sentencepiece tensorflow tokenizers transformers"\n'
      'print([name for name in heavy.split() if name in sys.modules])'
  )
  output = subprocess.run(
      [sys.executable, '-c', program],
      capture_output=True,
      check=True,
      text=True,
  )
  assert output.stdout.strip() == '[]'
