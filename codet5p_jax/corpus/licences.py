"""Licences: one spelling for each, and which are allowed.

A licence is an SPDX expression in lower case, as "mit" or "mit or apache-2.0".
"""

import re
from collections.abc import Collection, Sequence

from codet5p_jax.corpus.source_files import UNKNOWN

ALLOWED = (
    'mit',
    'apache-2.0',
    'bsd-3-clause',
    'bsd-2-clause',
    'cc0-1.0',
    'unlicense',
    'isc',
    # The seven above are the paper's (section 4.1). This one is ours, for the
    # library of the interpreter.
    'psf-2.0',
)

_UNKNOWN = frozenset({'', 'unknown', 'none', 'noassertion', 'other'})

# Names without the words "license", "the", "version", "software", "v".
_SPELLINGS = {
    'apache': 'apache-2.0',
    'apache 2': 'apache-2.0',
    'apache 2.0': 'apache-2.0',
    'apache2': 'apache-2.0',
    'apache2.0': 'apache-2.0',
    'asl 2.0': 'apache-2.0',
    # Which of them is not said; both are allowed.
    'bsd': 'bsd-3-clause',
    'bsd style': 'bsd-3-clause',
    'new bsd': 'bsd-3-clause',
    'modified bsd': 'bsd-3-clause',
    '3 clause bsd': 'bsd-3-clause',
    'bsd 3': 'bsd-3-clause',
    'bsd 3 clause': 'bsd-3-clause',
    'simplified bsd': 'bsd-2-clause',
    '2 clause bsd': 'bsd-2-clause',
    'bsd 2': 'bsd-2-clause',
    'bsd 2 clause': 'bsd-2-clause',
    'cc0': 'cc0-1.0',
    'cc0 1.0': 'cc0-1.0',
    'cc0 1.0 universal': 'cc0-1.0',
    'cc0 1.0 universal (cc0 1.0) public domain dedication': 'cc0-1.0',
    'expat': 'mit',
    'mit/x11': 'mit',
    'psf': 'psf-2.0',
    'psf 2': 'psf-2.0',
    'psf 2.0': 'psf-2.0',
    'psfl': 'psf-2.0',
    'python foundation': 'psf-2.0',
}

# A whole licence where its name should stand: words that only it has.
_TEXTS = (
    ('permission is hereby granted, free of charge', 'mit'),
    ('apache license version 2.0', 'apache-2.0'),
    ('neither the name of', 'bsd-3-clause'),
    ('redistribution and use in source and binary forms', 'bsd-2-clause'),
    ('permission to use, copy, modify, and/or distribute', 'isc'),
    ('this is free and unencumbered software', 'unlicense'),
)

_OPERATORS = ('and', 'or')


def normalise_licence(text: str) -> str:
  """One spelling of a licence's name, expression, classifier or full text.

  >>> normalise_licence('Apache License, Version 2.0')
  'apache-2.0'
  >>> normalise_licence('License :: OSI Approved :: MIT License')
  'mit'
  >>> normalise_licence('(MIT OR GPL-3.0-or-later)')
  '(mit or gpl-3.0-or-later)'
  """
  text = ' '.join(text.split())
  lowered = text.lower()
  if lowered in _UNKNOWN:
    return UNKNOWN
  if len(text) > 100:
    for words, licence in _TEXTS:
      if words in lowered:
        return licence
    return lowered[:100]
  name = lowered.rpartition(' :: ')[2]
  if name == 'osi approved':
    return UNKNOWN
  if (single := _single(name)) is not None:
    return single
  # An expression, with its operators in any case.
  parts = re.split(r'(\(|\)|\s+(?:and|or|with)\s+|\s*/\s*|\s*,\s*)', name)
  spelled = []
  for part in parts:
    part = part.strip()
    if part == '/':
      spelled.append('or')
    elif part == ',':
      spelled.append('and')
    elif part:
      spelled.append(_single(part) or part)
  return ' '.join(spelled).replace('( ', '(').replace(' )', ')')


def _single(name: str) -> str | None:
  """The identifier of one licence, or None for an expression."""
  if name in ALLOWED:
    return name
  words = re.sub(r'[-_,]', ' ', name)
  words = re.sub(r'\b(licen[cs]e|the|version|software|v(?=\d))\s?', '', words)
  words = ' '.join(words.split())
  if not re.search(r'\b(and|or)\b', words):
    words = re.sub(r' ?\([^()]*\)$', '', words)  # Its abbreviation.
  if words in ALLOWED:
    return words
  return _SPELLINGS.get(words)


def join_licences(licences: Sequence[str]) -> str:
  """One expression of several licences that all hold."""
  spelled = [normalise_licence(licence) for licence in licences]
  known = sorted({licence for licence in spelled if licence != UNKNOWN})
  if len(known) > 1:
    known = [f'({x})' if ' or ' in x else x for x in known]
  return ' and '.join(known) or UNKNOWN


def is_allowed(licence: str, allowed: Collection[str]) -> bool:
  """Whether a normalised licence permits use; an unknown one does.

  Of licences joined by OR one must be allowed, of those joined by AND all. An
  exception (WITH) only adds permissions.
  """
  if licence == UNKNOWN:
    return True
  words = re.findall(r'\(|\)|[^\s()]+', licence)
  try:
    value, rest = _any_of(words, allowed)
  except (IndexError, ValueError):
    return False
  return value and not rest


def _any_of(
    words: list[str], allowed: Collection[str]
) -> tuple[bool, list[str]]:
  value, words = _all_of(words, allowed)
  while words and words[0] == 'or':
    other, words = _all_of(words[1:], allowed)
    value = value or other
  return value, words


def _all_of(
    words: list[str], allowed: Collection[str]
) -> tuple[bool, list[str]]:
  value, words = _one(words, allowed)
  while words and words[0] == 'and':
    other, words = _one(words[1:], allowed)
    value = value and other
  return value, words


def _one(words: list[str], allowed: Collection[str]) -> tuple[bool, list[str]]:
  if words[0] == '(':
    value, words = _any_of(words[1:], allowed)
    _, *words = words  # The closing bracket.
    return value, words
  value, words = words[0] in allowed, words[1:]
  return value, words[2:] if words and words[0] == 'with' else words
