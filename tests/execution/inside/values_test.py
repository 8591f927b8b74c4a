"""Tests of what crosses the border by value."""

import collections
import datetime
import decimal
import fractions
import json
import math

import pytest
from codet5p_jax.execution.inside import values
from hypothesis import given
from hypothesis import strategies as st

_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
    | st.text(st.characters()) | st.binary() | st.complex_numbers(
        allow_nan=False) | st.fractions() | st.dates() | st.timedeltas()
    | st.decimals(allow_nan=False)
    # Of two times with the same clock the second is `fold`; they are equal.
    | (st.datetimes() | st.times()).map(lambda time: time.replace(fold=0))
)  # fmt: skip
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4)
    | st.tuples(inner, inner)
    | st.sets(_SCALARS, max_size=4)
    | st.frozensets(_SCALARS, max_size=4)
    | st.dictionaries(_SCALARS, inner, max_size=3)
    | st.lists(inner, max_size=3).map(collections.deque),
    max_leaves=12,
)


class Referred:
  """What is referred to, in order of appearance."""

  def __init__(self):
    self.held = []

  def refer(self, value):
    self.held.append(value)
    return ['s', len(self.held) - 1]

  def resolve(self, side, number):
    assert side == 's'
    return self.held[number]


def refuse(*arguments):
  raise AssertionError(arguments)


def over_the_border(value, referred=None):
  referred = referred or Referred()
  node = values.encode(value, referred.refer)
  # As border.py sends it.
  text = json.dumps(node, ensure_ascii=False).encode('utf-8', 'surrogatepass')
  return values.decode(
      json.loads(text.decode('utf-8', 'surrogatepass')), referred.resolve)


def shape(value):
  """A value with the types of all its parts, as equal values may differ."""
  if isinstance(value, dict):
    return type(value), [(shape(k), shape(v)) for k, v in value.items()]
  if isinstance(value, list | tuple | collections.deque):
    return type(value), [shape(item) for item in value]
  if isinstance(value, set | frozenset):
    return type(value), sorted(map(repr, map(shape, value)))
  return type(value), repr(value)


@given(_VALUES)
def test_plain_values_arrive_as_they_were(value):
  assert shape(over_the_border(value)) == shape(value)


@pytest.mark.parametrize('value', [
    float('nan'), float('inf'), -0.0, 10 ** 5000, -(1 << 4096), range(3, 9, 2),
    slice(None, 4, 2), '\ud83d\ude00', '\udc80', ..., NotImplemented,
    bytearray(b'ab'), collections.Counter('abca'),
    collections.OrderedDict([(2, 'b'), (1, 'a')]), collections.deque([1], 7),
    fractions.Fraction(3, 7), decimal.Decimal('-0.10'),
    datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
    [1, True, 1.0, None], {1: [2], 'a': (3,)}, [10 ** 5000, 1],
    {(1, 2): {3: set()}}, [], (), set(), {}, '', b'',
], ids=lambda value: repr(value)[:30] if isinstance(value, int) and (
    abs(value) < 1e9) else type(value).__name__)  # fmt: skip
def test_odd_values_arrive_as_they_were(value):
  arrived = over_the_border(value)
  assert shape_of_large(arrived) == shape_of_large(value)


def shape_of_large(value):
  """As `shape`, but for whole numbers that Python refuses to print."""
  if isinstance(value, list):
    return [shape_of_large(item) for item in value]
  return (int, hex(value)) if type(value) is int else shape(value)


def test_a_default_dict_keeps_its_factory_and_a_deque_its_bound():
  arrived = over_the_border(collections.defaultdict(list, {1: [2]}))
  assert arrived[3] == [] and arrived == {1: [2], 3: []}
  assert over_the_border(collections.deque([1, 2], 5)).maxlen == 5


def test_types_and_harmless_functions_cross_by_name():
  for value in (int, list, ValueError, len, sorted):
    assert over_the_border(value) is value
  for value in (eval, exec, open, getattr, print, __import__, compile,
                __loader__.__class__):
    referred = Referred()
    assert values.encode(value, referred.refer) == ['s', 0]


@pytest.mark.parametrize('make', [
    lambda: {12, 13, 14, 15, 16}, lambda: {6, 7, 8, 9, 10, 11},
    lambda: set(range(12, 17)), lambda: set([16, 12, 13, 14, 15]),
    lambda: {5, 3, 9}, lambda: frozenset({33, 1, 17}),
])  # fmt: skip
def test_a_set_is_iterated_over_in_the_same_order(make):
  assert list(over_the_border(make())) == list(make())


def test_what_is_of_a_class_of_ones_own_is_referred_to():
  class Own(list):
    pass

  own, referred = Own([1]), Referred()
  arrived = over_the_border([own, {'a': own}], referred)
  assert arrived[0] is own and arrived[1]['a'] is own
  assert type(over_the_border(True)) is bool


def test_what_contains_itself_is_referred_to_far_down():
  value = []
  value.append(value)
  referred = Referred()
  over_the_border(value, referred)
  assert referred.held == [value]


def test_a_value_of_too_many_parts_is_referred_to_as_a_whole(monkeypatch):
  monkeypatch.setattr(values, '_MAX_NODES', 5)
  assert over_the_border([1, 2, 3, 4]) == [1, 2, 3, 4]
  value, referred = [[1, 2], [3, 4]], Referred()
  assert over_the_border(value, referred) is value
  assert referred.held == [value]


@pytest.mark.parametrize('node', [
    {}, {'list': 1}, [], [1], [None], [['list']], ['no tag'], ['eval', 'f()'],
    ['int', 3], ['int', 'g'], ['int', '1', '2'], ['bytes', 'xy'], ['bytes', 7],
    ['complex', 1, 2], ['set', ['list']], ['dict', 1], ['dict', ['list'], 1],
    ['range', 1, 2, 0], ['range', 'a'], ['slice', 1, 2, 3, 4], ['fraction'],
    ['fraction', 1, 0], ['decimal', 'x'], ['date', '1'], ['timedelta', 1, 2],
    ['builtin', 'eval'], ['builtin', ['list']], ['builtin'], ['list', {}],
    ['default dict', 3], ['default dict'], ['deque'], ['deque', -1], ['s'],
    ['builtin', '__loader__'], ['s', 'x'], ['s', 1, 2], ['s', True], ['s', 0.5],
    ['counter', 1],
    ['ordered dict', 1], ['time', 'x'], ['datetime', 'x'],
], ids=repr)  # fmt: skip
def test_what_is_not_of_the_format_is_malformed(node):
  with pytest.raises(values.Malformed):
    values.decode(node, refuse)


def test_deep_nesting_is_malformed_and_no_crash():
  node = 1
  for _ in range(100_000):
    node = ['list', node]
  with pytest.raises(values.Malformed):
    values.decode(node, refuse)


def test_replacing_keeps_the_objects_that_others_hold():
  inner, old = [1, 2], {'a': [0], 'b': 7}
  holder = [inner, old, (inner,), 5]
  arrived = [[3], {'a': [9, 9], 'c': 8}, ([3],), 6]
  assert values.replace(holder, arrived) is holder
  assert holder[0] is inner and inner == [3]
  assert holder[1] is old and old == {'a': [9, 9], 'c': 8}
  assert holder == [[3], {'a': [9, 9], 'c': 8}, ([3],), 6]


@pytest.mark.parametrize(('old', 'new'), [
    (bytearray(b'a'), bytearray(b'bc')), ({1}, {2, 3}), ([1], [2, 3]),
    (collections.Counter('a'), collections.Counter('bb')),
    (collections.deque([1]), collections.deque([2, 3])),
    (collections.OrderedDict(a=1), collections.OrderedDict(b=2)),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_all_that_can_change_is_replaced_in_place(old, new):
  assert values.replace(old, new) is old
  assert old == new


def test_what_cannot_change_in_place_is_replaced_by_the_new():
  assert values.replace((1,), (2,)) == (2,)
  assert values.replace([1], (2,)) == (2,)
  assert values.replace(1, math.inf) == math.inf
