"""A corpus folder where one is needed: kept if it is there, built if not."""

import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm

from codet5p_jax.corpus import folder as layout
from codet5p_jax.corpus import work_folder
from codet5p_jax.corpus.build import CorpusSettings, as_json, build_corpus
from codet5p_jax.corpus.executors import Executor, Processes
from codet5p_jax.corpus.pair_store import PairTexts, PairTokenWriter
from codet5p_jax.corpus.reading import whole_folder
from codet5p_jax.corpus.token_store import write_token_store
from codet5p_jax.data.vocabularies import Vocabulary, load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.storage import local_path

_logger = logging.getLogger(__name__)

_PAIRS_AT_ONCE = 1000


def corpus_of(
    data: str,
    corpus_dir: str | None,
    vocabulary_dir: str | None = None,
    vocab_size: int = CorpusSettings.vocab_size,
    pairs: bool = False,
) -> str:
  """The corpus folder of what a user gives as data.

  So a folder of source files, or `jsonl://rows.jsonl?field=code`, is data as
  good as a corpus that `prepare_corpus` made.

  Args:
    data: a corpus folder; or any of `sources.plan_units`, of which a corpus is
      made with the default settings, or was made before.
    corpus_dir: where such a corpus goes; None where `data` must be one.
    vocabulary_dir: a vocabulary; the corpus is then tokenised with it too.
    vocab_size: of the vocabulary that is trained where none is given.
    pairs: whether pairs of text and code are needed.

  Returns:
    The corpus folder.

  Raises:
    UserError: a corpus is given and has no pairs; or as `build_corpus`.
  """
  vocabulary = load_vocabulary(vocabulary_dir) if vocabulary_dir else None
  if (pathlib.Path(data) / layout.METADATA).is_file():
    folder = local_path(data)
    if pairs:
      layout.check_has_pairs(folder)
  elif corpus_dir is None:
    raise UserError(
        f'expected a corpus folder, found no {layout.METADATA} in {data}; give '
        f'one, or a corpus_dir in which a corpus of it is made'
    )
  else:
    folder = local_path(corpus_dir)
    settings = CorpusSettings(
        sources=(data,), vocab_size=vocab_size, pairs=pairs
    )
    ensure_corpus(with_vocabulary(settings, vocabulary), folder, vocabulary)
  if vocabulary is not None:
    add_token_stores(folder, vocabulary)
  return str(folder)


def with_vocabulary(
    settings: CorpusSettings, vocabulary: Vocabulary | None
) -> CorpusSettings:
  """The settings for a vocabulary that is given, or for none."""
  if vocabulary is None:
    return settings
  return dataclasses.replace(
      settings,
      vocab_size=vocabulary.vocab_size,
      vocabulary_fingerprint=vocabulary.fingerprint,
  )


def ensure_corpus(
    settings: CorpusSettings,
    corpus_dir: pathlib.Path,
    vocabulary: Vocabulary | None = None,
    executor: Executor = Processes(),
) -> dict[str, object]:
  """Builds a corpus, unless there is one of the same settings.

  Returns:
    Its metadata.

  Raises:
    UserError: the folder holds something else, or as `build_corpus`.
  """
  wanted = as_json(settings)
  metadata = _metadata(corpus_dir)
  if metadata is None:
    return build_corpus(settings, corpus_dir, vocabulary, executor)
  found = metadata.get('settings')
  if isinstance(found, dict):
    # Corpora of earlier versions say nothing of pairs, and have none.
    found = {'pairs': False} | found
  if found == wanted:
    _logger.info('The corpus in %s is ready; nothing to do.', corpus_dir)
    # A run that was killed at its very end may have left it.
    shutil.rmtree(work_folder.partial(corpus_dir), ignore_errors=True)
    return metadata
  found = found if isinstance(found, dict) else {}
  names = [name for name in wanted if found.get(name) != wanted[name]]
  raise UserError(
      f'expected a corpus of { {n: wanted[n] for n in names} } in '
      f'{corpus_dir}, found one of { {n: found.get(n) for n in names} }; '
      f'choose another corpus_dir or remove it'
  )


def _metadata(folder: pathlib.Path) -> dict | None:
  try:
    metadata = json.loads((folder / layout.METADATA).read_text())
    if not isinstance(metadata, dict):
      raise ValueError('no JSON object')
    return metadata
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError) as error:
    raise UserError(
        f'expected the metadata of a corpus in {folder / layout.METADATA}, '
        f'found: {error}; remove the folder and prepare the corpus again'
    ) from error


def add_token_stores(corpus_dir: pathlib.Path, vocabulary: Vocabulary) -> None:
  """Tokenises a corpus with a further vocabulary, unless that was done.

  The files stay those that the corpus's own vocabulary chose by length.

  Args:
    corpus_dir: the corpus.
    vocabulary: the vocabulary.

  Raises:
    UserError: the disk is full or the folder not writable.
  """
  from codet5p_jax.corpus.tfds_builder import read_files

  target = corpus_dir / layout.TOKENS / vocabulary.fingerprint[:16]
  if not target.is_dir():
    with whole_folder(target) as stores:
      for split in layout.SPLITS:
        files = read_files(corpus_dir / layout.FILES, split)
        write_token_store(
            stores / split,
            _documents(files, vocabulary),
            vocabulary.task_tokens.eos,
            vocabulary.vocab_size,
            vocabulary.fingerprint,
        )
  target = corpus_dir / layout.PAIR_TOKENS / vocabulary.fingerprint[:16]
  if (corpus_dir / layout.PAIRS).is_dir() and not target.is_dir():
    numbers = _metadata(corpus_dir)['pairs']
    with whole_folder(target) as stores:
      for split in layout.SPLITS:
        path = corpus_dir / layout.PAIRS / f'{split}.array_record'
        pairs = PairTexts(path) if numbers[split] else []
        _write_pair_tokens(stores / split, pairs, vocabulary)


def _documents(
    files, vocabulary: Vocabulary
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for row in tqdm.tqdm(files, 'tokenising', unit=' files'):
    yield vocabulary.encode_with_word_starts(row['text'].decode())


def _write_pair_tokens(
    folder: pathlib.Path,
    pairs: Sequence[dict[str, str]] | PairTexts,
    vocabulary: Vocabulary,
) -> None:
  """Tokenises pairs; a side of no tokens stays, to stay aligned."""
  writer = PairTokenWriter(
      folder, vocabulary.vocab_size, vocabulary.fingerprint
  )
  places = range(len(pairs))
  with tqdm.tqdm(total=len(pairs), desc='tokenising', unit=' pairs') as bar:
    for begin in places[::_PAIRS_AT_ONCE]:
      part = [pairs[i] for i in places[begin : begin + _PAIRS_AT_ONCE]]
      texts = vocabulary.encode_batch([pair['text'] for pair in part])
      codes = vocabulary.encode_batch([pair['code'] for pair in part])
      for text, code in zip(texts, codes, strict=True):
        writer.write(np.array(text, np.int32), np.array(code, np.int32))
      bar.update(len(part))
  writer.close()
