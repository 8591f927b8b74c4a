import collections
import subprocess
import sys

import pytest

from codet5p_jax.corpus.records import open_writer
from codet5p_jax.corpus.source_files import SourceFile
from codet5p_jax.corpus.splits import split_origins
from codet5p_jax.corpus.tfds_builder import (
    gather_shards,
    read_files,
    serialise,
)

FEATURES = ('text', 'language', 'licence', 'origin', 'path', 'hash')


def as_row(file):
  return {name: getattr(file, name).encode() for name in FEATURES}


def test_any_program_that_has_tfds_can_read_the_files(
    small_corpus, source_files
):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(
      small_corpus / 'files' / 'source_files' / '1.0.0'
  )
  assert set(builder.info.features) == set(FEATURES)
  split_of = split_origins((file.origin for file in source_files), 0.05, 0.05)
  expected = collections.defaultdict(list)
  for file in source_files:
    expected[split_of[file.origin]].append(as_row(file))
  assert builder.info.splits.keys() == expected.keys()
  for split, rows in expected.items():
    assert builder.info.splits[split].num_examples == len(rows)
    found = [dict(row) for row in builder.as_data_source(split)]
    assert found == rows


def write_files(folder, shards):
  """Writes {split: lists of files, one for each shard}."""
  paths = {}
  for split, parts in shards.items():
    paths[split] = []
    for number, files in enumerate(parts):
      path = folder / f'{split}-{number}'
      shard = open_writer(path)
      for file in files:
        shard.write(serialise(file))
      shard.close()
      paths[split].append((path, len(files)))
  gather_shards(folder / 'files', paths)


@pytest.fixture(scope='module')
def odd_files():
  texts = ['x\r\n\ty\x00z\n', '# \u00e9\u6f22\U0001f600\u2581\n', 'a' * 100_000]
  return [
      SourceFile(text, 'c++', 'unknown', f'o/{i}', f'a b/\u00e9{i}.c')
      for i, text in enumerate(texts)
  ]


def test_texts_come_back_byte_for_byte_in_order(odd_files, tmp_path, capsys):
  write_files(
      tmp_path,
      {'train': [odd_files[:2], odd_files[2:]], 'test': [odd_files[:1]]},
  )
  for split, files in (('train', odd_files), ('test', odd_files[:1])):
    rows = [dict(row) for row in read_files(tmp_path / 'files', split)]
    assert rows == [as_row(file) for file in files]
  # The shards were moved.
  assert [path.name for path in tmp_path.iterdir()] == ['files']
  # Standard output belongs to what a program answers.
  assert capsys.readouterr().out == ''


def test_neither_writing_nor_reading_imports_tensorflow(tmp_path):
  program = f'''
import pathlib, sys
from codet5p_jax.corpus.source_files import SourceFile
from codet5p_jax.corpus import records, tfds_builder
folder = pathlib.Path({str(tmp_path)!r})
shard = records.open_writer(folder / 'shard')
shard.write(tfds_builder.serialise(SourceFile('a', 'c', 'MIT', 'o', 'p')))
shard.close()
tfds_builder.gather_shards(folder, {{'train': [(folder / 'shard', 1)]}})
[row] = tfds_builder.read_files(folder, 'train')
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
