"""Pairs of text and code of a document, by CodeSearchNet's rules.

The rules are those of Husain et al. (2019), section 2: a documentation's first
paragraph of at least three words, code of at least three lines, no tests, no
constructors or other special methods. Near-duplicates need all pairs and are
told later (`near_duplicates`).
"""

import dataclasses
import re
import textwrap
from collections.abc import Iterator

from codet5p_jax.corpus.pairs import syntax_trees
from codet5p_jax.corpus.pairs.documentation import count_words, first_paragraph
from codet5p_jax.corpus.pairs.functions import (
    Function,
    UnparsableError,
    is_special,
    normalise_newlines,
)
from codet5p_jax.corpus.pairs.python_functions import python_functions
from codet5p_jax.corpus.source_files import SourceFile, as_text

LANGUAGES = ('python', *syntax_trees.LANGUAGES)
"""Those of CodeSearchNet."""

REASONS = (
    'empty',
    'near_duplicate',
    'short_code',
    'short_documentation',
    'special_method',
    'test',
    'undocumented',
    'unparsable',
)

MIN_WORDS = 3
MIN_LINES = 3

_COMMENTS_ABOVE = {
    'ruby': re.compile(r'(\s*#[^\n]*)*\s*'),
    # A comment of PHP may begin with #, an attribute with #[.
    'php': re.compile(
        r'(\s*(/\*(.*?\*/|.*)|//[^\n]*|#(?!\[)[^\n]*))*\s*', re.DOTALL
    ),
}
_OTHER_COMMENTS_ABOVE = re.compile(
    r'(\s*(/\*(.*?\*/|.*)|//[^\n]*))*\s*', re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Pair:
  """A function's description, and the function without it.

  Attributes:
    text: one paragraph, without line breaks.
    code: begins at column 0; comments in it stay.
    name: the function's.
  """

  text: str
  code: str
  name: str


def extract_pairs(file: SourceFile) -> Iterator[Pair | str]:
  """The pairs of a document, and of REASONS one for each function left out.

  A document of none of LANGUAGES has no functions. One that comes with its
  documentation is one function.
  """
  if file.language not in LANGUAGES:
    return
  try:
    if file.documentation is not None:
      function = _given_function(file)
      is_empty = not (function.documentation.strip() and function.code)
      yield 'empty' if is_empty else _judge(function, file.language)
      return
    if file.language == 'python':
      functions = python_functions(file.text)
    else:
      functions = syntax_trees.tree_functions(file.text, file.language)
  except UnparsableError:
    yield 'unparsable'
    return
  for function in functions:
    yield _judge(function, file.language)


def _judge(function: Function, language: str) -> Pair | str:
  """The pair of a function, or the first reason to leave it out."""
  if function.is_broken:
    return 'unparsable'
  if 'test' in function.name.lower():
    return 'test'
  if function.is_constructor or is_special(function.name, language):
    return 'special_method'
  if function.documentation is None:
    return 'undocumented'
  # A docstring may spell characters that UTF-8 cannot hold.
  text = as_text(first_paragraph(function.documentation))
  if count_words(text) < MIN_WORDS:
    return 'short_documentation'
  lines = function.code.split('\n')
  if sum(not line.isspace() and line != '' for line in lines) < MIN_LINES:
    return 'short_code'
  return Pair(text, function.code, function.name)


def _given_function(file: SourceFile) -> Function:
  """The function of a row of CodeSearchNet's.

  Of Python the docstring is still in the code, of others there may be comments
  above it.
  """
  name = file.name.rpartition('.')[2]
  if file.language == 'python':
    functions = python_functions(textwrap.dedent(file.text))
    if not functions:
      raise UnparsableError
    name, code = name or functions[0].name, functions[0].code
  else:
    text = normalise_newlines(file.text)
    above = _COMMENTS_ABOVE.get(file.language, _OTHER_COMMENTS_ABOVE)
    first, *rest = text[above.match(text).end() :].rstrip().split('\n')
    # A method was cut out from where it begins, and its later lines, of which
    # the last closes it, have the indentation that it had.
    code = '\n'.join([first, *textwrap.dedent('\n'.join(rest)).split('\n')])
  return Function(name, file.documentation, code.rstrip())
