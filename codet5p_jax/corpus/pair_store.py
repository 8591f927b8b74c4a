"""Pairs of text and code, by index: as they are, and as token ids.

`pairs/<split>.array_record` holds a JSON object a record: text, code, language,
licence, origin, path, and name, which is the function's. A folder
`pair_tokens/<fingerprint>/<split>` holds the same pairs in the same order:
`pairs.array_record`, a pair a record, and `metadata.json`. A record is the
number of the text's token ids (four bytes), these ids, and those of the code,
all little-endian; an id takes two bytes where they suffice, else four. Nothing
is added around a side.
"""

import contextlib
import json
import pathlib

import numpy as np

from codet5p_jax.corpus.records import (
    explaining_damage,
    open_source,
    open_writer,
)
from codet5p_jax.corpus.token_store import token_dtype
from codet5p_jax.errors import UserError

FORMAT_VERSION = 1
_PAIRS = 'pairs.array_record'
_METADATA = 'metadata.json'
_LENGTH = np.dtype('<u4')


class PairTokenWriter:
  """Writes a folder of pairs' token ids that nobody reads yet."""

  def __init__(
      self, folder: pathlib.Path, vocab_size: int, vocabulary_fingerprint: str
  ):
    """Creates the folder.

    Args:
      folder: to create.
      vocab_size: decides between two and four bytes a token.
      vocabulary_fingerprint: of the vocabulary that makes the ids.
    """
    folder.mkdir(parents=True)
    self._folder = folder
    self._dtype = token_dtype(vocab_size)
    self._fingerprint = vocabulary_fingerprint
    self._num_pairs = 0
    self._writer = open_writer(folder / _PAIRS)

  def write(self, text: np.ndarray, code: np.ndarray) -> None:
    """Appends a pair's token ids, [text length] and [code length]."""
    length = np.array([len(text)], _LENGTH)
    sides = np.concatenate([text, code]).astype(self._dtype)
    self._writer.write(length.tobytes() + sides.tobytes())
    self._num_pairs += 1

  def close(self) -> None:
    """Finishes the folder."""
    self._writer.close()
    metadata = {
        'format_version': FORMAT_VERSION,
        'num_pairs': self._num_pairs,
        'dtype': self._dtype.str,
        'vocabulary_fingerprint': self._fingerprint,
    }
    text = json.dumps(metadata, indent=2) + '\n'
    (self._folder / _METADATA).write_text(text)


class PairRows:
  """The token ids of pairs, by index.

  `rows[i]` is {'text': int32 [text length], 'code': int32 [code length]},
  without special ids. Under a vocabulary that was added later a side may be
  empty.
  """

  def __init__(self, folder: pathlib.Path):
    """Opens the store.

    Raises:
      UserError: there is no store, it is damaged, or it holds no pair. Reading
        a pair of a damaged store raises it too.
    """
    path = folder / _METADATA
    if not path.is_file():
      raise UserError(
          f'expected tokens of pairs in {folder}, found no {_METADATA}; run '
          f'codet5p prepare_corpus --pairs'
      )
    self._folder = folder
    with _explaining_damage(folder):
      self.metadata = json.loads(path.read_text())
      version = self.metadata['format_version']
    if version != FORMAT_VERSION:
      raise UserError(
          f'expected tokens of pairs in format {FORMAT_VERSION}, found '
          f'{version} in {folder}; prepare the corpus again with this version'
      )
    with _explaining_damage(folder):
      self._dtype = np.dtype(self.metadata['dtype'])
      self._num_pairs = int(self.metadata['num_pairs'])
    _refuse_no_pairs(self._num_pairs, folder)
    with _explaining_damage(folder):
      self._records = open_source(folder / _PAIRS)
      if len(self._records) != self._num_pairs:
        raise ValueError(
            f'{len(self._records)} pairs where {self._num_pairs} belong'
        )

  def __len__(self) -> int:
    return self._num_pairs

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    with _explaining_damage(self._folder):
      record = self._records[index]
      [length] = np.frombuffer(record, _LENGTH, count=1).tolist()
      sides = np.frombuffer(record, self._dtype, offset=_LENGTH.itemsize)
      if length > len(sides):
        raise ValueError(f'a text of {length} tokens in {len(sides)}')
    return {
        'text': sides[:length].astype(np.int32),
        'code': sides[length:].astype(np.int32),
    }


class PairTexts:
  """The pairs themselves, by index; `texts[i]` is a dict of str."""

  def __init__(self, path: pathlib.Path):
    """Opens a split's file.

    Raises:
      UserError: it is missing or damaged, or holds no pair. Reading a pair of a
        damaged file raises it too.
    """
    self._path = path
    with _explaining_damage(path):
      self._records = open_source(path)
      number = len(self._records)
    _refuse_no_pairs(number, path)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, str]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    with _explaining_damage(self._path):
      return json.loads(self._records[index])


def _refuse_no_pairs(number: int, path: pathlib.Path) -> None:
  if not number:
    raise UserError(
        f'expected at least one pair of text and code in {path}, found none; '
        f'add sources with documented functions and prepare the corpus again'
    )


def _explaining_damage(
    path: pathlib.Path,
) -> contextlib.AbstractContextManager[None]:
  return explaining_damage(
      path,
      'whole pairs',
      'them damaged',
      'remove the corpus and prepare it again with --pairs',
  )
