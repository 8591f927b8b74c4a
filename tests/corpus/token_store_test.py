import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codet5p_jax.corpus.token_store import (
    BLOCK_TOKENS,
    TokenRows,
    write_token_store,
)
from codet5p_jax.errors import UserError

EOS = 2
BLOCKS, METADATA = 'blocks.array_record', 'metadata.json'
# Short documents, and such as end about the border of a block.
LENGTHS = st.one_of(
    st.integers(0, 40),
    st.integers(BLOCK_TOKENS - 3, BLOCK_TOKENS + 3),
    st.sampled_from([2 * BLOCK_TOKENS - 1, 2 * BLOCK_TOKENS + 77]),
)


def documents(lengths, vocab_size, seed=0):
  rng = np.random.default_rng(seed)
  return [
      (
          rng.integers(0, vocab_size, length).astype(np.int32),
          rng.random(length) < 0.5,
      )
      for length in lengths
  ]


def stream(written):
  """What lies in the store: (ids, word starts), in plain Python."""
  ids, starts = [], []
  for document_ids, document_starts in written:
    ids += [*document_ids.tolist(), EOS]
    starts += [*document_starts.tolist(), True]
  return ids, starts


@pytest.fixture(scope='module')
def written():
  return documents([5000, 0, 3000, 9000], 600)


@pytest.fixture(scope='module')
def store(written, tmp_path_factory):
  folder = tmp_path_factory.mktemp('stores') / 'store'
  write_token_store(folder, iter(written), EOS, 600, 'f00d')
  return folder


def test_documents_follow_one_another_each_ended_by_one_eos(tmp_path):
  written = [
      (np.array([17, 18, 19], np.int32), np.array([True, False, True])),
      (np.array([], np.int32), np.array([], bool)),
      (np.array([20], np.int32), np.array([False])),
  ]
  write_token_store(tmp_path / 'store', written, EOS, 600, 'f00d')
  rows = TokenRows(tmp_path / 'store', 7)
  assert rows[0]['tokens'].tolist() == [17, 18, 19, 2, 2, 20, 2]
  assert rows[0]['word_starts'].tolist() == [
      True, False, True, True, True, False, True,
  ]  # fmt: skip
  assert (rows[0]['tokens'].dtype, rows[0]['word_starts'].dtype) == (
      np.int32, bool,
  )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=8),
    row_length=st.one_of(st.integers(1, 60), st.integers(61, 9000)),
    vocab_size=st.sampled_from([600, 2**16, 2**16 + 1, 10**6]),
)
def test_rows_of_any_length_are_cut_from_the_very_stream(
    tmp_path_factory, lengths, row_length, vocab_size
):
  written = documents(lengths, vocab_size, seed=row_length)
  ids, starts = stream(written)
  row_length = min(row_length, len(ids))
  folder = tmp_path_factory.mktemp('stores') / 'store'
  write_token_store(folder, iter(written), EOS, vocab_size, 'f00d')
  rows = TokenRows(folder, row_length)
  assert len(rows) == len(ids) // row_length
  # All rows if there are few; the first and the last one in any case.
  indices = np.unique(np.linspace(0, len(rows) - 1, 300).astype(int))
  for index in indices.tolist():
    place = slice(index * row_length, (index + 1) * row_length)
    row = rows[index]
    assert row['tokens'].tolist() == ids[place]
    assert row['word_starts'].tolist() == starts[place]
  shutil.rmtree(folder)


@pytest.mark.parametrize('row_length', [BLOCK_TOKENS, 2 * BLOCK_TOKENS + 5, 7])
def test_rows_that_lie_across_the_borders_of_blocks_are_whole(
    store, written, row_length
):
  ids, starts = stream(written)
  rows = TokenRows(store, row_length)
  index = BLOCK_TOKENS // row_length
  place = slice(index * row_length, (index + 1) * row_length)
  assert place.start <= BLOCK_TOKENS < place.stop
  assert rows[index]['tokens'].tolist() == ids[place]
  assert rows[index]['word_starts'].tolist() == starts[place]


@pytest.mark.parametrize(
    ('vocab_size', 'dtype'), [(2**16, '<u2'), (2**16 + 1, '<u4')]
)
def test_the_largest_id_of_a_vocabulary_is_kept(tmp_path, vocab_size, dtype):
  last = np.array([vocab_size - 1], np.int32)
  metadata = write_token_store(
      tmp_path / 'store', [(last, np.array([True]))], EOS, vocab_size, 'f00d'
  )
  assert metadata['token_dtype'] == dtype
  assert TokenRows(tmp_path / 'store', 1)[0]['tokens'] == vocab_size - 1


def test_metadata_counts_documents_and_tokens(store, written):
  metadata = json.loads((store / METADATA).read_text())
  assert metadata == {
      'format_version': 1,
      'num_documents': 4,
      'num_tokens': 17004,
      'block_tokens': BLOCK_TOKENS,
      'token_dtype': '<u2',
      'vocabulary_fingerprint': 'f00d',
  }
  assert metadata == TokenRows(store, 10).metadata


def test_there_is_no_row_before_the_first_or_after_the_last(store):
  rows = TokenRows(store, 1000)
  assert len(rows) == 17  # The last 4 tokens are no whole row.
  for index in (-1, 17, 10**9):
    with pytest.raises(IndexError):
      rows[index]


def expect_one_line(folder, row_length, match):
  with pytest.raises(UserError, match=match) as error:
    rows = TokenRows(folder, row_length)
    for index in range(len(rows)):
      rows[index]
  assert '\n' not in str(error.value)
  assert str(folder) in str(error.value)


def test_a_missing_store_is_one_clear_line(tmp_path):
  expect_one_line(tmp_path, 10, 'found no metadata.json; run codet5p')


def test_a_store_of_another_format_is_one_clear_line(store, tmp_path):
  damage(store, tmp_path, METADATA, change_metadata(format_version=2))
  expect_one_line(tmp_path / 'store', 10, 'of format 1, found 2 in')


@pytest.mark.parametrize('lengths', [[], [0], [8]])
def test_a_store_without_a_whole_row_is_one_clear_line(tmp_path, lengths):
  written = documents(lengths, 600)
  write_token_store(tmp_path / 'store', written, EOS, 600, 'f00d')
  tokens = sum(lengths) + len(lengths)
  expect_one_line(tmp_path / 'store', 10, f'10 tokens, found {tokens} tokens')


def change_metadata(**changes):
  return lambda content: json.dumps(json.loads(content) | changes).encode()


def flip(position):
  def change(content):
    assert content[position]  # Nothing that only fills the file.
    flipped = content[position] ^ 0xFF
    return content[:position] + bytes([flipped]) + content[position + 1 :]

  return change


def damage(store, tmp_path, name, change):
  shutil.copytree(store, tmp_path / 'store')
  path = tmp_path / 'store' / name
  if change is None:
    path.unlink()
  else:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ('name', 'change'),
    [
        pytest.param(METADATA, lambda content: content[:20], id='cut metadata'),
        pytest.param(METADATA, lambda _: b'[]', id='a list as metadata'),
        pytest.param(
            METADATA, lambda _: b'{"format_version": 1}', id='fields missing'
        ),
        pytest.param(BLOCKS, None, id='no blocks'),
        pytest.param(BLOCKS, lambda _: b'', id='empty blocks'),
        pytest.param(
            BLOCKS, lambda content: content[: 2**16], id='cut blocks'
        ),
        pytest.param(BLOCKS, flip(5000), id='a byte of a block'),
        pytest.param(
            METADATA, change_metadata(num_tokens=10**6), id='blocks missing'
        ),
    ],
)
def test_damage_is_one_clear_line_and_never_other_tokens(
    store, tmp_path, name, change
):
  damage(store, tmp_path, name, change)
  expect_one_line(tmp_path / 'store', 500, 'damaged')
