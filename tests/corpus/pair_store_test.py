import json
import subprocess
import sys

import numpy as np
import pytest

from codet5p_jax.corpus.pair_store import (
    PairRows,
    PairTexts,
    PairTokenWriter,
)
from codet5p_jax.corpus.records import open_writer
from codet5p_jax.errors import UserError

PAIRS = [([1, 2, 3], [4, 5]), ([7], [0, 65535, 9, 9]), ([], [3]), ([8], [])]
RECORDS = [{'text': 'é', 'code': 'x\n'}, {'text': 'b', 'code': 'y'}]


def write_store(folder, pairs=PAIRS, vocab_size=2**16):
  writer = PairTokenWriter(folder, vocab_size, 'ab' * 32)
  for text, code in pairs:
    writer.write(np.array(text, np.int64), np.array(code, np.int64))
  writer.close()
  return folder


def write_texts(path, records=RECORDS):
  writer = open_writer(path)
  for record in records:
    writer.write(json.dumps(record).encode())
  writer.close()
  return path


def expect_refusal(match, function, *arguments):
  with pytest.raises(UserError, match=match) as error:
    function(*arguments)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('vocab_size', 'dtype'), [(2**16, '<u2'), (2**16 + 1, '<u4')]
)
def test_pairs_come_back_by_index(tmp_path, vocab_size, dtype):
  rows = PairRows(write_store(tmp_path / 'store', vocab_size=vocab_size))
  assert len(rows) == 4
  for index in (3, 0, 2, 1):
    row = rows[index]
    assert (row['text'].tolist(), row['code'].tolist()) == PAIRS[index]
    assert row['text'].dtype == row['code'].dtype == np.int32
  assert rows.metadata == {
      'format_version': 1,
      'num_pairs': 4,
      'dtype': dtype,
      'vocabulary_fingerprint': 'ab' * 32,
  }
  for index in (4, -1):
    with pytest.raises(IndexError):
      rows[index]


def test_texts_come_back_by_index(tmp_path):
  texts = PairTexts(write_texts(tmp_path / 'x.array_record'))
  assert [texts[i] for i in range(len(texts))] == RECORDS
  with pytest.raises(IndexError):
    texts[2]


def test_a_store_that_is_not_there_is_one_clear_line(tmp_path):
  expect_refusal(
      'found no metadata.json; run codet5p prepare_corpus --pairs',
      PairRows, tmp_path,
  )  # fmt: skip
  expect_refusal('damaged .*with --pairs', PairTexts, tmp_path / 'x')


def test_a_store_of_no_pair_is_one_clear_line(tmp_path):
  write_store(tmp_path / 'store', [])
  expect_refusal('at least one pair', PairRows, tmp_path / 'store')
  path = write_texts(tmp_path / 'x.array_record', [])
  expect_refusal('at least one pair .*; add sources', PairTexts, path)


@pytest.mark.parametrize(
    ('metadata', 'match'),
    [
        ('{"format_version": ', 'damaged \\(JSONDecodeError'),
        ('[]', 'damaged \\(TypeError'),
        ('{"format_version": 2}', 'format 1, found 2 in'),
        ('{"format_version": 1, "dtype": "<u2"}', "KeyError: 'num_pairs'"),
        (
            '{"format_version": 1, "dtype": "<u2", "num_pairs": 5}',
            '4 pairs where 5 belong',
        ),
    ],
)
def test_damaged_metadata_are_one_clear_line(tmp_path, metadata, match):
  folder = write_store(tmp_path / 'store')
  (folder / 'metadata.json').write_text(metadata)
  expect_refusal(match, PairRows, folder)


@pytest.mark.parametrize('content', [None, b'', b'x' * 100])
def test_damaged_records_are_one_clear_line(tmp_path, content):
  folder = write_store(tmp_path / 'store')
  path = folder / 'pairs.array_record'
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  expect_refusal('found them damaged', PairRows, folder)
  expect_refusal('found them damaged', PairTexts, path)


@pytest.mark.parametrize('record', [b'', b'\x05\0\0\0\1\0', b'\0\0\0\0\1'])
def test_a_damaged_record_is_one_clear_line(tmp_path, record):
  folder = write_store(tmp_path / 'store', PAIRS[:1])
  writer = open_writer(folder / 'pairs.array_record')
  writer.write(record)
  writer.close()
  expect_refusal('found them damaged', PairRows(folder).__getitem__, 0)
  texts = PairTexts(folder / 'pairs.array_record')
  expect_refusal('found them damaged', texts.__getitem__, 0)


def test_reading_loads_no_tensorflow(tmp_path):
  folder = write_store(tmp_path / 'store')
  path = write_texts(tmp_path / 'x.array_record')
  program = f'''
import pathlib, sys
from codet5p_jax.corpus import folder, pair_store
pair_store.PairRows(pathlib.Path({str(folder)!r}))[0]
pair_store.PairTexts(pathlib.Path({str(path)!r}))[0]
print([name for name in sys.modules if name.startswith('tensorflow')])
'''
  done = subprocess.run(
      [sys.executable, '-c', program], check=True, capture_output=True,
      text=True,
  )  # fmt: skip
  assert done.stdout == '[]\n'
