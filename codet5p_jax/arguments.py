"""What a person typed, as a Python value that a parameter accepts.

Used for `KEY=value` and `--gin.some.binding=value` by `configuration`, and for
the flags of subcommands by `main`. Literals are read as in Python; anything
else is a string, so that paths and names need no quotes.
"""

import ast
import difflib
import inspect
import math
import os
import pathlib
import types
import typing
from collections import abc

from codet5p_jax import errors

_CASELESS = {'true': True, 'false': False, 'none': None}
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_SEQUENCES = (tuple, list, set, frozenset, abc.Sequence, abc.MutableSequence,
              abc.Collection, abc.Iterable, abc.Set)


def is_literal(value: object) -> bool:
  """Whether a gin file can state `value`: finite numbers, strings and so on."""
  if isinstance(value, dict):
    return all(map(is_literal, (*value.keys(), *value.values())))
  if type(value) in (list, tuple):
    return all(map(is_literal, value))
  if type(value) is float:
    return math.isfinite(value)
  return value is None or type(value) in (bool, int, str)


def parse_literal(text: str) -> object:
  """Reads `text` as a Python literal, and as a string if it is none.

  >>> [parse_literal(text) for text in ('1e-4', '(4, 2)', 'v5e:2x4')]
  [0.0001, (4, 2), 'v5e:2x4']
  """
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text
  return value if is_literal(value) else text


def value_for(typed: object, hints: abc.Sequence[object], name: str) -> object:
  """Reads what was typed as a value that every hint accepts.

  Args:
    typed: as in `python,java`; from Python, the value itself.
    hints: the annotations of the parameters that receive the value.
    name: what it was typed for, as in `LANGUAGES`.

  Returns:
    The first of these that all the hints accept: the Python literal, the text
    itself, `true`, `false` or `none` in any case, and the text split at its
    commas.

  Raises:
    UserError: no reading is acceptable.
  """
  if isinstance(typed, os.PathLike):
    typed = os.fspath(typed)
  if not is_literal(typed):
    raise errors.UserError(
        f'{name} expects what a gin file can state, such as numbers, strings, '
        f'lists, or "@reference"; found {type(typed).__name__}')
  literal, *readings = _readings(typed)
  for reading in (literal, *readings):
    if all(accepts(hint, reading) for hint in hints):
      return reading
  refusing = next(hint for hint in hints if not accepts(hint, literal))
  raise errors.UserError(
      f'{name} expects {describe(refusing)}, found {literal!r}; '
      f'give {name}=value')


def _readings(typed: object) -> list[object]:
  """All that typed text may mean, likeliest first."""
  if not isinstance(typed, str):
    return [typed]
  readings = [parse_literal(typed), typed]
  if typed.lower() in _CASELESS:
    readings.append(_CASELESS[typed.lower()])
  items = [item.strip() for item in typed.split(',') if item.strip()]
  return [*readings, tuple(map(parse_literal, items)), tuple(items)]


def accepts(hint: object, value: object) -> bool:
  """Whether a literal may be given to a parameter with this annotation.

  An annotation of any other kind than numbers, strings, paths, choices and
  containers of these accepts everything: this finds slips of the hand, and is
  no type checker.
  """
  origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
  if origin is typing.Annotated:
    return accepts(parts[0], value)
  if origin in (typing.Union, types.UnionType):
    return any(accepts(part, value) for part in parts)
  if origin is typing.Literal:
    return value in parts
  if hint in (None, type(None)):
    return value is None
  if origin in (int, float, bool):
    wanted = (int, float) if origin is float else origin
    # A bool is an int to Python, but STEPS=True is a slip.
    is_bool = isinstance(value, bool)
    return isinstance(value, wanted) and is_bool == (origin is bool)
  if origin in (str, os.PathLike, pathlib.Path):
    return isinstance(value, str)
  if origin in _MAPPINGS:
    return isinstance(value, dict)
  if origin in _SEQUENCES:
    if not isinstance(value, (list, tuple)):
      return False
    if origin is tuple and parts and parts[-1] is not Ellipsis:
      return len(parts) == len(value) and all(map(accepts, parts, value))
    return not parts or all(accepts(parts[0], item) for item in value)
  return True


def describe(hint: object) -> str:
  """An annotation in the words of an error message, as in `int or None`."""
  origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(describe(part) for part in parts)
  if origin is typing.Literal:
    return ' or '.join(repr(part) for part in parts)
  if origin is typing.Annotated:
    return describe(parts[0])
  plain = {
      type(None): 'None', None: 'None', bool: 'True or False',
      int: 'a whole number', float: 'a number', str: 'a string',
      os.PathLike: 'a path', pathlib.Path: 'a path',
  }
  if isinstance(hint, abc.Hashable) and hint in plain:
    return plain[hint]
  return str(hint) if parts else getattr(hint, '__name__', str(hint))


def type_hints(function: abc.Callable) -> dict[str, object]:
  """The annotations of a function's or class's parameters, by name.

  Empty where they cannot be evaluated, as for names that are imported for
  type checkers only.
  """
  annotated = function.__init__ if inspect.isclass(function) else function
  try:
    return typing.get_type_hints(annotated)
  except (NameError, TypeError, AttributeError, SyntaxError):
    return {}


def parameters(function: abc.Callable) -> dict[str, inspect.Parameter] | None:
  """The named parameters of a function or class; None if it takes any name."""
  try:
    signature = inspect.signature(function)
  except (ValueError, TypeError):
    return None
  found = dict(signature.parameters)
  if any(p.kind is p.VAR_KEYWORD for p in found.values()):
    return None
  return {n: p for n, p in found.items() if p.kind is not p.VAR_POSITIONAL}


def listed(names: abc.Iterable[str]) -> str:
  """Names for an error message, in order, as in `a, b, c`."""
  return ', '.join(sorted(names)) or 'none'


def did_you_mean(name: str, known: abc.Iterable[str]) -> str:
  """How a message goes on after an unknown name: `; did you mean X?` or ``."""
  by_lower = {candidate.lower(): candidate for candidate in known}
  near = difflib.get_close_matches(name.lower(), by_lower, n=1)
  return f'; did you mean {by_lower[near[0]]}?' if near else ''


def nearest(name: str, known: abc.Iterable[str]) -> str:
  """As did_you_mean, and the known names where none is near."""
  known = list(known)
  return did_you_mean(name, known) or f'; known are {listed(known)}'
