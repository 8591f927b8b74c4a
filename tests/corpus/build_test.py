import dataclasses
import errno
import json
import pathlib
import resource

import numpy as np
import pytest

from codet5p_jax.corpus import build, tfds_builder
from codet5p_jax.corpus.build import build_corpus
from codet5p_jax.corpus.source_files import SourceFile
from codet5p_jax.corpus.splits import split_origins
from codet5p_jax.corpus.token_store import TokenRows
from codet5p_jax.data.vocabularies import SentencePiece, load_vocabulary
from codet5p_jax.errors import UserError

VOCAB_SIZE = 600
SETTINGS = {'source': 'test'}
SPLITS = ('train', 'validation', 'test')


@pytest.fixture(scope='module')
def split_of(source_files):
  return split_origins((file.origin for file in source_files), 0.03, 0.03)


def in_split(files, split_of, split):
  return [file for file in files if split_of[file.origin] == split]


@pytest.mark.parametrize('split', SPLITS)
def test_the_store_holds_the_files_of_its_split_in_their_order(
    small_corpus, source_files, split_of, split
):
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  ids, starts = [], []
  for file in in_split(source_files, split_of, split):
    file_ids, file_starts = vocabulary.encode_with_word_starts(file.text)
    ids += [*file_ids.tolist(), vocabulary.task_tokens.eos]
    starts += [*file_starts.tolist(), True]
  [folder] = small_corpus.glob(f'tokens/*/{split}')
  [row] = TokenRows(folder, len(ids))
  assert row['tokens'].tolist() == ids
  assert row['word_starts'].tolist() == starts


def test_metadata_tells_what_was_made(small_corpus, source_files, split_of):
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  texts = {
      split: [file.text for file in in_split(source_files, split_of, split)]
      for split in SPLITS
  }
  assert all(texts.values())
  assert json.loads((small_corpus / 'metadata.json').read_text()) == {
      'format_version': 1,
      'files': {split: len(part) for split, part in texts.items()},
      'tokens': {
          split: sum(len(vocabulary.encode(text)) + 1 for text in part)
          for split, part in texts.items()
      },
      'languages': {'python': len(source_files)},
      'licences': {'MIT': len(source_files)},
      'vocabulary_fingerprint': vocabulary.fingerprint,
      'dropped': {'unreadable': 0, 'empty': 0, 'duplicate': 0},
      'settings': SETTINGS,
  }


def test_no_origin_is_in_two_splits(small_corpus, split_of):
  for split in SPLITS:
    rows = tfds_builder.read_files(small_corpus / 'files', split)
    origins = {row['origin'].decode() for row in rows}
    assert origins == {o for o, place in split_of.items() if place == split}


def test_what_is_no_new_file_is_dropped_and_counted(
    small_corpus, source_files, tmp_path
):
  spaced = dataclasses.replace(
      source_files[3],
      text=source_files[3].text.replace('\n  ', '\r\n\t') + '\n\n',
      origin='a_copy',
  )
  empty = dataclasses.replace(source_files[0], text=' \n\t\n')
  files = [*source_files, None, spaced, empty, source_files[5], None, spaced]
  metadata = build_corpus(
      iter(files), tmp_path / 'corpus', VOCAB_SIZE, SETTINGS
  )
  assert metadata['dropped'] == {'unreadable': 2, 'empty': 1, 'duplicate': 3}
  # The rest makes the very corpus that it makes alone.
  expected = json.loads((small_corpus / 'metadata.json').read_text())
  assert metadata == expected | {'dropped': metadata['dropped']}
  assert json.loads((tmp_path / 'corpus/metadata.json').read_text()) == metadata


def test_the_vocabulary_is_trained_on_the_training_split_only(
    small_corpus, source_files, split_of, tmp_path
):
  word = 'zyxquorb'
  changed = [
      file
      if split_of[file.origin] == 'train'
      else dataclasses.replace(file, text=file.text + f'{word}\n' * 500)
      for file in source_files
  ]
  everything = SentencePiece.train((file.text for file in changed), VOCAB_SIZE)
  assert len(everything.encode(word)) == 1  # It would have a piece of its own.
  build_corpus(changed, tmp_path / 'corpus', VOCAB_SIZE, SETTINGS)
  vocabulary = load_vocabulary(tmp_path / 'corpus' / 'vocabulary')
  assert len(vocabulary.encode(word)) > 4
  assert vocabulary == load_vocabulary(small_corpus / 'vocabulary')


def test_chunks_for_the_vocabulary_are_whole_lines(source_files):
  chunks = list(build._chunks(source_files))
  assert ''.join(chunks) == ''.join(file.text for file in source_files)
  assert max(map(len, chunks)) <= 2000
  assert all(chunk.endswith('\n') for chunk in chunks)


def test_a_line_longer_than_a_chunk_is_cut_for_the_vocabulary_only():
  text = f'a = 1\nb = "{"x" * 5000}"\nc = 2\n'
  file = SourceFile(text, 'python', 'MIT', 'a', 'a.py')
  chunks = list(build._chunks([file]))
  assert chunks == ['a = 1\n', text[6:2006], 'c = 2\n']


def expect_refusal(match, files, corpus_dir):
  with pytest.raises(UserError, match=match) as error:
    build_corpus(files, corpus_dir, VOCAB_SIZE, SETTINGS)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('is_folder', [True, False])
def test_what_is_there_is_never_overwritten(source_files, tmp_path, is_folder):
  corpus_dir = tmp_path / 'corpus'
  if is_folder:
    corpus_dir.mkdir()
  else:
    corpus_dir.write_text('mine')
  expect_refusal('found that it exists; remove it', source_files, corpus_dir)
  assert list(tmp_path.iterdir()) == [corpus_dir]
  assert corpus_dir.is_dir() == is_folder


def test_a_folder_that_cannot_be_made_is_one_clear_line(source_files, tmp_path):
  (tmp_path / 'file').write_text('mine')
  expect_refusal(
      'expected to write the corpus to .*Not a directory; choose a folder',
      source_files,
      tmp_path / 'file' / 'corpus',
  )
  assert (tmp_path / 'file').read_text() == 'mine'


def test_too_few_origins_are_one_clear_line_and_leave_nothing(
    source_files, tmp_path
):
  files = [file for file in source_files if file.origin.startswith('alpha_0')]
  expect_refusal(
      'at least 3 packages .* found 1, so nothing is left for validation, test',
      files,
      tmp_path / 'corpus',
  )
  expect_refusal('at least 3 packages .* found 0', [], tmp_path / 'corpus')
  assert not list(tmp_path.iterdir())


def test_too_little_text_for_the_vocabulary_leaves_nothing(
    source_files, tmp_path
):
  with pytest.raises(UserError, match='vocabulary of 5000 pieces') as error:
    build_corpus(source_files, tmp_path / 'corpus', 5000, SETTINGS)
  assert '\n' not in str(error.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('fault', 'expected'),
    [
        (OSError(errno.ENOSPC, 'No space left on device'), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ZeroDivisionError(), ZeroDivisionError),
    ],
    ids=['full disk', 'interrupt', 'bug'],
)
def test_a_failure_midway_leaves_nothing_behind(
    source_files, tmp_path, monkeypatch, fault, expected
):
  calls = []

  def write_token_store(folder, *others):
    calls.append(folder)
    folder.mkdir(parents=True)
    if len(calls) == 2:
      raise fault

  monkeypatch.setattr(
      build, 'write_token_store', lambda *a: write_token_store(*a) or {}
  )
  with pytest.raises(expected) as error:
    build_corpus(source_files, tmp_path / 'corpus', VOCAB_SIZE, SETTINGS)
  assert len(calls) == 2
  assert not list(tmp_path.iterdir())
  if expected is UserError:
    assert 'No space left on device; choose a folder' in str(error.value)
    assert '\n' not in str(error.value)


def test_a_disk_that_is_full_for_the_tokens_is_one_clear_line(
    source_files, tmp_path, monkeypatch
):
  """A limit on the size of files stands for the disk: both fail in write."""
  real = build.write_token_store

  def write_token_store(folder, documents, *others):
    rng = np.random.default_rng(0)
    many = [
        (rng.integers(0, VOCAB_SIZE, 20_000), np.zeros(20_000, bool))
        for _ in range(5)
    ]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))
    try:
      return real(folder, iter(many), *others)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)

  monkeypatch.setattr(build, 'write_token_store', write_token_store)
  expect_refusal(
      'expected to write the corpus to .*File too large; choose a folder',
      source_files,
      tmp_path / 'corpus',
  )
  assert not list(tmp_path.iterdir())


def test_what_a_killed_build_left_is_replaced(
    small_corpus, source_files, tmp_path
):
  left = tmp_path / 'corpus.partial' / 'vocabulary'
  left.mkdir(parents=True)
  (left / 'vocabulary.json').write_text('{')
  corpus_dir = tmp_path / 'corpus'
  build_corpus(source_files, corpus_dir, VOCAB_SIZE, SETTINGS)
  assert list(tmp_path.iterdir()) == [corpus_dir]
  assert relative_files(corpus_dir) == relative_files(small_corpus)
  for name in relative_files(corpus_dir):
    if name.suffix == '.json' and name.parts[0] != 'files':
      assert (corpus_dir / name).read_bytes() == (
          small_corpus / name
      ).read_bytes()


def relative_files(folder: pathlib.Path):
  return sorted(
      path.relative_to(folder) for path in folder.rglob('*') if path.is_file()
  )
