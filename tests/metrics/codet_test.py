"""Tests of CodeT's dual execution agreement, by hand-computed examples."""

import itertools

import pytest
from codet5p_jax.metrics.codet import (
    Group,
    assertions,
    grouped,
    ranked_pass_at_k,
)


@pytest.mark.parametrize(('text', 'expected'), [
    ('add(1, 2) == 3', ['assert add(1, 2) == 3']),
    ('add(1,2)==3\n    assert add(0, 0) == 0\n\nprint(1)',
     ['assert add(1, 2) == 3', 'assert add(0, 0) == 0']),
    ('add([1,\n  2],\n 3) == 4, "why"\nassert add(5) == 6',
     ["assert add([1, 2], 3) == 4, 'why'", 'assert add(5) == 6']),
    ('subtract(1, 2) == 3\nassert all(add(i) for i in x)',
     ['assert all((add(i) for i in x))']),
    ('add(1, == 3\nassert add(1) == "assert"', ["assert add(1) == 'assert'"]),
    ('address(1) == 2\nassert "add" == 3\nassert x.add == 2', []),
    ('add(1)\nassert add(2)\nassert add(3)\nassert add(4)',
     ['assert add(1)', 'assert add(2)', 'assert add(3)']),
    ('add(1); import os', []), ('', []), ('add(\0)', []),
])  # fmt: skip
def test_assertions_that_name_what_is_tested_are_found(text, expected):
  assert assertions(text, ('add',), 3) == expected


def test_solutions_of_the_same_tests_form_a_group_and_the_best_comes_first():
  groups = grouped([{0, 1}, {2}, {1, 0}, set(), {2}, {2}, {2}, [3, 4, 5]])
  # 2 * sqrt(2), 3 * sqrt(1), 1 * sqrt(4), 0
  assert groups == [
      Group((7,), frozenset({3, 4, 5})),
      Group((0, 2), frozenset({0, 1})),
      Group((1, 4, 5, 6), frozenset({2})),
      Group((3,), frozenset()),
  ]
  assert [g.score for g in groups] == pytest.approx([3, 8 ** 0.5, 2, 0])


def test_groups_of_one_score_keep_the_order_of_their_solutions():
  groups = grouped([{1}, {0}, {2}])
  assert [group.solutions for group in groups] == [(0,), (1,), (2,)]


def test_pass_at_k_is_the_mean_over_all_choices_of_one_a_score():
  # Scores 2, 1 (twice) and 0.
  groups = grouped([{0, 1}, {2}, {3}, set(), set()])
  is_right = [False, True, False, False, True]
  choices = [[0], [1, 2], [3, 4]]
  for k in (1, 2, 3, 4):
    drawn = list(itertools.product(*choices[:k]))
    share = sum(any(is_right[s] for s in d) for d in drawn) / len(drawn)
    assert ranked_pass_at_k(groups, is_right, k) == pytest.approx(share)
  assert ranked_pass_at_k(groups, is_right, 2) == 0.5
