"""Tests of reading what a person typed."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest

from codet5p_jax import arguments
from codet5p_jax import errors


@pytest.mark.parametrize('text, value', [
    ('1000', 1000),
    ('1e-4', 1e-4),
    ('-3', -3),
    ('True', True),
    ('None', None),
    ('(4, 2)', (4, 2)),
    ("['a', 1.5]", ['a', 1.5]),
    ("{'a': (1,)}", {'a': (1,)}),
    ('"5"', '5'),
    ('/some/dir', '/some/dir'),
    ('v5e:2x4', 'v5e:2x4'),
    ('2x4', '2x4'),
    ('gs://bucket/run-1', 'gs://bucket/run-1'),
    ('def f(x):', 'def f(x):'),
    ('1/2', '1/2'),
    ('', ''),
    # Python literals that no gin file can state.
    ('1e999', '1e999'),
    ('{1, 2}', '{1, 2}'),
    ('1j', '1j'),
    ('...', '...'),
])
def test_literals_are_parsed_and_all_else_is_a_string(text, value):
  parsed = arguments.parse_literal(text)
  assert parsed == value
  assert type(parsed) is type(value)


@pytest.mark.parametrize('text, hint, value', [
    ('1', float, 1),
    ('7', str, '7'),
    ('(a|b)/.*', str, '(a|b)/.*'),
    ('1', int | None, 1),
    ('none', int | None, None),
    ('none', str | None, 'none'),
    ('false', bool, False),
    ('python,java', Sequence[str], ('python', 'java')),
    ('python', tuple[str, ...], ('python',)),
    ('1,2', Sequence[str], ('1', '2')),
    ('4,2', tuple[int, int], (4, 2)),
    ('', Sequence[str], ()),
    ('java', Literal['python', 'java'], 'java'),
    ('x', os.PathLike, 'x'),
    ("{'a': 1}", Mapping[str, int], {'a': 1}),
    ('1', object, 1),
    ('adamw', Callable, 'adamw'),
])
def test_the_annotation_picks_the_reading(text, hint, value):
  assert arguments.value_for(text, [hint], 'KEY') == value


def test_a_value_must_suit_every_parameter_that_it_reaches():
  assert arguments.value_for('5', [str, Any], 'KEY') == '5'
  with pytest.raises(errors.UserError, match='KEY expects a whole number'):
    arguments.value_for('x', [str, int], 'KEY')


@pytest.mark.parametrize('text, hint, expected', [
    ('1k', int, "a whole number, found '1k'"),
    ('1.5', int, 'a whole number, found 1.5'),
    ('True', int, 'a whole number, found True'),
    ('1', bool, 'True or False, found 1'),
    ('x', float | None, "a number or None, found 'x'"),
    ('ruby', Literal['python', 'java'], "'python' or 'java', found 'ruby'"),
    ('1,2,3', tuple[int, int], 'tuple[int, int], found (1, 2, 3)'),
    ('a', Sequence[int], "Sequence[int], found 'a'"),
    ('1', dict, 'dict, found 1'),
])
def test_a_value_of_the_wrong_kind_says_what_was_expected(
    text, hint, expected):
  with pytest.raises(errors.UserError) as error:
    arguments.value_for(text, [hint], 'KEY')
  assert expected in str(error.value)
  assert str(error.value).endswith('give KEY=value')


def test_python_values_are_taken_as_they_are(tmp_path):
  assert arguments.value_for(3, [int], 'KEY') == 3
  assert arguments.value_for(tmp_path, [str], 'KEY') == str(tmp_path)
  with pytest.raises(errors.UserError, match='found function'):
    arguments.value_for(lambda: 1, [object], 'KEY')


def test_hints_that_cannot_be_evaluated_accept_everything():

  @dataclasses.dataclass
  class Config:
    width: 'Unimported'  # noqa: F821

  assert arguments.type_hints(Config) == {}


def test_parameters_are_unknown_where_any_name_is_taken():
  assert arguments.parameters(lambda **options: options) is None
  assert list(arguments.parameters(lambda a, *b, c=1: a)) == ['a', 'c']


def test_the_nearest_name_is_found_in_any_case():
  known = ['TRAIN_STEPS', 'BATCH_SIZE']
  assert arguments.nearest('train_stps', known) == (
      '; did you mean TRAIN_STEPS?')
  assert arguments.nearest('zebra', known) == (
      '; known are BATCH_SIZE, TRAIN_STEPS')
  assert arguments.nearest('zebra', []) == '; known are none'
