"""Source code to a corpus folder."""

import logging
from collections.abc import Mapping, Sequence

from codet5p_jax.corpus.build import CorpusSettings
from codet5p_jax.corpus.executors import Beam, Processes
from codet5p_jax.corpus.licences import ALLOWED
from codet5p_jax.corpus.provision import ensure_corpus, with_vocabulary
from codet5p_jax.corpus.source_files import LANGUAGES
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.storage import local_path

_logger = logging.getLogger(__name__)


def prepare_corpus(
    corpus_dir: str,
    sources: Sequence[str] = ('standard_library',),
    vocab_size: int = 4096,
    vocabulary_dir: str | None = None,
    vocabulary_characters: int = 32_000_000,
    languages: Sequence[str] = tuple(LANGUAGES),
    licences: Sequence[str] = ALLOWED,
    min_tokens: int = 50,
    max_tokens: int = 2000,
    pairs: bool = False,
    runner: str | None = None,
    processes: int | None = None,
) -> None:
  """Reads and filters source files, trains a vocabulary, tokenises.

  A folder that is there and was made with the same settings is kept; what a
  stopped run left in CORPUS_DIR.partial is gone on with.

  Args:
    corpus_dir: the folder to create.
    sources: where files come from, separated by commas; standard_library and
      installed_packages are the running interpreter's own; else a folder, a
      .zip, .whl or .tar archive, a .jsonl or .parquet file, a glob of these, or
      jsonl://PATH?field=code&language=python.
    vocab_size: pieces of the vocabulary, task tokens included.
    vocabulary_dir: a vocabulary to use instead of training one.
    vocabulary_characters: how much of the training files a vocabulary is
      trained on.
    languages: the languages to keep.
    licences: the licences to keep, as SPDX identifiers; files of unknown
      licence are kept too.
    min_tokens: shorter files are dropped.
    max_tokens: longer ones too.
    pairs: also extracts pairs of text and code, which stage 2 needs: documented
      functions of Python, JavaScript, Go, Java, PHP and Ruby, by the rules of
      CodeSearchNet, and rows of .jsonl files in its format.
    runner: a runner of Apache Beam whose workers share this file system, such
      as DirectRunner, instead of processes.
    processes: how many work; all cores by default.

  Raises:
    UserError: a source is missing or damaged, or the folder holds something
      else.
  """
  vocabulary = load_vocabulary(vocabulary_dir) if vocabulary_dir else None
  settings = CorpusSettings(
      sources=tuple(sources),
      languages=tuple(languages),
      licences=tuple(licence.lower() for licence in licences),
      pairs=pairs,
      vocab_size=vocab_size,
      vocabulary_characters=vocabulary_characters,
      min_tokens=min_tokens,
      max_tokens=max_tokens,
  )
  folder = local_path(corpus_dir)
  metadata = ensure_corpus(
      with_vocabulary(settings, vocabulary),
      folder,
      vocabulary,
      Beam(runner) if runner else Processes(processes),
  )
  _logger.info(
      'Corpus in %s: %d files, %.1f million tokens to train on; dropped: %s.',
      folder,
      sum(metadata['files'].values()),
      metadata['tokens']['train'] / 1e6,
      _told(metadata['dropped']),
  )
  if pairs:
    _logger.info(
        'Pairs of text and code: %s; dropped: %s.',
        ', '.join(f'{n} {split}' for split, n in metadata['pairs'].items()),
        _told(metadata['pairs_dropped']),
    )


def _told(dropped: Mapping[str, int]) -> str:
  told = ', '.join(f'{n} {reason}' for reason, n in dropped.items() if n)
  return told or 'none'
