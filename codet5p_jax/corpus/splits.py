"""Which split an origin belongs to."""

import collections
import hashlib
from collections.abc import Iterable

from codet5p_jax.corpus.folder import SPLITS


def split_origins(
    origins: Iterable[str], validation: float, test: float
) -> dict[str, str]:
  """Assigns each origin to a split by its hash, so no origin is in two.

  A given origin lands in the same split whatever else the corpus holds, except
  in a corpus of few origins: where a split would be empty, it takes an origin
  of the largest split, the one of the lowest hash.

  Args:
    origins: names of packages or repositories.
    validation: share of the origins for validation.
    test: share for test.

  Returns:
    {origin: 'train', 'validation' or 'test'}.
  """
  places = {origin: _place(origin) for origin in sorted(set(origins))}
  result = {}
  for origin, place in places.items():
    if place < validation:
      result[origin] = 'validation'
    elif place < validation + test:
      result[origin] = 'test'
    else:
      result[origin] = 'train'
  for split in SPLITS:
    counts = collections.Counter(result.values())
    largest = max(SPLITS, key=lambda name: counts[name])
    if not counts[split] and counts[largest] > 1:
      spare = [o for o in places if result[o] == largest]
      result[min(spare, key=places.get)] = split
  return result


def missing_splits(assigned: dict[str, str]) -> list[str]:
  """The splits no origin was assigned to."""
  return [split for split in SPLITS if split not in assigned.values()]


def _place(origin: str) -> float:
  """A number in [0, 1) that depends on the name alone."""
  digest = hashlib.sha256(origin.encode()).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64
