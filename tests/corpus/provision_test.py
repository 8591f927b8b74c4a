import json
import shutil

import pytest

from codet5p_jax.corpus import folder as layout
from codet5p_jax.corpus import provision
from codet5p_jax.corpus.provision import corpus_of
from codet5p_jax.corpus.token_store import TokenRows
from codet5p_jax.data.vocabularies import SentencePiece, load_vocabulary
from codet5p_jax.errors import UserError


@pytest.fixture(scope='module')
def other_vocabulary(source_files, tmp_path_factory):
  """The folder of a vocabulary that is not the corpus's own."""
  folder = tmp_path_factory.mktemp('vocabularies') / 'other'
  SentencePiece.train((f.text for f in source_files[:9]), 500).save(folder)
  return folder


def test_a_corpus_is_its_own(small_corpus, tmp_path):
  unused = tmp_path / 'corpus'
  arguments = str(small_corpus), str(unused)
  assert corpus_of(*arguments) == str(small_corpus)
  own = str(small_corpus / 'vocabulary')
  assert corpus_of(*arguments, own) == str(small_corpus)
  assert not unused.exists()


def test_source_files_become_a_corpus_once(
    source_files, other_vocabulary, tmp_path
):
  for file in source_files:
    path = tmp_path / 'mine' / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(file.text)
  arguments = (
      str(tmp_path / 'mine'), str(tmp_path / 'corpus'), str(other_vocabulary)
  )
  assert corpus_of(*arguments) == str(tmp_path / 'corpus')
  metadata = json.loads((tmp_path / 'corpus' / 'metadata.json').read_text())
  assert metadata['origins'] == 12 and sum(metadata['files'].values()) == 36
  before = (tmp_path / 'corpus').stat().st_mtime_ns
  assert corpus_of(*arguments) == str(tmp_path / 'corpus')
  assert (tmp_path / 'corpus').stat().st_mtime_ns == before


def test_rows_become_a_corpus(
    source_files, write_rows, other_vocabulary, tmp_path
):
  rows = write_rows(tmp_path / 'rows.jsonl', source_files)
  corpus = corpus_of(
      f'jsonl://{rows}?field=text', str(tmp_path / 'c'), str(other_vocabulary)
  )
  vocabulary = load_vocabulary(other_vocabulary)
  folder = layout.token_store_folder(tmp_path / 'c', vocabulary, 'test')
  assert corpus == str(tmp_path / 'c') and TokenRows(folder, 8)[0]


def test_a_corpus_is_tokenised_with_a_further_vocabulary(
    source_files, make_small_corpus, other_vocabulary, tmp_path
):
  make_small_corpus(source_files, tmp_path / 'corpus')
  own = load_vocabulary(tmp_path / 'corpus' / 'vocabulary')
  other = load_vocabulary(other_vocabulary)
  for _ in range(2):
    corpus_of(str(tmp_path / 'corpus'), str(tmp_path / 'x'),
              str(other_vocabulary))  # fmt: skip
  assert len(list((tmp_path / 'corpus' / 'tokens').iterdir())) == 2
  for split in layout.SPLITS:
    texts = []
    for vocabulary in (own, other):
      folder = layout.token_store_folder(
          tmp_path / 'corpus', vocabulary, split
      )
      length = TokenRows(folder, 1).metadata['num_tokens']
      [row] = TokenRows(folder, length)
      texts.append(vocabulary.decode(row['tokens']))
    assert texts[0] == texts[1]


def test_pairs_are_tokenised_with_a_further_vocabulary(
    paired_corpus, other_vocabulary, tmp_path, monkeypatch
):
  shutil.copytree(paired_corpus, tmp_path / 'corpus')
  monkeypatch.setattr(provision, '_PAIRS_AT_ONCE', 7)
  other = load_vocabulary(other_vocabulary)
  arguments = str(tmp_path / 'corpus'), None, str(other_vocabulary)
  corpus_of(*arguments, pairs=True)
  [store] = (tmp_path / 'corpus' / 'pair_tokens').glob(
      f'{other.fingerprint[:16]}'
  )
  before = store.stat().st_mtime_ns
  corpus_of(*arguments, pairs=True)
  assert store.stat().st_mtime_ns == before
  for split in layout.SPLITS:
    texts = layout.pair_texts(tmp_path / 'corpus', split)
    rows = layout.pair_rows(tmp_path / 'corpus', other, split)
    assert len(rows) == len(texts)
    for index in range(len(texts)):
      text, row = texts[index], rows[index]
      assert row['text'].tolist() == other.encode(text['text'])
      assert row['code'].tolist() == other.encode(text['code'])


def test_a_side_that_another_vocabulary_leaves_empty_stays_aligned(
    paired_corpus, other_vocabulary, tmp_path, monkeypatch
):
  shutil.copytree(paired_corpus, tmp_path / 'corpus')
  path = tmp_path / 'corpus' / 'metadata.json'
  metadata = json.loads(path.read_text())
  metadata['pairs']['test'] = 0
  path.write_text(json.dumps(metadata))
  real = SentencePiece.encode_batch
  monkeypatch.setattr(
      SentencePiece,
      'encode_batch',
      lambda self, texts: [
          [] if 'beta' in text else ids
          for text, ids in zip(texts, real(self, texts), strict=True)
      ],
  )
  corpus_of(str(tmp_path / 'corpus'), None, str(other_vocabulary))
  other = load_vocabulary(other_vocabulary)
  texts = layout.pair_texts(tmp_path / 'corpus', 'train')
  rows = layout.pair_rows(tmp_path / 'corpus', other, 'train')
  assert len(rows) == len(texts)
  empty = [not len(rows[i]['text']) for i in range(len(rows))]
  assert empty == ['beta' in texts[i]['text'] for i in range(len(texts))]
  assert any(empty) and not all(empty)
  # A split that has none stays so.
  with pytest.raises(UserError, match='at least one pair'):
    layout.pair_rows(tmp_path / 'corpus', other, 'test')


def test_pairs_are_asked_for(source_files, write_rows, small_corpus, tmp_path):
  with pytest.raises(
      UserError, match='pairs in .*, found none; prepare it again with --pairs'
  ) as error:
    corpus_of(str(small_corpus), None, pairs=True)
  assert '\n' not in str(error.value)
  rows = write_rows(tmp_path / 'rows.jsonl', source_files)
  arguments = str(rows), str(tmp_path / 'corpus')
  corpus_of(*arguments, vocab_size=600, pairs=True)
  assert len(layout.pair_texts(tmp_path / 'corpus', 'train')) > 9
  assert corpus_of(*arguments, vocab_size=600, pairs=True) == arguments[1]
  assert corpus_of(arguments[1], None, pairs=True) == arguments[1]


def test_what_is_neither_is_one_clear_line(tmp_path):
  with pytest.raises(UserError, match="found '.*/nowhere'; check") as error:
    corpus_of(str(tmp_path / 'nowhere'), str(tmp_path / 'corpus'))
  assert '\n' not in str(error.value)
  assert not list(tmp_path.iterdir())
