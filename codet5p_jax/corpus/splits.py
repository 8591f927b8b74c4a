"""Which split an origin belongs to."""

import hashlib
from collections.abc import Iterable

import numpy as np

from codet5p_jax.corpus.folder import SPLITS


def origin_key(origin: str) -> int:
  """A number in [0, 2**64) that depends on the name alone."""
  return int.from_bytes(hashlib.sha256(origin.encode()).digest()[:8], 'big')


def split_origins(
    origins: Iterable[str], validation: float, test: float
) -> dict[str, str]:
  """Assigns each origin to a split by its hash, so no origin is in two.

  As `split_keys`, by name.

  Args:
    origins: names of packages or repositories.
    validation: share of the origins for validation.
    test: share for test.

  Returns:
    {origin: 'train', 'validation' or 'test'}.
  """
  names = sorted(set(origins), key=lambda name: (origin_key(name), name))
  keys = np.array([origin_key(name) for name in names], np.uint64)
  splits = split_keys(keys, validation, test)
  return {
      name: SPLITS[split] for name, split in zip(names, splits, strict=True)
  }


def keys_in_split(
    keys: np.ndarray, split: int, validation: float, test: float
) -> np.ndarray:
  """Moves keys to the places of a split, in their order.

  Args:
    keys: any, uint64 [number].
    split: index into SPLITS.
    validation: share of the origins for validation.
    test: share for test.

  Returns:
    Keys that `split_keys` assigns to the split, uint64 [number].
  """
  half = 2**32
  begin, end = {
      'train': (validation + test, 1.0),
      'validation': (0.0, validation),
      'test': (validation, validation + test),
  }[SPLITS[split]]
  # A little inside of both borders, where places are rounded.
  first, width = int(begin * half) + 1, int((end - begin) * half) - 2
  high, low = np.divmod(keys, np.uint64(half))
  moved = high * np.uint64(width) + low * np.uint64(width) // np.uint64(half)
  return moved + np.uint64(first * half)


def split_keys(keys: np.ndarray, validation: float, test: float) -> np.ndarray:
  """Assigns each key to a split, by its place in [0, 2**64).

  A given key lands in the same split whatever else the corpus holds, except
  in a corpus of few origins: where a split would be empty, it takes a key
  of the largest split, the lowest.

  Args:
    keys: `origin_key` of each origin, uint64 [number], ascending.
    validation: share of the origins for validation.
    test: share for test.

  Returns:
    Index into SPLITS of each, int8 [number].
  """
  places = keys / 2.0**64
  train_index, validation_index, test_index = range(3)
  splits = np.select(
      [places < validation, places < validation + test],
      [validation_index, test_index],
      train_index,
  ).astype(np.int8)
  for split in range(3):
    counts = np.bincount(splits, minlength=3)
    largest = int(counts.argmax())
    if not counts[split] and counts[largest] > 1:
      splits[np.flatnonzero(splits == largest)[0]] = split
  return splits
