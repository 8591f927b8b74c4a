"""Which documents of all units are kept, and in which split each is.

Works on the keys of documents (`reading.KEY`), never on their texts. Only
sixteen bytes a document of one range of hashes, one byte a document of all, and
eight bytes an origin are held in memory at a time.
"""

import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from codet5p_jax.corpus.folder import SPLITS
from codet5p_jax.corpus.splits import keys_in_split, split_keys

# Share of the origins that are held out, each.
VALIDATION_SHARE = 0.05
TEST_SHARE = 0.05

DROPPED = -1
_HASHES_IN_MEMORY = 8_000_000


def keep_first(
    read_keys: Callable[[int], np.ndarray],
    num_units: int,
    hashes_in_memory: int = _HASHES_IN_MEMORY,
) -> list[np.ndarray]:
  """Marks the documents that are no duplicate of one before.

  Args:
    read_keys: the keys of a unit, by its index.
    num_units: number of units.
    hashes_in_memory: how many are compared at a time; that many ranges of
      hashes are gone through one after the other.

  Returns:
    bool [documents] of each unit.
  """
  masks = [np.zeros(len(read_keys(index)), bool) for index in range(num_units)]
  total = sum(map(len, masks))
  num_ranges = -(-total // hashes_in_memory)
  for number in range(num_ranges):
    # Hashes are uniform, so ranges of equal width hold about equally many.
    first = number * 2**64 // num_ranges
    last = (number + 1) * 2**64 // num_ranges - 1
    places, parts = [], []
    for index in range(num_units):
      keys = read_keys(index)
      high = keys['hash_high']
      inside = np.flatnonzero(
          (high >= np.uint64(first)) & (high <= np.uint64(last))
      )
      places.append(inside)
      parts.append(keys[['hash_high', 'hash_low']][inside])
    hashes = np.concatenate(parts)
    # Stable, so that the first of equals is the first of all.
    order = np.lexsort((hashes['hash_low'], hashes['hash_high']))
    is_new = np.ones(len(order), bool)
    is_new[1:] = hashes[order][1:] != hashes[order][:-1]
    is_first = np.zeros(len(order), bool)
    is_first[order] = is_new
    begin = 0
    for index, inside in enumerate(places):
      masks[index][inside] = is_first[begin : begin + len(inside)]
      begin += len(inside)
  return masks


class SplitAssignment:
  """Assigns kept documents to splits by origin, else by file.

  Those that were published in a split stay in it, as far as no split is left
  without a document.

  Attributes:
    by_file: there are fewer than three origins that can be held out, so files
      are held out instead.
    num_held: origins, or files, that could be held out.
    num_origins: of all documents.
  """

  def __init__(
      self,
      read_keys: Callable[[int], np.ndarray],
      masks: list[np.ndarray],
      spent: np.ndarray,
  ):
    """Looks at all keys.

    Args:
      read_keys: the keys of a unit, by its index.
      masks: which documents of each unit are kept.
      spent: uint64, origins and files that are not to be held out, since all
        that they hold is too long or too short.
    """
    self._read_keys = read_keys
    self._masks = masks
    self.by_file = False
    origins = self._distinct()
    self._held = np.setdiff1d(origins, spent)
    if len(self._held) < 3:
      self.by_file = True
      self._held = np.setdiff1d(self._distinct(), spent)
    self.num_held = len(self._held)
    self.num_origins = len(origins)
    self._splits = split_keys(self._held, VALIDATION_SHARE, TEST_SHARE)

  def _distinct(self) -> np.ndarray:
    parts = [np.unique(self._of_unit(i)) for i in range(len(self._masks))]
    return np.unique(np.concatenate(parts))

  def _of_unit(self, index: int) -> np.ndarray:
    keys = self._read_keys(index)[self._masks[index]]
    result = keys['hash_high' if self.by_file else 'origin']
    for split in range(len(SPLITS)):
      published = keys['published'] == split + 1
      result[published] = keys_in_split(
          result[published], split, VALIDATION_SHARE, TEST_SHARE
      )
    return result

  def splits(self, index: int) -> np.ndarray:
    """Index into SPLITS of each document of a unit, or DROPPED; int8."""
    result = np.full(len(self._masks[index]), DROPPED, np.int8)
    keys = self._of_unit(index)
    places = np.searchsorted(self._held, keys)
    found = np.minimum(places, len(self._held) - 1)
    # What cannot be held out is trained on.
    result[self._masks[index]] = np.where(
        self._held[found] == keys, self._splits[found], 0
    )
    return result

  def keys_of_split(self, split: int) -> np.ndarray:
    """What was assigned to a split, uint64 [number]."""
    return self._held[self._splits == split]


def sampled_texts(
    read_keys: Callable[[int], np.ndarray],
    read_texts: Callable[[int], Iterator[str]],
    read_mask: Callable[[int], np.ndarray],
    num_units: int,
    characters: int,
) -> Iterator[str]:
  """A sample of the masked documents' texts, drawn by their hashes.

  Args:
    read_keys: the keys of a unit, by its index.
    read_texts: the texts of a unit, by its index.
    read_mask: which documents of a unit to draw from.
    num_units: number of units.
    characters: about how many are wanted; all texts if there are fewer.

  Yields:
    Texts in the order of the units.
  """
  total = sum(
      int(read_keys(index)['characters'][read_mask(index)].sum(dtype=np.int64))
      for index in range(num_units)
  )
  bound = min(int(characters / max(total, 1) * 2**64), 2**64 - 1)
  for index in range(num_units):
    low = read_keys(index)['hash_low']
    is_drawn = read_mask(index) & (low <= np.uint64(bound))
    if is_drawn.any():
      for text, drawn in zip(read_texts(index), is_drawn, strict=True):
        if drawn:
          yield text


def write_splits(path: pathlib.Path, splits: np.ndarray) -> None:
  """Writes the splits of a unit's documents, whole or not at all."""
  beside = path.with_suffix('.partial')
  splits.tofile(beside)
  beside.replace(path)
