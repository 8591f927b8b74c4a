"""Builds a corpus folder: files, vocabulary, token stores, metadata."""

import collections
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator

import numpy as np
import tqdm

from codet5p_jax.corpus import folder as layout
from codet5p_jax.corpus.source_files import SourceFile
from codet5p_jax.corpus.splits import missing_splits, split_origins
from codet5p_jax.corpus.token_store import write_token_store
from codet5p_jax.data.vocabularies import SentencePiece, Vocabulary
from codet5p_jax.errors import UserError

FORMAT_VERSION = 1

# Share of the origins that are held out, each.
VALIDATION_SHARE = 0.03
TEST_SHARE = 0.03

# A sentence for the vocabulary's training: whole lines, at most so many
# characters, so that pieces may span line ends.
_CHUNK_CHARACTERS = 2000


def build_corpus(
    files: Iterable[SourceFile | None],
    corpus_dir: pathlib.Path,
    vocab_size: int,
    settings: dict[str, object],
) -> dict[str, object]:
  """Builds a corpus folder, which appears only when it is whole.

  Exact duplicates (white space aside) are dropped; whole origins are held out
  for validation and test; the vocabulary is trained on the training files.

  Args:
    files: the source files; None for one that could not be read.
    corpus_dir: must not exist.
    vocab_size: pieces of the vocabulary to train.
    settings: recorded in the metadata.

  Returns:
    The metadata.

  Raises:
    UserError: the folder exists or cannot be written, or there is too little
      source for a corpus.
  """
  if corpus_dir.exists():
    raise UserError(
        f'expected to create {corpus_dir}, found that it exists; remove it or '
        f'choose another corpus_dir'
    )
  kept, drops = _deduplicated(files)
  splits = split_origins(
      (file.origin for file in kept), VALIDATION_SHARE, TEST_SHARE
  )
  if missing := missing_splits(splits):
    raise UserError(
        f'expected files of at least 3 packages or repositories, one for each '
        f'split, found {len(splits)}, so nothing is left for '
        f'{", ".join(missing)}; add sources'
    )
  by_split = {split: [] for split in layout.SPLITS}
  for file in kept:
    by_split[splits[file.origin]].append(file)

  partial = corpus_dir.with_name(corpus_dir.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir(parents=True)
    metadata = _write(partial, by_split, vocab_size)
    metadata.update(dropped=dict(drops), settings=settings)
    text = json.dumps(metadata, indent=2, sort_keys=True) + '\n'
    (partial / layout.METADATA).write_text(text)
    os.replace(partial, corpus_dir)
  except (OSError, RuntimeError) as error:
    shutil.rmtree(partial, ignore_errors=True)
    # ArrayRecord raises RuntimeError with the system's words in its own.
    failed = re.search(r'\w\(\) failed: ([^;]*)', str(error))
    if isinstance(error, RuntimeError) and not failed:
      raise
    reason = failed[1] if failed else getattr(error, 'strerror', None) or error
    raise UserError(
        f'expected to write the corpus to {corpus_dir}, found: {reason}; '
        f'choose a folder with room that you may write to'
    ) from error
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return metadata


def _deduplicated(
    files: Iterable[SourceFile | None],
) -> tuple[list[SourceFile], collections.Counter]:
  kept: dict[str, SourceFile] = {}
  drops = collections.Counter(unreadable=0, empty=0, duplicate=0)
  for file in tqdm.tqdm(files, 'reading', unit=' files'):
    if file is None:
      drops['unreadable'] += 1
    elif not file.text.strip():
      drops['empty'] += 1
    elif file.hash in kept:
      drops['duplicate'] += 1
    else:
      kept[file.hash] = file
  return list(kept.values()), drops


def _write(
    corpus_dir: pathlib.Path,
    by_split: dict[str, list[SourceFile]],
    vocab_size: int,
) -> dict[str, object]:
  from codet5p_jax.corpus.tfds_builder import write_files

  write_files(corpus_dir / layout.FILES, by_split)
  vocabulary = SentencePiece.train(_chunks(by_split['train']), vocab_size)
  vocabulary.save(corpus_dir / layout.VOCABULARY)
  stores = corpus_dir / layout.TOKENS / vocabulary.fingerprint[:16]
  counts = {
      split: write_token_store(
          stores / split,
          _documents(files, split, vocabulary),
          vocabulary.task_tokens.eos,
          vocabulary.vocab_size,
          vocabulary.fingerprint,
      )
      for split, files in by_split.items()
  }
  files = [file for part in by_split.values() for file in part]
  return {
      'format_version': FORMAT_VERSION,
      'files': {split: len(part) for split, part in by_split.items()},
      'tokens': {split: count['num_tokens'] for split, count in counts.items()},
      'languages': collections.Counter(file.language for file in files),
      'licences': collections.Counter(file.licence for file in files),
      'vocabulary_fingerprint': vocabulary.fingerprint,
  }


def _documents(
    files: list[SourceFile], split: str, vocabulary: Vocabulary
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for file in tqdm.tqdm(files, f'tokenising {split}', unit=' files'):
    yield vocabulary.encode_with_word_starts(file.text)


def _chunks(files: list[SourceFile]) -> Iterator[str]:
  """Cuts files into runs of whole lines, for the vocabulary's training."""
  for file in tqdm.tqdm(files, 'training the vocabulary', unit=' files'):
    chunk = ''
    for line in file.text.splitlines(keepends=True):
      if chunk and len(chunk) + len(line) > _CHUNK_CHARACTERS:
        yield chunk
        chunk = ''
      chunk += line[:_CHUNK_CHARACTERS]
    if chunk:
      yield chunk
