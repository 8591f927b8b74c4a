import types

import pytest

from codet5p_jax.corpus.folder import (
    pair_rows,
    pair_texts,
    token_store_folder,
)
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_the_store_of_a_split_is_found_by_the_vocabulary(small_corpus, split):
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  folder = token_store_folder(small_corpus, vocabulary, split)
  [expected] = small_corpus.glob(f'tokens/*/{split}')
  assert folder == expected


def test_a_folder_that_is_no_corpus_is_one_clear_line(tmp_path):
  vocabulary = types.SimpleNamespace(fingerprint='ab' * 32)
  with pytest.raises(UserError, match='expected a corpus folder') as error:
    token_store_folder(tmp_path, vocabulary, 'train')
  assert f'codet5p prepare_corpus --corpus_dir={tmp_path}' in str(error.value)
  assert '\n' not in str(error.value)


def test_tokens_of_another_vocabulary_are_one_clear_line(small_corpus):
  mine = load_vocabulary(small_corpus / 'vocabulary').fingerprint
  foreign = types.SimpleNamespace(fingerprint='ab' * 32)
  with pytest.raises(UserError, match='expected tokens of vocabulary') as error:
    token_store_folder(small_corpus, foreign, 'train')
  assert foreign.fingerprint[:16] in str(error.value)
  assert mine[:16] in str(error.value)
  assert '\n' not in str(error.value)


def test_a_split_that_there_is_not_is_one_clear_line(small_corpus):
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  with pytest.raises(
      UserError, match="train, validation, test, found 'valid'"
  ) as error:
    token_store_folder(small_corpus, vocabulary, 'valid')
  assert '\n' not in str(error.value)


def test_a_corpus_without_any_tokens_says_that_there_are_none(tmp_path):
  (tmp_path / 'metadata.json').write_text('{}')
  vocabulary = types.SimpleNamespace(fingerprint='ab' * 32)
  with pytest.raises(UserError, match='found those of none'):
    token_store_folder(tmp_path, vocabulary, 'train')


def expect_refusal(match, function, *arguments):
  with pytest.raises(UserError, match=match) as error:
    function(*arguments)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_the_pairs_of_a_split_are_found_by_the_vocabulary(
    paired_corpus, split
):
  vocabulary = load_vocabulary(paired_corpus / 'vocabulary')
  rows = pair_rows(paired_corpus, vocabulary, split)
  texts = pair_texts(paired_corpus, split)
  assert len(rows) == len(texts) > 1
  assert vocabulary.decode(rows[1]['code']) == texts[1]['code']


def test_pairs_of_no_corpus_are_one_clear_line(tmp_path):
  vocabulary = types.SimpleNamespace(fingerprint='ab' * 32)
  expect_refusal('a corpus folder', pair_rows, tmp_path, vocabulary, 'train')
  expect_refusal('a corpus folder', pair_texts, tmp_path, 'train')


def test_a_corpus_without_pairs_is_one_clear_line(small_corpus):
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  match = 'pairs in .*small, found none; prepare it again with --pairs'
  expect_refusal(match, pair_rows, small_corpus, vocabulary, 'train')
  expect_refusal(match, pair_texts, small_corpus, 'train')


def test_pairs_of_another_split_or_vocabulary_are_one_clear_line(
    paired_corpus
):
  mine = load_vocabulary(paired_corpus / 'vocabulary')
  foreign = types.SimpleNamespace(fingerprint='ab' * 32)
  expect_refusal(
      f'vocabulary abababababababab .* those of {mine.fingerprint[:16]};',
      pair_rows, paired_corpus, foreign, 'train',
  )  # fmt: skip
  expect_refusal(
      "found 'valid'", pair_rows, paired_corpus, mine, 'valid'
  )
  expect_refusal(
      "found 'valid'", pair_texts, paired_corpus, 'valid'
  )
