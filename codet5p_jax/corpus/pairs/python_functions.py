"""Functions of Python source and their docstrings, through `ast`.

As in CodeSearchNet the code begins at `def`: decorators are left out.
"""

import ast
import itertools
import re
import warnings
from collections.abc import Iterator

from codet5p_jax.corpus.pairs.functions import (
    Function,
    UnparsableError,
    dedent,
    normalise_newlines,
)

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# What goes with a docstring: the rest of its line, and empty lines below.
_REST_OF_LINE = re.compile(rb'[ \t\f;]*(#[^\n]*)?\n([ \t\f]*\n)*')
_SEMICOLON = re.compile(rb'[ \t\f;]*')


def python_functions(text: str) -> list[Function]:
  """The functions and methods of a source file, in order.

  Raises:
    UnparsableError: the running interpreter cannot parse it.
  """
  source = normalise_newlines(text)
  try:
    with warnings.catch_warnings():
      # Old code has escapes that the interpreter complains of.
      warnings.simplefilter('ignore')
      module = ast.parse(source)
  # Code may be nested too deeply, or hold characters that no code holds.
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    raise UnparsableError from error
  content = source.encode()
  # `ast` counts lines from 1, and columns in bytes.
  lengths = (len(line) + 1 for line in content.split(b'\n'))
  begins = [0, *itertools.accumulate(lengths, initial=0)]
  return [_function(node, content, begins) for node in _nodes(module)]


def _nodes(
    module: ast.Module,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
  """All that are not nested in functions; no recursion, for deep nesting."""
  waiting: list[ast.AST] = [module]
  while waiting:
    node = waiting.pop()
    if isinstance(node, _FUNCTIONS):
      yield node
    elif not isinstance(node, ast.expr):
      waiting += reversed(list(ast.iter_child_nodes(node)))


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    content: bytes,
    begins: list[int],
) -> Function:
  begin = begins[node.lineno] + node.col_offset
  end = begins[node.end_lineno] + node.end_col_offset
  documentation = ast.get_docstring(node)
  if documentation is None:
    code = content[begin:end]
  elif len(node.body) == 1:
    code = b''
  else:
    first, last = _docstring_span(node.body[0], content, begins)
    code = content[begin:first] + content[last:end]
  line = content[begins[node.lineno] : begin].decode()
  indentation = line[: len(line) - len(line.lstrip())]
  code = dedent(code.decode(), indentation)
  return Function(node.name, documentation, code)


def _docstring_span(
    node: ast.stmt, content: bytes, begins: list[int]
) -> tuple[int, int]:
  """The bytes [begin, end) that go with a docstring before other statements."""
  begin = begins[node.lineno] + node.col_offset
  end = begins[node.end_lineno] + node.end_col_offset
  line = begins[node.lineno]
  rest = _REST_OF_LINE.match(content, end)
  if rest and not content[line:begin].strip():
    return line, rest.end()
  return begin, _SEMICOLON.match(content, end).end()
