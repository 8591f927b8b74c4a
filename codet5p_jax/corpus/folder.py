"""Where things lie in a corpus folder.

    metadata.json     counts, drops by reason, licences, settings
    files/            the source files (TFDS, ArrayRecord)
    vocabulary/       the vocabulary trained on them
    tokens/<fingerprint>/<split>/   token stores, one set per vocabulary

and, of a corpus that was made with --pairs:

    pairs/<split>.array_record           pairs of text and code
    pair_tokens/<fingerprint>/<split>/   their token ids, in the same order
"""

import pathlib
from typing import Any

from codet5p_jax.corpus.pair_store import PairRows, PairTexts
from codet5p_jax.corpus.token_store import TokenRows
from codet5p_jax.errors import UserError

METADATA = 'metadata.json'
FILES = 'files'
VOCABULARY = 'vocabulary'
TOKENS = 'tokens'
PAIRS = 'pairs'
PAIR_TOKENS = 'pair_tokens'
SPLITS = ('train', 'validation', 'test')


def token_store_folder(
    corpus_dir: pathlib.Path, vocabulary: Any, split: str
) -> pathlib.Path:
  """The token store of a split for a vocabulary.

  Raises:
    UserError: there is no such split or corpus, or it was not tokenised with
      the vocabulary.
  """
  _check_split(corpus_dir, split)
  return _of_vocabulary(corpus_dir, TOKENS, vocabulary, split)


def _check_split(corpus_dir: pathlib.Path, split: str) -> None:
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


def _of_vocabulary(
    corpus_dir: pathlib.Path, kind: str, vocabulary: Any, split: str
) -> pathlib.Path:
  """The folder of a split among TOKENS or PAIR_TOKENS."""
  stores = corpus_dir / kind
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


def check_has_pairs(corpus_dir: pathlib.Path) -> None:
  """Raises UserError: the corpus was prepared without pairs."""
  if not (corpus_dir / PAIRS).is_dir():
    raise UserError(
        f'expected pairs in {corpus_dir}, found none; prepare it again with '
        f'--pairs'
    )


def pair_rows(
    corpus_dir: pathlib.Path, vocabulary: Any, split: str
) -> PairRows:
  """The token ids of a split's pairs, by index.

  Raises:
    UserError: there is no such split or corpus, it has no pairs, or none of
      the split, or they were not tokenised with the vocabulary; or as
      `PairRows`.
  """
  _check_split(corpus_dir, split)
  check_has_pairs(corpus_dir)
  return PairRows(_of_vocabulary(corpus_dir, PAIR_TOKENS, vocabulary, split))


def pair_texts(corpus_dir: pathlib.Path, split: str) -> PairTexts:
  """The pairs of a split, by index, in the order of `pair_rows`.

  Raises:
    UserError: there is no such split or corpus, it has no pairs, or none of
      the split; or as `PairTexts`.
  """
  _check_split(corpus_dir, split)
  check_has_pairs(corpus_dir)
  return PairTexts(corpus_dir / PAIRS / f'{split}.array_record')
