import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codet5p_jax.corpus.folder import SPLITS
from codet5p_jax.corpus.splits import (
    keys_in_split,
    split_keys,
    split_origins,
)

MANY = [f'package_{number}' for number in range(4000)]
SPLIT_OF = split_origins(MANY, 0.03, 0.03)
# A third of these have hashes in the share of each split.
CROWDED = [
    origin
    for split in SPLITS
    for origin in [o for o in MANY if SPLIT_OF[o] == split][:20]
]
ORIGINS = st.lists(st.text(st.characters(exclude_categories=['Cs'])))


@given(ORIGINS, st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(origins, shuffler):
  mixed = origins + origins[::2]
  shuffler.shuffle(mixed)
  assert split_origins(mixed, 0.03, 0.03) == split_origins(origins, 0.03, 0.03)


@given(ORIGINS)
def test_every_origin_gets_one_split(origins):
  assigned = split_origins(origins, 0.03, 0.03)
  assert assigned.keys() == set(origins)
  assert set(assigned.values()) <= set(SPLITS)


@given(st.lists(st.sampled_from(CROWDED), unique=True, max_size=6))
def test_three_origins_fill_all_splits_wherever_their_hashes_lie(origins):
  assigned = split_origins(origins, 0.03, 0.03)
  assert len(set(assigned.values())) == min(len(origins), 3)


def test_shares_are_those_asked_for():
  assigned = list(split_origins(MANY, 0.1, 0.25).values())
  shares = [assigned.count(split) / len(MANY) for split in SPLITS]
  assert shares == pytest.approx([0.65, 0.1, 0.25], abs=0.03)


def test_an_origin_stays_where_it_is_when_others_come_and_go():
  everything = split_origins(MANY, 0.03, 0.03)
  some = random.Random(0).sample(MANY, 1000)
  assert split_origins(some, 0.03, 0.03).items() <= everything.items()


def test_an_origin_keeps_its_split_for_ever():
  """Recorded from SHA-256: a corpus made years later must agree."""
  place = int(hashlib.sha256(b'package_0').hexdigest()[:16], 16) / 2**64
  origins = ['package_0', *MANY[1:500]]
  for validation, test, expected in (
      (place + 1e-6, 0.0, 'validation'),
      (place - 1e-6, 1e-3, 'test'),
      (place / 2, place / 4, 'train'),
  ):
    assert split_origins(origins, validation, test)['package_0'] == expected


def test_few_origins_give_up_those_nearest_to_the_held_out_shares():
  origins = ['alpha', 'beta', 'gamma', 'delta']
  places = {o: hashlib.sha256(o.encode()).hexdigest() for o in origins}
  first, second, *others = sorted(origins, key=places.get)
  assert split_origins(origins, 1e-9, 1e-9) == {
      first: 'validation',
      second: 'test',
      **dict.fromkeys(others, 'train'),
  }


@pytest.mark.parametrize(
    ('validation', 'test'), [(0.05, 0.05), (0.25, 0.5), (0.1, 0.2)]
)
def test_keys_are_moved_into_a_split_in_their_order(validation, test):
  rng = np.random.default_rng(0)
  ends = np.array([0, 1, 2**64 - 2, 2**64 - 1], np.uint64)
  keys = np.union1d(rng.integers(0, 2**64, 2000, np.uint64), ends)
  moved = [keys_in_split(keys, split, validation, test) for split in range(3)]
  for split in range(3):
    assert moved[split].dtype == np.uint64
    assert (np.diff(moved[split][1:-1].astype(object)) > 0).all()
  order = np.argsort(np.concatenate(moved))
  splits = split_keys(np.concatenate(moved)[order], validation, test)
  assert (splits == np.repeat([0, 1, 2], len(keys))[order]).all()
