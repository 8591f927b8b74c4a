import json
import logging
import shutil

import pytest

from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.runs import prepare_corpus as module
from codet5p_jax.runs.prepare_corpus import prepare_corpus

SETTINGS = {'source': 'small', 'vocab_size': 600}


@pytest.fixture
def source(monkeypatch, source_files):
  """A source of files, and a list that counts how often it was read."""
  reads = []

  def small():
    reads.append('small')
    yield from [*source_files, None, source_files[0]]

  monkeypatch.setitem(module.SOURCES, 'small', small)
  return reads


@pytest.fixture(scope='module')
def prepared(source_files, tmp_path_factory):
  """Made once; not to be changed."""
  folder = tmp_path_factory.mktemp('corpora') / 'corpus'
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(module.SOURCES, 'small', lambda: iter(source_files))
    prepare_corpus(str(folder), **SETTINGS)
  return folder


def modification_times(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def test_a_prepared_corpus_is_what_training_reads(prepared):
  metadata = json.loads((prepared / 'metadata.json').read_text())
  assert metadata['settings'] == SETTINGS
  vocabulary = load_vocabulary(prepared / 'vocabulary')
  assert vocabulary.vocab_size == 600
  for split in ('train', 'validation', 'test'):
    assert len(CausalLM(16).rows(str(prepared), split, vocabulary)) > 2


def test_the_result_is_told_in_one_line(source, tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    prepare_corpus(str(tmp_path / 'corpus'), **SETTINGS)
  [message] = [
      record.getMessage()
      for record in caplog.records
      if record.name == module.__name__
  ]
  metadata = json.loads((tmp_path / 'corpus' / 'metadata.json').read_text())
  tokens = metadata['tokens']['train'] / 1e6
  assert message == (
      f'Corpus in {tmp_path / "corpus"}: 36 files, {tokens:.1f} million tokens '
      f'to train on (1 dropped as duplicates).'
  )
  assert source == ['small']


def test_a_corpus_of_the_same_settings_is_kept(source, prepared, caplog):
  before = modification_times(prepared)
  with caplog.at_level(logging.INFO):
    prepare_corpus(str(prepared), **SETTINGS)
  assert modification_times(prepared) == before
  assert source == []  # Nothing was read again.
  assert 'is ready; nothing to do' in caplog.text


@pytest.mark.parametrize(
    'changes', [{'vocab_size': 601}, {'source': 'standard_library'}]
)
def test_a_corpus_of_other_settings_is_refused(source, prepared, changes):
  before = modification_times(prepared)
  with pytest.raises(UserError, match='choose another corpus_dir') as error:
    prepare_corpus(str(prepared), **SETTINGS | changes)
  assert str(SETTINGS | changes) in str(error.value)
  assert str(SETTINGS) in str(error.value)
  assert '\n' not in str(error.value)
  assert modification_times(prepared) == before
  assert source == []


def test_a_folder_of_something_else_is_refused(source, tmp_path):
  (tmp_path / 'notes.txt').write_text('mine')
  with pytest.raises(UserError, match='found that it exists'):
    prepare_corpus(str(tmp_path), **SETTINGS)
  assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']


def test_an_unknown_source_is_one_clear_line(tmp_path):
  with pytest.raises(
      UserError, match="among standard_library, found 'github'; set --source"
  ):
    prepare_corpus(str(tmp_path / 'corpus'), source='github')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'content', [b'{"settings": ', b'\xff\xfe{', b'[1, 2]', b'"text"'],
    ids=['cut', 'not UTF-8', 'a list', 'a text'],
)  # fmt: skip
def test_damaged_metadata_are_one_clear_line(
    source, prepared, tmp_path, content
):
  shutil.copytree(prepared, tmp_path / 'corpus')
  (tmp_path / 'corpus' / 'metadata.json').write_bytes(content)
  with pytest.raises(
      UserError, match='expected the metadata of a corpus in .*; remove the'
  ) as error:
    prepare_corpus(str(tmp_path / 'corpus'), **SETTINGS)
  assert '\n' not in str(error.value)
  assert source == []


def test_a_folder_that_cannot_be_made_is_one_clear_line(source, tmp_path):
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(UserError, match='Not a directory') as error:
    prepare_corpus(str(tmp_path / 'file' / 'corpus'), **SETTINGS)
  assert '\n' not in str(error.value)
  assert (tmp_path / 'file').read_text() == 'mine'
