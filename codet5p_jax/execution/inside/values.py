"""Plain values as JSON, for a border that only plain values cross.

The side that decodes may be reading what a hostile program wrote, so the format
is closed: a null, a boolean, a number, a string, or a list of a tag and what
the tag is known to take. Nothing in it names code, and whatever is not exactly
of this form is a `Malformed`.

What is exactly of a built-in type, or of a few value types of the standard
library, is copied. Everything else stays where it is, and the other side gets a
reference, `[SIDE, number]`.
"""

import builtins
import collections
import datetime
import decimal
import fractions
from collections.abc import Callable, Iterator
from typing import Any

# Deeper values, cycles among them, are referred to from there on.
_MAX_DEPTH = 100
# Larger values are referred to as a whole.
_MAX_NODES = 4_000_000
# Beyond, JSON's decimal digits would hit Python's limit for them.
_LARGE = 1 << 4096

# Built-in names that may be passed themselves: types, exceptions, and functions
# that cannot do more than compute.
_NAMED = {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type) and not name.startswith('_')
    or name in {'abs', 'all', 'any', 'bin', 'callable', 'chr', 'divmod', 'hash',
                'hex', 'isinstance', 'issubclass', 'iter', 'len', 'max', 'min',
                'next', 'oct', 'ord', 'pow', 'repr', 'round', 'sorted', 'sum'}
}  # fmt: skip
_NAME_OF = {id(value): name for name, value in reversed(_NAMED.items())}

_PLAIN = frozenset({type(None), bool, float, str})


class Malformed(Exception):
  """What the other side wrote is not of the format."""


class _TooLarge(Exception):
  pass


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
  """Makes JSON of a value.

  Args:
    value: anything.
    refer: what makes a reference, `[SIDE, number]`, of a value that cannot be
      copied; it may raise.

  Returns:
    What `json.dumps` takes, as long as it leaves surrogates alone.
  """
  try:
    return _Encoder(refer).encode(value, 0)
  except _TooLarge:
    return refer(value)


class _Encoder:
  """Encodes one value."""

  def __init__(self, refer: Callable[[Any], Any]) -> None:
    self._refer = refer
    self._nodes = 0

  def encode(self, value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in _PLAIN:
      return value
    if kind is int:
      return value if -_LARGE < value < _LARGE else ['int', hex(value)]
    if kind in _ATOMS:
      return _ATOMS[kind](value)
    if kind in _COLLECTIONS and depth < _MAX_DEPTH:
      tag, parts = _COLLECTIONS[kind]
      items = list(parts(value))
      self._nodes += len(items)
      if self._nodes > _MAX_NODES:
        raise _TooLarge
      if not _all_as_they_are(items):
        items = [self.encode(item, depth + 1) for item in items]
      return [tag, *items]
    if id(value) in _NAME_OF:
      return ['builtin', _NAME_OF[id(value)]]
    return self._refer(value)


def _all_as_they_are(items: list[Any]) -> bool:
  """Whether JSON takes all items; most lists are long and of numbers."""
  kinds = set(map(type, items))
  return kinds <= _PLAIN or kinds <= {*_PLAIN, int} and all(
      -_LARGE < item < _LARGE for item in items if type(item) is int)


def _flat(mapping: Any) -> Iterator[Any]:
  for key, value in mapping.items():
    yield key
    yield value


_ATOMS: dict[type, Callable[[Any], Any]] = {
    complex: lambda c: ['complex', c.real, c.imag],
    bytes: lambda b: ['bytes', b.hex()],
    bytearray: lambda b: ['bytearray', b.hex()],
    type(Ellipsis): lambda _: ['ellipsis'],
    type(NotImplemented): lambda _: ['not implemented'],
    decimal.Decimal: lambda d: ['decimal', str(d)],
    datetime.date: lambda d: ['date', d.isoformat()],
    datetime.time: lambda d: ['time', d.isoformat()],
    datetime.datetime: lambda d: ['datetime', d.isoformat()],
    datetime.timedelta: lambda d: [
        'timedelta', d.days, d.seconds, d.microseconds],
}  # fmt: skip

_COLLECTIONS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    list: ('list', iter),
    tuple: ('tuple', iter),
    set: ('set', iter),
    frozenset: ('frozenset', iter),
    dict: ('dict', _flat),
    range: ('range', lambda r: (r.start, r.stop, r.step)),
    slice: ('slice', lambda s: (s.start, s.stop, s.step)),
    fractions.Fraction: ('fraction', lambda f: (f.numerator, f.denominator)),
    collections.Counter: ('counter', _flat),
    collections.OrderedDict: ('ordered dict', _flat),
    collections.defaultdict: (
        'default dict', lambda d: (d.default_factory, *_flat(d))),
    collections.deque: ('deque', lambda d: (d.maxlen, *d)),
}  # fmt: skip

# What a call may change in place, with how a copy takes the new content over.
_REPLACEMENTS: dict[type, Callable[[Any, Any], None]] = {}
for _kind in (list, bytearray):
  _REPLACEMENTS[_kind] = lambda old, new: old.__setitem__(slice(None), new)
for _kind in (set, dict, collections.Counter, collections.OrderedDict,
              collections.defaultdict):  # fmt: skip
  _REPLACEMENTS[_kind] = lambda old, new: (old.clear(), old.update(new))
_REPLACEMENTS[collections.deque] = lambda old, new: (
    old.clear(), old.extend(new))  # fmt: skip


def replace(old: Any, new: Any) -> Any:
  """Gives a value the content of another one, in place as far as possible.

  Args:
    old: a value that others may hold too.
    new: what it has become.

  Returns:
    `old`, if it could be changed and is of the type of `new`; else `new`.
  """
  if type(old) is not type(new):
    return new
  if type(old) in (list, tuple) and len(old) == len(new):
    new = type(old)(map(replace, old, new))
  elif type(old) is dict:
    new = {k: replace(old[k], v) if k in old else v for k, v in new.items()}
  if type(old) in _REPLACEMENTS:
    _REPLACEMENTS[type(old)](old, new)
    return old
  return new


def decode(node: Any, resolve: Callable[[str, int], Any]) -> Any:
  """Makes a value of JSON that `encode` made, or that pretends to be so.

  Args:
    node: what `json.loads` returned.
    resolve: the value of a reference, by its side and number; it raises
      `Malformed` for one that it does not know.

  Raises:
    Malformed: it is not of the format.
  """
  try:
    return _decode(node, resolve)
  except Malformed:
    raise
  except (ArithmeticError, LookupError, RecursionError, TypeError,
          ValueError) as error:
    raise Malformed(f'{type(error).__name__}: {error}') from error


def _decode(node: Any, resolve: Callable[[str, int], Any]) -> Any:
  kind = type(node)
  if kind is int or kind in _PLAIN:
    return node
  if kind is not list or not node or type(node[0]) is not str:
    raise Malformed(f'a {kind.__name__} without a tag')
  tag, *rest = node
  if len(tag) == 1:
    if len(rest) != 1 or type(rest[0]) is not int:
      raise Malformed('a reference that is none')
    return resolve(tag, rest[0])
  if tag not in _MAKERS:
    raise Malformed(f'no tag {tag[:20]!r}')
  if not {*_PLAIN, int}.issuperset(map(type, rest)):
    rest = [_decode(item, resolve) for item in rest]
  return _MAKERS[tag](rest)


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
  return zip(items[::2], items[1::2], strict=True)


def _in_order(items: list[Any], kind: type) -> Any:
  """A set that is iterated over in the order of its items, if one of two is.

  The order follows from the size of a table, and that from how a set was made:
  by adding, or from a whole one as a literal is.
  """
  added = kind(items)
  copied = kind(frozenset(items) if kind is set else set(items))
  return copied if list(copied) == items else added


def _named(items: list[Any]) -> Any:
  (name,) = items
  if name not in _NAMED:
    raise Malformed('no such built-in')
  return _NAMED[name]


def _only(kind: type, count: int, make: Callable[..., Any]) -> Callable:
  """A maker of exactly so many arguments of one type."""

  def made(items: list[Any]) -> Any:
    if len(items) != count or any(type(item) is not kind for item in items):
      raise Malformed(f'expected {count} {kind.__name__}')
    return make(*items)

  return made


def _default_dict(items: list[Any]) -> Any:
  factory, *rest = items
  return collections.defaultdict(factory, _pairs(rest))


_MAKERS: dict[str, Callable[[list[Any]], Any]] = {
    'int': _only(str, 1, lambda text: int(text, 16)),
    'complex': _only(float, 2, complex),
    'bytes': _only(str, 1, bytes.fromhex),
    'bytearray': _only(str, 1, bytearray.fromhex),
    'ellipsis': lambda items: ...,
    'not implemented': lambda items: NotImplemented,
    'decimal': _only(str, 1, decimal.Decimal),
    'date': _only(str, 1, datetime.date.fromisoformat),
    'time': _only(str, 1, datetime.time.fromisoformat),
    'datetime': _only(str, 1, datetime.datetime.fromisoformat),
    'timedelta': _only(int, 3, datetime.timedelta),
    'builtin': _named,
    'list': lambda items: items,
    'tuple': tuple,
    'set': lambda items: _in_order(items, set),
    'frozenset': lambda items: _in_order(items, frozenset),
    'dict': lambda items: dict(_pairs(items)),
    'range': lambda items: range(*items),
    'slice': lambda items: slice(*items),
    'fraction': _only(int, 2, fractions.Fraction),
    'counter': lambda items: collections.Counter(dict(_pairs(items))),
    'ordered dict': lambda items: collections.OrderedDict(_pairs(items)),
    'default dict': _default_dict,
    'deque': lambda items: collections.deque(items[1:], items[0]),
}
