"""From comments to what they say of a function."""

import re
from collections.abc import Sequence

# What ends a description: an empty line, tags of Javadoc, JSDoc, PHPDoc and
# YARD, fields of reStructuredText (but no role, as :func:`f`), headings of
# Google's and NumPy's style, examples.
_END = re.compile(
    r'\s*$|\s*[@\\][a-z]|\s*:[a-z][\w *]*:(?!`)|\s*>>>|\s*[-=~]{3,}\s*$'
    r'|\s*(args|arguments|attributes|examples?|keyword arg(ument)?s|notes?'
    r'|parameters|params|raises|returns?|see also|yields?)\s*:?\s*$',
    re.IGNORECASE,
)
# Go's comments to its compiler and tools.
_DIRECTIVE = re.compile(r'//[a-z]+:\S')


def first_paragraph(documentation: str) -> str:
  """The description alone, as one line.

  >>> first_paragraph('Adds two\\nnumbers.\\n@param a one\\n')
  'Adds two numbers.'
  """
  lines = []
  for line in documentation.strip().split('\n'):
    if _END.match(line):
      break
    lines.append(line)
  return ' '.join(' '.join(lines).split())


def count_words(text: str) -> int:
  """Words between white space; what has no letter or digit is none.

  >>> count_words('-- Adds b.c !')
  2
  """
  return sum(bool(re.search(r'\w', word)) for word in text.split())


def clean_block(comment: str) -> str:
  """What a comment of Javadoc's kind says.

  >>> clean_block('/** Adds.\\n   * @return sum\\n   */')
  'Adds.\\n@return sum\\n'
  """
  inner = comment.removeprefix('/**').removesuffix('/').rstrip('*')
  lines = [re.sub(r'^[ \t]*\*[ \t]?', '', line) for line in inner.split('\n')]
  return '\n'.join(line.strip() for line in lines)


def clean_lines(comments: Sequence[str]) -> str:
  """What comments of a line each say, as those of Go and Ruby.

  >>> clean_lines(['// Add adds.', '//go:noinline', '//', '// More.'])
  'Add adds.\\n\\nMore.'
  """
  return '\n'.join(
      re.sub(r'^(//+|#+)', '', line).strip()
      for line in comments
      if not _DIRECTIVE.match(line)
  )
