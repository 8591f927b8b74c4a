import collections
import subprocess
import sys

import pytest

from codet5p_jax.corpus.source_files import SourceFile
from codet5p_jax.corpus.splits import split_origins
from codet5p_jax.corpus.tfds_builder import read_files, write_files

FEATURES = ('text', 'language', 'licence', 'origin', 'path', 'hash')


def as_row(file):
  return {name: getattr(file, name).encode() for name in FEATURES}


def by_path(rows):
  return sorted(rows, key=lambda row: row['path'])


def test_any_program_that_has_tfds_can_read_the_files(
    small_corpus, source_files
):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(
      small_corpus / 'files' / 'source_files' / '1.0.0'
  )
  assert set(builder.info.features) == set(FEATURES)
  split_of = split_origins((file.origin for file in source_files), 0.03, 0.03)
  expected = collections.defaultdict(list)
  for file in source_files:
    expected[split_of[file.origin]].append(as_row(file))
  assert builder.info.splits.keys() == expected.keys()
  for split, rows in expected.items():
    assert builder.info.splits[split].num_examples == len(rows)
    found = [dict(row) for row in builder.as_data_source(split)]
    assert by_path(found) == by_path(rows)


@pytest.fixture(scope='module')
def odd_files():
  texts = ['x\r\n\ty\x00z\n', '# \u00e9\u6f22\U0001f600\u2581\n', 'a' * 100_000]
  return [
      SourceFile(text, 'c++', 'unknown', f'o/{i}', f'a b/\u00e9{i}.c')
      for i, text in enumerate(texts)
  ]


def test_texts_come_back_byte_for_byte(odd_files, tmp_path, capsys):
  write_files(tmp_path, {'train': odd_files, 'test': odd_files[:1]})
  for split, files in (('train', odd_files), ('test', odd_files[:1])):
    rows = [dict(row) for row in read_files(tmp_path, split)]
    assert by_path(rows) == [as_row(file) for file in files]
  assert not (tmp_path / 'downloads').exists()
  # Standard output belongs to what a program answers.
  assert capsys.readouterr().out == ''


def test_neither_writing_nor_reading_imports_tensorflow(tmp_path):
  program = f'''
import pathlib, sys
from codet5p_jax.corpus.source_files import SourceFile
from codet5p_jax.corpus.tfds_builder import read_files, write_files
folder = pathlib.Path({str(tmp_path)!r})
write_files(folder, {{'train': [SourceFile('a', 'c', 'MIT', 'o', 'p')]}})
[row] = read_files(folder, 'train')
assert row['text'] == b'a'
assert 'tensorflow' not in sys.modules, 'tensorflow was imported'
'''
  done = subprocess.run(
      [sys.executable, '-c', program],
      check=False,
      capture_output=True,
      text=True,
  )
  assert done.returncode == 0, done.stderr
