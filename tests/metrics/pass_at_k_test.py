"""Tests of the estimate of pass@k."""

import itertools
from fractions import Fraction

import pytest
from codet5p_jax.metrics.pass_at_k import pass_at_k


@pytest.mark.parametrize('num_samples', range(1, 9))
def test_it_is_the_share_of_all_sets_in_which_one_passes(num_samples):
  for num_passed in range(num_samples + 1):
    passed = [i < num_passed for i in range(num_samples)]
    for k in range(1, num_samples + 1):
      sets = list(itertools.combinations(passed, k))
      share = sum(map(any, sets)) / len(sets)
      assert pass_at_k(num_samples, num_passed, k) == pytest.approx(
          share, rel=1e-14)  # fmt: skip


def test_large_numbers_and_small_shares_keep_their_digits():
  n, c, k = 10_000, 3, 5_000
  fail = Fraction(1)
  for i in range(n - c + 1, n + 1):
    fail *= 1 - Fraction(k, i)
  assert pass_at_k(n, c, k) == pytest.approx(float(1 - fail), rel=1e-14)
  assert pass_at_k(10 ** 9, 1, 1) == pytest.approx(1e-9, rel=1e-12, abs=0)


@pytest.mark.parametrize('numbers', [(3, 1, 4), (3, 4, 1), (3, -1, 1),
                                     (3, 1, 0)])  # fmt: skip
def test_what_cannot_be_estimated_is_refused(numbers):
  with pytest.raises(ValueError, match='no pass@'):
    pass_at_k(*numbers)
