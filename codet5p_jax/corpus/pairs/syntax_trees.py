"""Functions of JavaScript, Go, Java, PHP and Ruby and the comments above them.

Through tree-sitter, whose grammars are packages that need no network. A parser
goes on after an error, so a function is taken from a file that has one
elsewhere.
"""

import dataclasses
import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from codet5p_jax.corpus.pairs.documentation import clean_block, clean_lines
from codet5p_jax.corpus.pairs.functions import (
    Function,
    UnparsableError,
    dedent,
    normalise_newlines,
)


@dataclasses.dataclass(frozen=True)
class _Grammar:
  """Names of types of nodes.

  Attributes:
    functions: functions that have a name and a place of their own.
    closures: other functions.
    constructors: those of `functions` that are called by no name.
    mark: how documentation begins: a block, or lines.
    naming: what gives a closure a name, and the field of the name.
    maker: what the grammar's module calls its language.
  """

  functions: frozenset[str]
  closures: frozenset[str]
  mark: str
  constructors: frozenset[str] = frozenset()
  naming: Mapping[str, str] = dataclasses.field(default_factory=dict)
  maker: str = 'language'


_GRAMMARS = {
    'javascript': _Grammar(
        frozenset({
            'function_declaration', 'generator_function_declaration',
            'method_definition',
        }),
        frozenset({
            'arrow_function', 'function_expression', 'generator_function',
        }),
        '/**',
        naming={
            'variable_declarator': 'name',
            'pair': 'key',
            'assignment_expression': 'left',
            'field_definition': 'property',
        },
    ),
    'go': _Grammar(
        frozenset({'function_declaration', 'method_declaration'}),
        frozenset({'func_literal'}),
        '//',
    ),
    'java': _Grammar(
        frozenset({
            'method_declaration', 'constructor_declaration',
            'compact_constructor_declaration',
        }),
        frozenset({'lambda_expression'}),
        '/**',
        frozenset({
            'constructor_declaration', 'compact_constructor_declaration'
        }),
    ),
    'php': _Grammar(
        frozenset({'function_definition', 'method_declaration'}),
        frozenset({'anonymous_function', 'arrow_function'}),
        '/**',
        maker='language_php',
    ),
    'ruby': _Grammar(
        frozenset({'method', 'singleton_method'}),
        frozenset({'lambda'}),
        '#',
    ),
}  # fmt: skip

# What a function is the whole of, so that documentation stands above it.
_WRAPPERS = frozenset({
    'argument_list', 'assignment_expression', 'call', 'export_statement',
    'expression_statement', 'lexical_declaration', 'variable_declaration',
})  # fmt: skip
LANGUAGES = tuple(_GRAMMARS)


def tree_functions(text: str, language: str) -> list[Function]:
  """The functions and methods of a source file, in order.

  Raises:
    UnparsableError: it has errors, and no function that can be told.
  """
  # Positions are bytes.
  content = normalise_newlines(text).encode()
  root = _parser(language).parse(content).root_node
  grammar = _GRAMMARS[language]
  nodes, comments = [], {}
  for node in _outer_nodes(root, grammar):
    if node.type.endswith('comment'):
      if _is_first(node, content):
        comments[node.end_point.row] = node
    else:
      nodes.append(node)
  if root.has_error and not nodes:
    raise UnparsableError
  return [_function(node, comments, content, grammar) for node in nodes]


@functools.cache
def _parser(language: str) -> Any:
  import tree_sitter

  module = importlib.import_module(f'tree_sitter_{language}')
  maker = getattr(module, _GRAMMARS[language].maker)
  return tree_sitter.Parser(tree_sitter.Language(maker()))


def _outer_nodes(root: Any, grammar: _Grammar) -> Iterator[Any]:
  """Functions and comments that are not inside of functions, in order."""
  waiting = [root]
  while waiting:
    node = waiting.pop()
    if node.type in grammar.functions or node.type.endswith('comment'):
      yield node
    elif node.type in grammar.closures:
      if node.parent.type in grammar.naming:
        yield node
    else:
      waiting += reversed(node.children)


def _function(
    node: Any, comments: dict[int, Any], content: bytes, grammar: _Grammar
) -> Function:
  whole = node
  while True:
    if node.type in grammar.closures and whole is node:
      whole = node.parent  # What names it.
    elif whole.parent.type in _WRAPPERS and _is_alone(whole):
      whole = whole.parent
    else:
      break
  begin = whole.start_byte
  line = content[content.rfind(b'\n', 0, begin) + 1 : begin].decode()
  indentation = line[: len(line) - len(line.lstrip())]
  code = ''
  if node.child_by_field_name('body'):
    code = dedent(content[begin : whole.end_byte].decode(), indentation)
  return Function(
      _name(node, grammar).decode(),
      _documentation(whole, comments, content, grammar),
      code,
      is_constructor=node.type in grammar.constructors,
      is_broken=node.has_error,
  )


def _is_alone(node: Any) -> bool:
  """Whether nothing else is declared in the same statement."""
  return node.type != 'variable_declarator' or 1 == sum(
      child.type == node.type for child in node.parent.children
  )


def _name(node: Any, grammar: _Grammar) -> bytes:
  if node.type in grammar.closures:
    named = node.parent.child_by_field_name(grammar.naming[node.parent.type])
    # Of a.b.c = function the last.
    named = named.child_by_field_name('property') or named
    return named.text.strip(b'\'"')
  named = node.child_by_field_name('name')
  return named.text if named else b''


def _documentation(
    whole: Any, comments: dict[int, Any], content: bytes, grammar: _Grammar
) -> str | None:
  """What the comments directly above say; None if there are none."""
  if not _is_first(whole, content):
    return None
  row = whole.start_point.row - 1
  found = []
  while row in comments and comments[row].text.startswith(
      grammar.mark.encode()
  ):
    found.insert(0, comments[row].text.decode())
    if grammar.mark == '/**':
      return clean_block(found[0])
    row -= 1
  return clean_lines(found) if found else None


def _is_first(node: Any, content: bytes) -> bool:
  """Whether a node is the first in its line."""
  begin = node.start_byte
  return not content[content.rfind(b'\n', 0, begin) + 1 : begin].strip()
