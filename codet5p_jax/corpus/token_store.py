"""The token store: a split's documents as one stream of token ids.

A folder holds `blocks.array_record`, records of equal length, and
`metadata.json`. A record is BLOCK_TOKENS token ids, little-endian, followed by
one bit per token that tells whether a word starts there. Documents follow one
another, each ended by the vocabulary's end-of-sequence token. Any row length
can be cut from the stream by index, so one store serves every objective.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterable

import numpy as np

from codet5p_jax.corpus.records import (
    explaining_damage,
    open_source,
    open_writer,
)
from codet5p_jax.errors import UserError

FORMAT_VERSION = 1
BLOCK_TOKENS = 4096
_BLOCKS = 'blocks.array_record'
_METADATA = 'metadata.json'


def write_token_store(
    folder: pathlib.Path,
    documents: Iterable[tuple[np.ndarray, np.ndarray]],
    end_of_document: int,
    vocab_size: int,
    vocabulary_fingerprint: str,
) -> dict[str, int | str]:
  """Writes a store; the caller gives a folder that nobody reads yet.

  Args:
    folder: to create.
    documents: (token ids [length], word starts [length]) of each document.
    end_of_document: id appended to each document.
    vocab_size: decides between two and four bytes a token.
    vocabulary_fingerprint: of the vocabulary that made the ids.

  Returns:
    The store's metadata.
  """
  dtype = token_dtype(vocab_size)
  folder.mkdir(parents=True)
  writer = open_writer(folder / _BLOCKS)
  ids, starts = _Blocks(dtype), _Blocks(np.dtype(bool))
  num_documents = num_tokens = 0

  def write(id_block, start_block):
    writer.write(id_block.tobytes() + np.packbits(start_block).tobytes())

  for document_ids, document_starts in documents:
    ids.add(np.append(document_ids, end_of_document))
    starts.add(np.append(document_starts, True))
    num_documents += 1
    num_tokens += len(document_ids) + 1
    for blocks in zip(ids.take(), starts.take(), strict=True):
      write(*blocks)
  for blocks in zip(ids.rest(), starts.rest(), strict=True):
    write(*blocks)
  writer.close()
  metadata = {
      'format_version': FORMAT_VERSION,
      'num_documents': num_documents,
      'num_tokens': num_tokens,
      'block_tokens': BLOCK_TOKENS,
      'token_dtype': dtype.str,
      'vocabulary_fingerprint': vocabulary_fingerprint,
  }
  (folder / _METADATA).write_text(json.dumps(metadata, indent=2) + '\n')
  return metadata


def token_dtype(vocab_size: int) -> np.dtype:
  """Two bytes a token where they suffice, else four."""
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


class _Blocks:
  """Cuts arrays that come in any length into blocks of BLOCK_TOKENS."""

  def __init__(self, dtype: np.dtype):
    self._buffer = np.empty(0, dtype)

  def add(self, values: np.ndarray) -> None:
    values = values.astype(self._buffer.dtype)
    self._buffer = np.concatenate([self._buffer, values])

  def take(self) -> list[np.ndarray]:
    """Removes and returns the whole blocks."""
    whole = len(self._buffer) // BLOCK_TOKENS * BLOCK_TOKENS
    blocks, self._buffer = self._buffer[:whole], self._buffer[whole:]
    return list(blocks.reshape(-1, BLOCK_TOKENS))

  def rest(self) -> list[np.ndarray]:
    """The last, partial block, filled with zeros; none if empty."""
    if not len(self._buffer):
      return []
    return [np.pad(self._buffer, (0, BLOCK_TOKENS - len(self._buffer)))]


class TokenRows:
  """Rows of equal length cut from a token store, by index.

  `rows[i]` is {'tokens': int32 [row_length], 'word_starts': bool
  [row_length]}. Tokens after the last whole row are left out.
  """

  def __init__(self, folder: pathlib.Path, row_length: int):
    """Opens the store.

    Raises:
      UserError: there is no store, it is damaged, or it holds less than one
        row. Reading a row of a damaged store raises it too.
    """
    path = folder / _METADATA
    if not path.is_file():
      raise UserError(
          f'expected a token store in {folder}, found no {_METADATA}; run '
          f'codet5p prepare_corpus'
      )
    self._folder = folder
    self._row_length = row_length
    with self._explaining_damage():
      self.metadata = json.loads(path.read_text())
      version = self.metadata['format_version']
    if version != FORMAT_VERSION:
      raise UserError(
          f'expected a token store of format {FORMAT_VERSION}, found '
          f'{version} in {folder}; prepare the corpus again with this version'
      )
    with self._explaining_damage():
      self._dtype = np.dtype(self.metadata['token_dtype'])
      self._block_tokens = self.metadata['block_tokens']
      self._blocks = open_source(folder / _BLOCKS)
      num_blocks = -(-self.metadata['num_tokens'] // self._block_tokens)
      if len(self._blocks) != num_blocks:
        raise ValueError(
            f'{len(self._blocks)} blocks where {num_blocks} belong'
        )
    if not len(self):
      raise UserError(
          f'expected at least one row of {row_length} tokens, found '
          f'{self.metadata["num_tokens"]} tokens in {folder}; add source files '
          f'or shorten the rows'
      )

  def _explaining_damage(self) -> contextlib.AbstractContextManager[None]:
    return explaining_damage(
        self._folder,
        'a whole token store',
        'it damaged',
        'remove the corpus and prepare it again',
    )

  def __len__(self) -> int:
    return self.metadata['num_tokens'] // self._row_length

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    begin = index * self._row_length
    first = begin // self._block_tokens
    last = (begin + self._row_length - 1) // self._block_tokens
    ids, starts = [], []
    with self._explaining_damage():
      # One by one: `__getitems__` starts threads, which take ten times as long.
      records = [self._blocks[number] for number in range(first, last + 1)]
    for record in records:
      cut = self._block_tokens * self._dtype.itemsize
      ids.append(np.frombuffer(record[:cut], self._dtype))
      starts.append(np.unpackbits(np.frombuffer(record[cut:], np.uint8)))
    begin -= first * self._block_tokens
    row = slice(begin, begin + self._row_length)
    return {
        'tokens': np.concatenate(ids)[row].astype(np.int32),
        'word_starts': np.concatenate(starts)[row].astype(bool),
    }
