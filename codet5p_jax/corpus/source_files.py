"""What a file of source code is, and the languages that are known."""

import dataclasses
import functools
import hashlib
import re

LANGUAGES = {
    'python': ('.py',),
    'javascript': ('.js', '.mjs', '.cjs', '.jsx'),
    'go': ('.go',),
    'java': ('.java',),
    'php': ('.php',),
    'ruby': ('.rb',),
    'c': ('.c', '.h'),
    'cpp': ('.cc', '.cpp', '.cxx', '.hh', '.hpp', '.hxx'),
    'csharp': ('.cs',),
}
"""The nine languages of the paper (section 4.1) by their file extensions."""

UNKNOWN = 'unknown'

_LANGUAGE_OF = {
    extension: language
    for language, extensions in LANGUAGES.items()
    for extension in extensions
}
# How the rows of published datasets spell them.
_OTHER_NAMES = {
    'c#': 'csharp',
    'c++': 'cpp',
    'golang': 'go',
    'js': 'javascript',
    'py': 'python',
    'python3': 'python',
}


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """One file of source code.

  Attributes:
    text: its content.
    language: one of LANGUAGES, or another in lower case, or "unknown".
    licence: SPDX identifier or expression in lower case, or "unknown".
    origin: the package or repository; splits are drawn by origin. Empty where
      the file is its own origin.
    path: within the origin's source tree, for people.
    documentation: where the file is a single function that comes with it, as
      rows of CodeSearchNet do; else None.
    name: of that function.
    partition: the split that such a row was published in, or empty.
  """

  text: str
  language: str
  licence: str
  origin: str
  path: str
  documentation: str | None = None
  name: str = ''
  partition: str = ''

  @functools.cached_property
  def hash(self) -> str:
    """Equal for files that differ in white space only (paper, 4.1)."""
    # As re.sub(r'\s+', '', text), in a third of the time.
    squeezed = ''.join(self.text.split())
    return hashlib.sha256(squeezed.encode('utf-8', 'replace')).hexdigest()


def language_of_path(path: str) -> str:
  """The language by a file's extension, or "unknown"."""
  stem, dot, extension = path.rpartition('.')
  if not stem or '/' in extension:
    return UNKNOWN
  return _LANGUAGE_OF.get(dot + extension.lower(), UNKNOWN)


def language_of_name(name: str) -> str:
  """The language by its name in a row, as "C++" or "Python"."""
  name = name.strip().lower()
  return _OTHER_NAMES.get(name, name) or UNKNOWN


def as_text(name: str) -> str:
  """A file's name as UTF-8 can hold it: names may be any bytes."""
  return name.encode(errors='replace').decode()


def normalise_origin(name: str) -> str:
  """One spelling for a package's name, as PEP 503 has it.

  >>> normalise_origin('Typing_Extensions'), normalise_origin('zope.interface')
  ('typing-extensions', 'zope-interface')
  """
  return re.sub(r'[-_.]+', '-', as_text(name).strip().lower()).strip('-')
