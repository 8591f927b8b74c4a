import json
import logging
import shutil

import pytest

from codet5p_jax import main
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.runs import prepare_corpus as module
from codet5p_jax.runs.prepare_corpus import prepare_corpus

SETTINGS = {'vocab_size': 600, 'processes': 1}


@pytest.fixture(scope='module')
def rows(source_files, write_rows, tmp_path_factory):
  """A table of source files, one of them twice."""
  folder = tmp_path_factory.mktemp('rows')
  files = [*source_files, source_files[0]]
  return str(write_rows(folder / 'rows.jsonl', files))


@pytest.fixture(scope='module')
def prepared(rows, tmp_path_factory):
  """Made once; not to be changed."""
  folder = tmp_path_factory.mktemp('corpora') / 'corpus'
  prepare_corpus(str(folder), [rows], **SETTINGS)
  return folder


def modification_times(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def expect_refusal(match, *arguments, **options):
  with pytest.raises(UserError, match=match) as error:
    prepare_corpus(*arguments, **options)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_a_prepared_corpus_is_what_training_reads(prepared, rows):
  metadata = json.loads((prepared / 'metadata.json').read_text())
  assert metadata['settings']['sources'] == [rows]
  assert metadata['settings']['vocab_size'] == 600
  vocabulary = load_vocabulary(prepared / 'vocabulary')
  assert vocabulary.vocab_size == 600
  for split in ('train', 'validation', 'test'):
    assert len(CausalLM(16).rows(str(prepared), split, vocabulary)) > 2


def test_the_result_is_told_in_one_line(rows, tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    prepare_corpus(str(tmp_path / 'corpus'), [rows], **SETTINGS)
  [message] = [
      record.getMessage()
      for record in caplog.records
      if record.name == module.__name__
  ]
  metadata = json.loads((tmp_path / 'corpus' / 'metadata.json').read_text())
  tokens = metadata['tokens']['train'] / 1e6
  assert message == (
      f'Corpus in {tmp_path / "corpus"}: 36 files, {tokens:.1f} million tokens '
      f'to train on; dropped: 1 duplicate.'
  )


def test_a_corpus_of_the_same_settings_is_kept(rows, prepared, caplog):
  before = modification_times(prepared)
  left = prepared.with_name('corpus.partial')
  left.mkdir()
  with caplog.at_level(logging.INFO):
    # Where the work is done is no setting of the corpus.
    prepare_corpus(str(prepared), (rows,), vocab_size=600, processes=3)
  assert modification_times(prepared) == before
  assert 'is ready; nothing to do' in caplog.text
  assert not left.exists()


def test_pairs_are_told_in_one_line(rows, tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    prepare_corpus(str(tmp_path / 'corpus'), [rows], pairs=True, **SETTINGS)
  metadata = json.loads((tmp_path / 'corpus' / 'metadata.json').read_text())
  number = metadata['pairs']
  assert min(number.values()) > 0
  assert caplog.records[-1].getMessage() == (
      f'Pairs of text and code: {number["train"]} train, '
      f'{number["validation"]} validation, {number["test"]} test; dropped: '
      f'{metadata["pairs_dropped"]["near_duplicate"]} near_duplicate.'
  )


def test_a_corpus_of_a_version_before_pairs_is_kept(rows, prepared, tmp_path):
  shutil.copytree(prepared, tmp_path / 'corpus')
  path = tmp_path / 'corpus' / 'metadata.json'
  metadata = json.loads(path.read_text())
  assert metadata['settings'].pop('pairs') is False
  path.write_text(json.dumps(metadata))
  before = modification_times(tmp_path)
  prepare_corpus(str(tmp_path / 'corpus'), [rows], **SETTINGS)
  line = expect_refusal(
      'choose another corpus_dir',
      str(tmp_path / 'corpus'), [rows], pairs=True, **SETTINGS,
  )  # fmt: skip
  assert "expected a corpus of {'pairs': True}" in line
  assert "found one of {'pairs': False}" in line
  assert modification_times(tmp_path) == before


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({'vocab_size': 601}, "{'vocab_size': 601}"),
        (
            {'sources': ['standard_library']},
            "{'sources': ['standard_library']}",
        ),
        ({'max_tokens': 999}, "{'max_tokens': 999}"),
    ],
)
def test_a_corpus_of_other_settings_is_refused(
    rows, prepared, changes, named
):
  before = modification_times(prepared)
  line = expect_refusal(
      'choose another corpus_dir',
      str(prepared), **{'sources': [rows]} | SETTINGS | changes,
  )  # fmt: skip
  assert f'expected a corpus of {named}' in line
  assert modification_times(prepared) == before


def test_a_corpus_of_another_vocabulary_is_refused(rows, prepared, tmp_path):
  line = expect_refusal(
      'choose another corpus_dir',
      str(prepared), [rows], vocabulary_dir=str(prepared / 'vocabulary'),
      **SETTINGS,
  )  # fmt: skip
  fingerprint = load_vocabulary(prepared / 'vocabulary').fingerprint
  assert f"'vocabulary_fingerprint': '{fingerprint}'" in line


def test_a_folder_of_something_else_is_refused(rows, tmp_path):
  (tmp_path / 'notes.txt').write_text('mine')
  expect_refusal('found that it exists', str(tmp_path), [rows], **SETTINGS)
  assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']


@pytest.mark.parametrize(
    'content', [b'{"settings": ', b'\xff\xfe{', b'[1, 2]', b'"text"'],
    ids=['cut', 'not UTF-8', 'a list', 'a text'],
)  # fmt: skip
def test_damaged_metadata_are_one_clear_line(rows, prepared, tmp_path, content):
  shutil.copytree(prepared, tmp_path / 'corpus')
  (tmp_path / 'corpus' / 'metadata.json').write_bytes(content)
  expect_refusal(
      'expected the metadata of a corpus in .*; remove the',
      str(tmp_path / 'corpus'), [rows], **SETTINGS,
  )  # fmt: skip


@pytest.mark.parametrize(
    ('typed', 'expected'),
    [
        (['--sources=github'], "found 'github'; check the path"),
        (['--source=x'], 'no flag --source; did you mean --sources?'),
        (['--languages=python,rust'], 'found rust; set --languages'),
        (['--vocab_size=300'], 'at least 366 pieces'),
        (['--processes=0'], 'processes to be at least 1'),
        (['--corpus_dir=gs://bucket/corpus'], 'mount the bucket'),
        (['--vocabulary_dir=/nowhere'], 'a vocabulary in /nowhere'),
    ],
)
def test_mistakes_on_the_command_line_are_one_clear_line(
    tmp_path, capsys, typed, expected
):
  flags = [f'--corpus_dir={tmp_path}/corpus', *typed]
  assert main.main(['prepare_corpus', *flags]) == 2
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith('codet5p: ') and expected in line
  assert not list(tmp_path.iterdir())


def write_package(folder, files):
  folder.mkdir()
  for name, content in files.items():
    (folder / name).write_bytes(content)
  return f'--sources={folder}'


@pytest.mark.parametrize(
    ('files', 'expected'),
    [
        ({}, 'expected source files of python'),
        ({'notes.txt': b'x'}, 'expected source files of python'),
        ({'one.py': b'x = 1\n' * 99}, 'found 1 in '),
        ({'a.py': b'\x7fELF\0'}, 'found 0 in .* (dropped: 1 binary)'),
        ({'a.py': b'caf\xe9'}, 'found 0 in .* (dropped: 1 not_utf8)'),
        ({'a.py': b'x' * 2**21}, 'found 0 in .* (dropped: 1 oversized)'),
    ],
)
def test_a_folder_that_makes_no_corpus_is_one_clear_line(
    tmp_path, capsys, files, expected
):
  sources = write_package(tmp_path / 'mine', files)
  corpus_dir = f'--corpus_dir={tmp_path}/corpus'
  flags = ['prepare_corpus', sources, corpus_dir, '--processes=1']
  assert main.main(flags) == 2
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith('codet5p: ')
  for part in expected.split('.*'):
    assert part in line
  assert [path.name for path in tmp_path.iterdir()] == ['mine']


@pytest.mark.parametrize('bad', [1, 10, 11, 1000])
def test_some_bad_rows_are_skipped_and_many_are_refused(
    source_files, write_rows, tmp_path, caplog, bad
):
  rows = write_rows(tmp_path / 'rows.jsonl', source_files)
  lines = rows.read_text().splitlines()
  lines[5:5] = ['{"txt": "x = 1"}'] * bad
  rows.write_text('\n'.join(lines))
  arguments = str(tmp_path / 'corpus'), [str(rows)]
  if bad > 10:
    expect_refusal(
        f'every row of .*rows.jsonl, found {bad} bad rows of {36 + bad}, the '
        f'first in line 6: no text; mend',
        *arguments, **SETTINGS,
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ['rows.jsonl']
    return
  prepare_corpus(*arguments, **SETTINGS)
  assert f'Skipped {bad} bad rows of {36 + bad}' in caplog.text
  assert 'the first in line 6: no text' in caplog.text
  metadata = json.loads((tmp_path / 'corpus' / 'metadata.json').read_text())
  assert metadata['dropped']['bad_row'] == bad


@pytest.mark.parametrize('number', [3, 5000])
def test_a_field_that_no_row_has_is_told_early(tmp_path, number):
  rows = tmp_path / 'rows.jsonl'
  rows.write_text('{"code": "x = 1"}\n' * number)
  expect_refusal(
      f'found {min(number, 1000)} bad rows of {min(number, 1000)}, the first '
      f'in line 1: no source; mend',
      str(tmp_path / 'corpus'), [f'jsonl://{rows}?field=source'], **SETTINGS,
  )  # fmt: skip
  assert [path.name for path in tmp_path.iterdir()] == ['rows.jsonl']
