"""Where things lie in a corpus folder.

    metadata.json     counts, drops by reason, licences, settings
    files/            the source files (TFDS, ArrayRecord)
    vocabulary/       the vocabulary trained on them
    tokens/<fingerprint>/<split>/   token stores, one set per vocabulary
"""

import pathlib
from typing import Any

from codet5p_jax.corpus.token_store import TokenRows
from codet5p_jax.errors import UserError

METADATA = 'metadata.json'
FILES = 'files'
VOCABULARY = 'vocabulary'
TOKENS = 'tokens'
SPLITS = ('train', 'validation', 'test')


def token_store_folder(
    corpus_dir: pathlib.Path, vocabulary: Any, split: str
) -> pathlib.Path:
  """The token store of a split for a vocabulary.

  Raises:
    UserError: there is no such split or corpus, or it was not tokenised with
      the vocabulary.
  """
  if split not in SPLITS:
    raise UserError(
        f'expected a split among {", ".join(SPLITS)}, found {split!r}; set '
        f'SPLIT'
    )
  if not (corpus_dir / METADATA).is_file():
    raise UserError(
        f'expected a corpus folder, found no {METADATA} in {corpus_dir}; make '
        f'one with codet5p prepare_corpus --corpus_dir={corpus_dir}'
    )
  stores = corpus_dir / TOKENS
  folder = stores / vocabulary.fingerprint[:16] / split
  if not folder.is_dir():
    found = ', '.join(sorted(x.name for x in stores.glob('*'))) or 'none'
    raise UserError(
        f'expected tokens of vocabulary {vocabulary.fingerprint[:16]} in '
        f'{corpus_dir}, found those of {found}; give the vocabulary the corpus '
        f'was tokenised with, or prepare it again'
    )
  return folder


def token_rows(
    corpus_dir: pathlib.Path, vocabulary: Any, split: str, row_length: int
) -> TokenRows:
  """Rows of `row_length` tokens of a split, by index.

  Raises:
    UserError: as `token_store_folder` and `TokenRows`.
  """
  folder = token_store_folder(corpus_dir, vocabulary, split)
  return TokenRows(folder, row_length)
