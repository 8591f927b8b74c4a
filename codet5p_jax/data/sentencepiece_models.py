"""SentencePiece models that lose nothing of code: training and reading them.

The `sentencepiece` library is imported within the functions.
"""

import io
from collections.abc import Iterable, Iterator
from typing import Any

from codet5p_jax import errors
from codet5p_jax.data import task_tokens, vocabulary_files

META_SYMBOL = '\u2581'  # How SentencePiece writes a space.
_CONTROLS = (
    task_tokens.CLM_NAME,
    task_tokens.MATCH_NAME,
    task_tokens.TDEC_NAME,
    task_tokens.CDEC_NAME,
    *task_tokens.SENTINEL_NAMES,
)
# Pieces that every model has: pad, bos, eos and unk; the control pieces; the
# bytes; newline and tab.
SMALLEST_VOCAB_SIZE = 4 + len(_CONTROLS) + 256 + 2
_MAX_CHUNK_LENGTH = 4096  # Characters, of at most four bytes each.
_TRAINING_SETTINGS = {
    'model_type': 'bpe',
    'pad_id': 0,
    'bos_id': 1,
    'eos_id': 2,
    'unk_id': 3,
    # What makes it lossless on code.
    'normalization_rule_name': 'identity',
    'remove_extra_whitespaces': False,
    'add_dummy_prefix': False,
    'byte_fallback': True,
    'allow_whitespace_only_pieces': True,
    'user_defined_symbols': ['\n', '\t'],
    'max_sentence_length': 4 * _MAX_CHUNK_LENGTH,  # Bytes.
    # Written into the model, hence into the fingerprint: not the machine's.
    'num_threads': 1,
    'minloglevel': 2,
}


def train(texts: Iterable[str], vocab_size: int) -> bytes:
  """Returns the model trained on texts; their order matters, nothing else.

  Raises:
    UserError: There is no text, or the size does not fit the texts.
    Exception: Whatever reading the texts raises.
  """
  import sentencepiece  # pylint: disable=g-import-not-at-top

  chunks = _training_chunks(texts)
  first_chunk = next(chunks, None)
  if first_chunk is None:
    raise errors.UserError(
        'expected texts to train a vocabulary on, but there are none; give a '
        'corpus that is not empty'
    )
  reading_errors = []

  def all_chunks() -> Iterator[str]:
    yield first_chunk
    try:
      yield from chunks
    except Exception as error:
      reading_errors.append(error)
      raise

  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=all_chunks(),
        model_writer=model,
        vocab_size=vocab_size,
        control_symbols=list(_CONTROLS),
        **_TRAINING_SETTINGS,
    )
  except (RuntimeError, ValueError) as error:
    if reading_errors:
      # The library turned it into a RuntimeError that quotes a traceback.
      raise reading_errors[0] from None
    # It names its source line and condition before what it has to say.
    reason = vocabulary_files.one_line(error).rpartition('] ')[2]
    raise errors.UserError(
        f'cannot train a SentencePiece vocabulary of {vocab_size} pieces: '
        f'{reason.rstrip(".")}; give more text or another vocabulary size'
    ) from error
  return model.getvalue()


def _training_chunks(texts: Iterable[str]) -> Iterator[str]:
  """Cuts texts at line ends into chunks that SentencePiece does not drop."""
  for text in texts:
    start = 0
    while start < len(text):
      end = start + _MAX_CHUNK_LENGTH
      if end < len(text):
        # A longer line is cut where it comes.
        end = text.rfind('\n', start, end) + 1 or end
      yield text[start:end]
      start = end


def load(model: bytes) -> Any:
  """Returns the `SentencePieceProcessor` of a model.

  Raises:
    UserError: It is no model.
  """
  import sentencepiece  # pylint: disable=g-import-not-at-top

  try:
    return sentencepiece.SentencePieceProcessor(model_proto=model)
  except RuntimeError as error:
    raise errors.UserError(
        'expected a SentencePiece model, but the file cannot be read as one; '
        'give a file that `codet5p train_vocabulary` wrote'
    ) from error


def find_task_tokens(processor: Any) -> task_tokens.TaskTokens:
  """Finds the pieces that play the roles in a SentencePiece processor.

  Raises:
    UserError: Some are missing.
  """
  missing = [
      name
      for name in _CONTROLS
      if not processor.is_control(processor.piece_to_id(name))
  ]
  found = [
      processor.pad_id(),
      processor.bos_id(),
      processor.eos_id(),
      processor.unk_id(),
  ]
  if missing or found != [0, 1, 2, 3]:
    raise errors.UserError(
        f'a SentencePiece model should have pad, bos, eos, unk at 0, 1, 2, 3 '
        f'and the control pieces of all tasks, but has {found} and lacks '
        f'{len(missing)}; train it with `codet5p train_vocabulary`'
    )
  return task_tokens.TaskTokens(
      pad=0,
      bos=1,
      eos=2,
      unk=3,
      clm=processor.piece_to_id(task_tokens.CLM_NAME),
      match=processor.piece_to_id(task_tokens.MATCH_NAME),
      tdec=processor.piece_to_id(task_tokens.TDEC_NAME),
      cdec=processor.piece_to_id(task_tokens.CDEC_NAME),
      sentinels=tuple(
          processor.piece_to_id(name) for name in task_tokens.SENTINEL_NAMES
      ),
  )


def pieces(processor: Any) -> tuple[list[bytes], dict[int, str]]:
  """Returns the bytes of each id, and the names of those that are special."""
  surfaces, special_names = [], {}
  for index in range(processor.get_piece_size()):
    piece = processor.id_to_piece(index)
    if processor.is_control(index) or processor.is_unknown(index):
      special_names[index] = piece
      surfaces.append(b'')
    elif processor.is_byte(index):
      surfaces.append(bytes([int(piece[1:-1], 16)]))
    else:
      surfaces.append(piece.replace(META_SYMBOL, ' ').encode())
  return surfaces, special_names
