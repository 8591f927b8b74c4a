import dataclasses
import errno
import json
import pathlib
import subprocess
import sys
import time

import pytest

from codet5p_jax.corpus import build, sources, tfds_builder
from codet5p_jax.corpus.build import CorpusSettings, build_corpus
from codet5p_jax.corpus.executors import Beam, Processes
from codet5p_jax.corpus.pairs.pairing import PairUnit
from codet5p_jax.corpus.splits import split_origins
from codet5p_jax.corpus.token_store import TokenRows
from codet5p_jax.corpus.tokenisation import TokeniseUnit
from codet5p_jax.corpus.work_folder import work_folder
from codet5p_jax.data.vocabularies import SentencePiece, load_vocabulary
from codet5p_jax.errors import UserError

VOCAB_SIZE = 600
SPLITS = ('train', 'validation', 'test')


@pytest.fixture(scope='module')
def split_of(source_files):
  return split_origins((file.origin for file in source_files), 0.05, 0.05)


def in_split(files, split_of, split):
  return [file for file in files if split_of[file.origin] == split]


def metadata_of(corpus_dir):
  return json.loads((corpus_dir / 'metadata.json').read_text())


def contents(corpus_dir: pathlib.Path, with_sources=True):
  """All that must not depend on how a corpus was made, byte for byte."""
  found = {
      path.relative_to(corpus_dir).as_posix(): path.read_bytes()
      for path in corpus_dir.rglob('*')
      if path.is_file()
  }
  if not with_sources:
    metadata = json.loads(found['metadata.json'])
    del metadata['settings']['sources']
    found['metadata.json'] = metadata
  return found


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
  tokens = {
      split: sum(len(vocabulary.encode(text)) + 1 for text in part)
      for split, part in texts.items()
  }
  metadata = metadata_of(small_corpus)
  settings = metadata.pop('settings')
  assert settings['vocab_size'] == VOCAB_SIZE
  assert settings['min_tokens'] == 50 and settings['max_tokens'] == 2000
  assert not any(metadata.pop('dropped').values())
  assert metadata == {
      'format_version': 1,
      'files': {split: len(part) for split, part in texts.items()},
      'tokens': tokens,
      'characters': {
          split: sum(map(len, part)) for split, part in texts.items()
      },
      'languages': {'python': len(source_files)},
      'tokens_by_language': {'python': sum(tokens.values())},
      'licences': {'mit': len(source_files)},
      'origins': 12,
      'split_by': 'origin',
      'vocabulary_fingerprint': vocabulary.fingerprint,
      'dropped_by_language': {},
  }


def test_no_origin_is_in_two_splits(small_corpus, split_of):
  for split in SPLITS:
    rows = tfds_builder.read_files(small_corpus / 'files', split)
    origins = {row['origin'].decode() for row in rows}
    assert origins == {o for o, place in split_of.items() if place == split}


def test_what_is_no_new_file_is_dropped_and_counted(
    small_corpus, source_files, make_small_corpus, tmp_path
):
  spaced = dataclasses.replace(
      source_files[3],
      text=source_files[3].text.replace('\n  ', '\r\n\t') + '\n\n',
      origin='a-copy',
  )
  empty = dataclasses.replace(source_files[0], text=' \n\t\n')
  short = dataclasses.replace(source_files[0], text='x = 1\n')
  long = dataclasses.replace(
      source_files[0], text='a = b + c\n' * 2001, language='java'
  )
  longer = dataclasses.replace(source_files[0], text='d = b + c\n' * 9999)
  files = [
      *source_files, spaced, empty, source_files[5], spaced, short, long, longer
  ]  # fmt: skip
  metadata = make_small_corpus(files, tmp_path / 'corpus')
  expected = metadata_of(small_corpus)
  drops = {'empty': 1, 'duplicate': 3, 'too_short': 1, 'too_long': 2}
  assert metadata['dropped'] == expected['dropped'] | drops
  assert metadata['dropped_by_language'] == {
      'python': drops | {'too_long': 1}, 'java': {'too_long': 1}
  }
  assert metadata_of(tmp_path / 'corpus') == metadata
  assert metadata['files'] == expected['files']


def test_the_vocabulary_is_trained_on_the_training_split_only(
    small_corpus, source_files, split_of, make_small_corpus, tmp_path
):
  word = 'zyxquorb'
  changed = [
      file
      if split_of[file.origin] == 'train'
      else dataclasses.replace(file, text=file.text + f'{word}\n' * 50)
      for file in source_files
  ]
  everything = SentencePiece.train((file.text for file in changed), VOCAB_SIZE)
  assert len(everything.encode(word)) == 1  # It would have a piece of its own.
  make_small_corpus(changed, tmp_path / 'corpus')
  vocabulary = load_vocabulary(tmp_path / 'corpus' / 'vocabulary')
  assert len(vocabulary.encode(word)) > 4
  assert vocabulary == load_vocabulary(small_corpus / 'vocabulary')


def test_a_vocabulary_that_is_given_is_used(
    small_corpus, source_files, write_rows, tmp_path
):
  given = load_vocabulary(small_corpus / 'vocabulary')
  rows = write_rows(tmp_path / 'rows.jsonl', source_files[:30])
  settings = CorpusSettings((str(rows),))
  build_corpus(settings, tmp_path / 'corpus', given, Processes(1))
  assert load_vocabulary(tmp_path / 'corpus' / 'vocabulary') == given
  assert list((tmp_path / 'corpus' / 'tokens').iterdir()) == [
      tmp_path / 'corpus' / 'tokens' / given.fingerprint[:16]
  ]


# However it is made, it is the same.


@pytest.fixture
def small_units(monkeypatch):
  """Cuts tables into many units; workers get them as they are."""
  monkeypatch.setattr(sources.units, 'TABLE_UNIT_BYTES', 9000)


@pytest.mark.parametrize(
    'executor', [Processes(2), Beam('DirectRunner')], ids=['two', 'beam']
)
def test_processes_and_beam_make_the_very_same_corpus(
    source_files, make_small_corpus, small_units, tmp_path, executor
):
  make_small_corpus(source_files, tmp_path / 'one', pairs=True)
  make_small_corpus(source_files, tmp_path / 'other', executor, pairs=True)
  shards = list((tmp_path / 'one' / 'files').rglob('*train*'))
  assert len(shards) > 3
  one, other = (
      contents(tmp_path / name, with_sources=False) for name in ('one', 'other')
  )
  assert one == other


@pytest.mark.parametrize(
    ('mapped', 'folders'),
    [(TokeniseUnit, 'tokenised-*/[0-9]*'), (PairUnit, 'paired/[0-9]*')],
)
def test_a_killed_run_goes_on_and_makes_the_very_same_corpus(
    source_files, write_rows, small_units, tmp_path, monkeypatch, mapped,
    folders,
):  # fmt: skip
  rows = write_rows(tmp_path / 'rows.jsonl', source_files)
  settings = CorpusSettings((str(rows),), pairs=True, vocab_size=VOCAB_SIZE)
  program = f'''
import pathlib, time
from {mapped.__module__} import {mapped.__name__} as mapped
from codet5p_jax.corpus import build, sources
from codet5p_jax.corpus.executors import Processes
sources.units.TABLE_UNIT_BYTES = 9000
call = mapped.__call__
def call_slowly(self, *arguments):
  time.sleep(0.5)
  call(self, *arguments)
mapped.__call__ = call_slowly
settings = build.CorpusSettings(
    ({str(rows)!r},), pairs=True, vocab_size={VOCAB_SIZE}
)
corpus_dir = pathlib.Path({str(tmp_path / 'killed')!r})
build.build_corpus(settings, corpus_dir, None, Processes(1))
'''
  partial = tmp_path / 'killed.partial'
  with subprocess.Popen(
      [sys.executable, '-c', program], stderr=subprocess.DEVNULL
  ) as process:
    while len(list(partial.glob(folders))) < 2:
      assert process.poll() is None
      time.sleep(0.02)
    process.kill()
  assert not (tmp_path / 'killed').exists()
  done = {int(path.name) for path in partial.glob(folders)}
  called = []
  call = mapped.__call__
  monkeypatch.setattr(
      mapped,
      '__call__',
      lambda self, index, unit: [called.append(index), call(self, index, unit)],
  )
  build_corpus(settings, tmp_path / 'killed', None, Processes(1))
  # What was done is not done again.
  assert called and done and not done & set(called)
  assert not partial.exists()
  build_corpus(settings, tmp_path / 'whole', None, Processes(1))
  assert contents(tmp_path / 'killed') == contents(tmp_path / 'whole')


def test_another_plan_starts_anew(
    small_corpus, source_files, make_small_corpus, tmp_path
):
  left = tmp_path / 'corpus.partial' / 'read' / '000000'
  left.mkdir(parents=True)
  (left / 'summary.json').write_text('{"of": "another plan"}')
  (tmp_path / 'corpus.partial' / 'plan.json').write_text('another plan')
  make_small_corpus(source_files, tmp_path / 'corpus')
  assert list(tmp_path.iterdir()) == [tmp_path / 'corpus']
  assert contents(tmp_path / 'corpus', False) == contents(small_corpus, False)


# Few origins.


@pytest.mark.parametrize('origins', [1, 2])
def test_a_corpus_of_one_or_two_origins_holds_out_files(
    source_files, make_small_corpus, tmp_path, caplog, origins
):
  files = [
      dataclasses.replace(file, origin=f'origin-{index % origins}')
      for index, file in enumerate(source_files)
  ]
  metadata = make_small_corpus(files, tmp_path / 'corpus')
  assert metadata['split_by'] == 'file' and metadata['origins'] == origins
  assert all(metadata['files'].values())
  assert metadata['files']['train'] > 25
  assert 'single files are held out' in caplog.text


def test_origins_whose_files_are_all_too_short_are_not_held_out(
    source_files, make_small_corpus, tmp_path, caplog
):
  split_of = split_origins((file.origin for file in source_files), 0.05, 0.05)
  files = [
      dataclasses.replace(file, text=f'x = {index}\n')
      if split_of[file.origin] == 'test'
      else file
      for index, file in enumerate(source_files)
  ]
  metadata = make_small_corpus(files, tmp_path / 'corpus')
  short = sum(split_of[file.origin] == 'test' for file in source_files)
  assert metadata['dropped']['too_short'] == short > 0
  assert all(metadata['files'].values())
  assert metadata['split_by'] == 'origin'
  assert sum(metadata['files'].values()) == len(files) - short


# What goes wrong.


def expect_refusal(match, function, *arguments, **options):
  with pytest.raises(UserError, match=match) as error:
    function(*arguments, **options)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('is_folder', [True, False])
def test_what_is_there_is_never_overwritten(
    source_files, make_small_corpus, tmp_path, is_folder
):
  corpus_dir = tmp_path / 'corpus'
  if is_folder:
    corpus_dir.mkdir()
  else:
    corpus_dir.write_text('mine')
  expect_refusal(
      'found that it exists; remove it',
      make_small_corpus, source_files, corpus_dir,
  )  # fmt: skip
  assert list(tmp_path.iterdir()) == [corpus_dir]
  assert corpus_dir.is_dir() == is_folder


def test_a_folder_that_cannot_be_made_is_one_clear_line(
    source_files, make_small_corpus, tmp_path
):
  (tmp_path / 'file').write_text('mine')
  expect_refusal(
      'cannot write .*Not a directory; choose a folder',
      make_small_corpus, source_files, tmp_path / 'file' / 'corpus',
  )  # fmt: skip
  assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize('number', [0, 1, 2])
def test_too_few_files_are_one_clear_line_and_leave_nothing(
    source_files, make_small_corpus, tmp_path, number
):
  files = [*source_files[:number], dataclasses.replace(
      source_files[0], text='// @generated\nx = 1\n')]
  expect_refusal(
      f'at least 3 files, one for each split, found {number} .*1 generated',
      make_small_corpus, files, tmp_path / 'corpus',
  )  # fmt: skip
  assert not list(tmp_path.iterdir())


def test_files_that_are_all_too_short_are_one_clear_line(
    source_files, make_small_corpus, tmp_path
):
  expect_refusal(
      'at least 3 files, .* found 36, too few of them of 5000 to 6000 tokens',
      make_small_corpus, source_files, tmp_path / 'corpus',
      min_tokens=5000, max_tokens=6000,
  )  # fmt: skip
  assert not list(tmp_path.iterdir())


def test_too_little_text_for_the_vocabulary_leaves_nothing(
    source_files, make_small_corpus, tmp_path
):
  expect_refusal(
      'vocabulary of 5000 pieces',
      make_small_corpus, source_files, tmp_path / 'corpus', vocab_size=5000,
  )  # fmt: skip
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('settings', 'match'),
    [
        ({'vocab_size': 365}, 'at least 366 pieces, .* found 365; set --vocab'),
        ({'languages': ('python', 'rust')}, 'among python, .* found rust'),
        ({'languages': ()}, 'found none; set --languages'),
        ({'min_tokens': 9, 'max_tokens': 8}, 'found 9 and 8; set --min_tokens'),
        ({'min_tokens': 0}, 'min_tokens to be at least 1, found 0'),
        ({'sources': ()}, 'at least one source, found none'),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_read(
    make_small_corpus, tmp_path, settings, match
):
  expect_refusal(match, make_small_corpus, [], tmp_path / 'c', **settings)
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
def test_after_a_failure_midway_the_next_run_goes_on(
    small_corpus, source_files, write_rows, tmp_path, monkeypatch, caplog,
    fault, expected,
):  # fmt: skip
  rows = write_rows(tmp_path / 'rows.jsonl', source_files)
  settings = CorpusSettings((str(rows),), vocab_size=VOCAB_SIZE)
  calls = []
  real = build.write_token_store

  def write_token_store(folder, *others):
    calls.append(folder)
    if len(calls) == 2:
      raise fault
    return real(folder, *others)

  monkeypatch.setattr(build, 'write_token_store', write_token_store)
  with pytest.raises(expected) as error:
    build_corpus(settings, tmp_path / 'corpus', None, Processes(1))
  assert not (tmp_path / 'corpus').exists()
  if expected is UserError:
    assert 'No space left on device; choose a folder' in str(error.value)
    assert '\n' not in str(error.value)
  caplog.clear()
  caplog.set_level('INFO', 'codet5p_jax')
  build_corpus(settings, tmp_path / 'corpus', None, Processes(1))
  assert 'Going on with what a stopped run left' in caplog.text
  assert 'Training a vocabulary' not in caplog.text
  assert contents(tmp_path / 'corpus', False) == contents(small_corpus, False)
  assert not (tmp_path / 'corpus.partial').exists()


@pytest.mark.parametrize('processes', [1, 2])
def test_a_disk_that_is_full_is_one_clear_line(
    source_files, write_rows, tmp_path, processes
):
  """A limit on the size of files stands for the disk: both fail in write.

  Python must not cache compiled modules under the limit (-B): it would cut
  them off in the package's own folder, where every later import breaks.
  """
  rows = write_rows(tmp_path / 'rows.jsonl', source_files[:20] * 3)
  (tmp_path / 'more.jsonl').write_bytes(rows.read_bytes())
  program = '''
import resource, signal, sys
from codet5p_jax import main
if __name__ == '__main__':
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, 2**13))
  sys.exit(main.main(sys.argv[1:]))
'''
  (tmp_path / 'limited.py').write_text(program)
  done = subprocess.run(
      [
          sys.executable, '-B', str(tmp_path / 'limited.py'), 'prepare_corpus',
          f'--sources={tmp_path}/*.jsonl', f'--corpus_dir={tmp_path}/corpus',
          '--vocab_size=600', f'--processes={processes}',
      ],
      check=False, capture_output=True, text=True,
  )  # fmt: skip
  line = done.stderr.splitlines()[-1]
  assert done.returncode == 2, done.stderr
  assert line.startswith('codet5p: cannot write ')
  assert 'File too large; ' in line
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'corpus').exists()


def test_a_second_process_is_refused_in_one_line(
    source_files, make_small_corpus, tmp_path
):
  with pytest.raises(KeyboardInterrupt):
    with work_folder(tmp_path / 'corpus', 'a plan') as folder:
      (folder / 'read').mkdir()
      expect_refusal(
          'expected to be alone in .*corpus.partial, found another process',
          make_small_corpus, source_files, tmp_path / 'corpus',
      )  # fmt: skip
      assert (folder / 'read').is_dir()
      raise KeyboardInterrupt
  make_small_corpus(source_files, tmp_path / 'corpus')
