"""Source code to a vocabulary."""

import logging
from collections.abc import Sequence

from codet5p_jax.corpus import work_folder
from codet5p_jax.corpus.build import (
    SourceSettings,
    check_vocab_size,
    make_plan,
    read_units,
    texts_of,
)
from codet5p_jax.corpus.deduplication import keep_first, sampled_texts
from codet5p_jax.corpus.executors import Processes
from codet5p_jax.corpus.source_files import LANGUAGES
from codet5p_jax.data.vocabularies import SentencePiece
from codet5p_jax.errors import require_positive
from codet5p_jax.storage import local_path

_logger = logging.getLogger(__name__)


def train_vocabulary(
    output_dir: str,
    sources: Sequence[str],
    vocab_size: int = 32_000,
    characters: int = 100_000_000,
    languages: Sequence[str] = tuple(LANGUAGES),
) -> None:
  """Trains a SentencePiece vocabulary on source files.

  They are read and filtered as for a corpus, but for their length in tokens.

  Args:
    output_dir: the folder to create.
    sources: where files come from, separated by commas; see prepare_corpus.
    vocab_size: pieces of the vocabulary, task tokens included.
    characters: how much of the files it is trained on.
    languages: the languages to keep.

  Raises:
    UserError: a source is missing or damaged, the folder exists, or the size
      does not fit the files.
  """
  check_vocab_size(vocab_size)
  require_positive(characters=characters)
  settings = SourceSettings(tuple(sources), tuple(languages))
  folder = local_path(output_dir)
  units, plan = make_plan(settings)
  with work_folder.work_folder(folder, plan) as work:
    reading = read_units(settings, units, work, Processes())
    masks = keep_first(reading.keys, len(units))
    texts = sampled_texts(
        reading.keys,
        lambda index: texts_of(reading, index),
        masks.__getitem__,
        len(units),
        characters,
    )
    vocabulary = SentencePiece.train(texts, vocab_size)
    made = work / 'vocabulary'
    vocabulary.save(made)
    work_folder.finish(work, made, folder)
  _logger.info(
      'Vocabulary of %d pieces in %s, fingerprint %s.',
      vocabulary.vocab_size, folder, vocabulary.fingerprint[:16],
  )  # fmt: skip
