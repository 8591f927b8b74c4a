import numpy as np
import pytest

from codet5p_jax.corpus.deduplication import (
    SplitAssignment,
    keep_first,
    sampled_texts,
)
from codet5p_jax.corpus.reading import KEY
from codet5p_jax.corpus.splits import origin_key, split_origins

ORIGINS = [f'origin-{number}' for number in range(300)]


@pytest.fixture(scope='module')
def units():
  """Keys of documents of five units, a third of them duplicates."""
  rng = np.random.default_rng(0)
  hashes = rng.integers(0, 2**64, (700, 2), np.uint64)
  # Some agree in the first half only.
  hashes[::7, 0] = hashes[3, 0]
  hashes[5, 0], hashes[6, 0] = 0, 2**64 - 1
  result = []
  for size in (0, 300, 1, 450, 320):
    keys = np.zeros(size, KEY)
    drawn = hashes[rng.integers(0, len(hashes), size)]
    keys['hash_high'], keys['hash_low'] = drawn.T
    keys['origin'] = [origin_key(o) for o in rng.choice(ORIGINS, size)]
    keys['characters'] = rng.integers(1, 100, size)
    result.append(keys)
  return result


@pytest.mark.parametrize('hashes_in_memory', [1, 10, 500, 10_000])
def test_the_first_of_equal_documents_is_kept(units, hashes_in_memory):
  if hashes_in_memory == 1:
    units = units[:3]
  seen, expected = set(), []
  for keys in units:
    expected.append([])
    for high, low, *_ in keys.tolist():
      expected[-1].append((high, low) not in seen)
      seen.add((high, low))
  masks = keep_first(units.__getitem__, len(units), hashes_in_memory)
  assert [mask.tolist() for mask in masks] == expected


def test_no_document_at_all_is_none_kept():
  empty = [np.zeros(0, KEY)] * 2
  assert [m.tolist() for m in keep_first(empty.__getitem__, 2)] == [[], []]


def test_origins_are_split_as_by_name(units):
  masks = keep_first(units.__getitem__, len(units))
  assignment = SplitAssignment(
      units.__getitem__, masks, np.empty(0, np.uint64)
  )
  expected = split_origins(ORIGINS, 0.05, 0.05)
  by_key = {origin_key(o): split for o, split in expected.items()}
  names = ('train', 'validation', 'test')
  for index, (keys, mask) in enumerate(zip(units, masks, strict=True)):
    splits = assignment.splits(index)
    assert (splits[~mask] == -1).all()
    assert [names[s] for s in splits[mask]] == [
        by_key[o] for o in keys['origin'][mask].tolist()
    ]
  held = set().union(*(k['origin'][m] for k, m in zip(units, masks)))
  assert assignment.num_origins == assignment.num_held == len(held)
  assert not assignment.by_file


def test_what_is_spent_is_trained_on(units):
  masks = keep_first(units.__getitem__, len(units))
  before = SplitAssignment(units.__getitem__, masks, np.empty(0, np.uint64))
  spent = before.keys_of_split(2)
  after = SplitAssignment(units.__getitem__, masks, spent)
  for index, (keys, mask) in enumerate(zip(units, masks, strict=True)):
    is_spent = mask & np.isin(keys['origin'], spent)
    assert (after.splits(index)[is_spent] == 0).all()
  assert len(after.keys_of_split(2)) == 1  # A split is never empty.


def test_a_sample_has_about_the_characters_wanted_and_is_the_same_again(units):
  texts = [[f'{i} {j}' for j in range(len(k))] for i, k in enumerate(units)]
  masks = [np.arange(len(keys)) % 3 > 0 for keys in units]

  def sample(characters):
    return list(
        sampled_texts(
            units.__getitem__,
            lambda index: iter(texts[index]),
            masks.__getitem__,
            len(units),
            characters,
        )
    )

  characters = {
      text: int(number)
      for of_unit, keys in zip(texts, units, strict=True)
      for text, number in zip(of_unit, keys['characters'], strict=True)
  }
  everything = [
      text
      for of_unit, mask in zip(texts, masks, strict=True)
      for text, is_wanted in zip(of_unit, mask, strict=True)
      if is_wanted
  ]
  total = sum(characters[text] for text in everything)
  assert sample(10 * total) == everything
  half = sample(total // 2)
  assert sum(characters[text] for text in half) == pytest.approx(
      total / 2, rel=0.1
  )
  assert half == sample(total // 2)
  assert set(sample(total // 4)) < set(half) < set(everything)


def test_what_was_published_in_a_split_stays_in_it(units):
  masks = keep_first(units.__getitem__, len(units))
  published = [keys.copy() for keys in units]
  rng = np.random.default_rng(1)
  for keys in published:
    keys['published'] = rng.integers(0, 4, len(keys))
  spent = np.empty(0, np.uint64)
  before = SplitAssignment(units.__getitem__, masks, spent)
  after = SplitAssignment(published.__getitem__, masks, spent)
  for index, (keys, mask) in enumerate(zip(published, masks, strict=True)):
    expected = np.where(
        keys['published'] > 0,
        keys['published'].astype(int) - 1,
        before.splits(index),
    )
    np.testing.assert_array_equal(after.splits(index)[mask], expected[mask])
