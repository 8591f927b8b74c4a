"""What is known of a function before the rules are applied."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Function:
  """A function or method that is not nested in another.

  Attributes:
    name: its own, without that of its class; empty if it has none.
    documentation: what is written about it, without the marks of a comment;
      None where there is nothing.
    code: the function without its documentation, beginning at column 0; empty
      where nothing but the documentation is its body.
    is_constructor: it is one by its syntax.
    is_broken: its syntax is wrong.
  """

  name: str
  documentation: str | None
  code: str
  is_constructor: bool = False
  is_broken: bool = False


# Methods that the language or its library calls, or that all objects have.
_SPECIAL_NAMES = {
    'go': {'Error', 'GoString', 'String', 'init'},
    'java': {'clone', 'equals', 'finalize', 'hashCode', 'toString'},
    'javascript': {'constructor', 'toLocaleString', 'toString', 'valueOf'},
    'ruby': {
        'between?', 'clone', 'display', 'dup', 'eql?', 'equal?', 'hash',
        'initialize', 'initialize_copy', 'inspect', 'method_missing',
        'respond_to?', 'respond_to_missing?', 'to_s', 'to_str',
        '!=', '<', '<=', '<=>', '==', '===', '=~', '>', '>=',
    },
}  # fmt: skip


def is_special(name: str, language: str) -> bool:
  """Whether a method of that name is a constructor or called by no name.

  >>> is_special('__len__', 'python'), is_special('__call', 'php')
  (True, True)
  """
  if language in ('php', 'python'):
    return name.startswith('__') and (language == 'php' or name.endswith('__'))
  return name in _SPECIAL_NAMES[language]


class UnparsableError(Exception):
  """The source is in another language, or another version of it."""


def normalise_newlines(text: str) -> str:
  """A source whose lines end as parsers count them, without a mark ahead."""
  return re.sub(r'\r\n?', '\n', text.removeprefix('\ufeff'))


def dedent(code: str, indentation: str) -> str:
  """Takes a function's indentation from all its lines but the first.

  A method then looks like a function. That lines of a string are changed too
  does no harm: this code is read, never run.

  >>> dedent('def f():\\n    return 1', '  ')
  'def f():\\n  return 1'
  """
  first, *rest = code.split('\n')
  return '\n'.join([first, *(line.removeprefix(indentation) for line in rest)])
