"""Source code to a corpus folder."""

import json
import logging
import pathlib

from codet5p_jax.corpus import folder as layout
from codet5p_jax.corpus.build import build_corpus
from codet5p_jax.corpus.source_files import standard_library
from codet5p_jax.errors import UserError

_logger = logging.getLogger(__name__)

SOURCES = {'standard_library': standard_library}


def prepare_corpus(
    corpus_dir: str,
    source: str = 'standard_library',
    vocab_size: int = 8192,
) -> None:
  """Reads source files, trains a vocabulary on them and tokenises them.

  A folder that is there and was made with the same settings is kept.

  Args:
    corpus_dir: the folder to create.
    source: where the files come from; standard_library is the running
      interpreter's own.
    vocab_size: pieces of the vocabulary, task tokens included.

  Raises:
    UserError: the source is unknown, or the folder holds something else.
  """
  if source not in SOURCES:
    raise UserError(
        f'expected a source among {", ".join(SOURCES)}, found {source!r}; set '
        f'--source'
    )
  folder = pathlib.Path(corpus_dir)
  settings = {'source': source, 'vocab_size': vocab_size}
  metadata = _metadata(folder)
  if metadata is not None and metadata.get('settings') == settings:
    _logger.info('The corpus in %s is ready; nothing to do.', folder)
    return
  if metadata is not None:
    raise UserError(
        f'expected a corpus of {settings} in {folder}, found one of '
        f'{metadata.get("settings")}; choose another corpus_dir or remove it'
    )
  metadata = build_corpus(SOURCES[source](), folder, vocab_size, settings)
  _logger.info(
      'Corpus in %s: %d files, %.1f million tokens to train on (%d dropped as '
      'duplicates).',
      folder,
      sum(metadata['files'].values()),
      metadata['tokens']['train'] / 1e6,
      metadata['dropped']['duplicate'],
  )


def _metadata(folder: pathlib.Path) -> dict | None:
  try:
    metadata = json.loads((folder / layout.METADATA).read_text())
    if not isinstance(metadata, dict):
      raise ValueError('no JSON object')
    return metadata
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise UserError(
        f'expected the metadata of a corpus in {folder / layout.METADATA}, '
        f'found: {error}; remove the folder and prepare the corpus again'
    ) from error
