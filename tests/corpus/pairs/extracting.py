"""Texts to pairs, for tests."""

from codet5p_jax.corpus.pairs.extraction import extract_pairs
from codet5p_jax.corpus.source_files import SourceFile


def extract(language, text, **given):
  """The pairs of a text, and the reasons of what is left out, in order."""
  file = SourceFile(text, language, 'mit', 'a-package', 'a/file', **given)
  return list(extract_pairs(file))
