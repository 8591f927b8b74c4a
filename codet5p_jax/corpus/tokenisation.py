"""The second map: kept documents to token ids and shards of files.

For each unit it writes a folder of its own, which appears when it is whole,
with these files for each split that it holds documents of:

    <split>.array_record   the files, as TensorFlow Datasets stores them
    <split>.ids            token ids, little-endian
    <split>.starts         a bit a token: whether a word starts there; each
                           document begins a byte
    <split>.lengths        tokens of each document, int32
    summary.json           counts
"""

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator

import numpy as np

from codet5p_jax.corpus.folder import SPLITS
from codet5p_jax.corpus.reading import (
    SUMMARY,
    UnitFolders,
    read_documents,
    whole_folder,
)
from codet5p_jax.corpus.records import open_writer
from codet5p_jax.corpus.source_files import SourceFile
from codet5p_jax.corpus.token_store import token_dtype
from codet5p_jax.corpus.units import Unit
from codet5p_jax.data.vocabularies import Vocabulary, load_vocabulary


@dataclasses.dataclass(frozen=True)
class TokeniseUnit(UnitFolders):
  """Tokenises a unit's documents and keeps those of a fitting length.

  Attributes:
    read: the folder of folders that `reading` wrote.
    splits: that of the files that tell each document's split.
    target: that of the folders to write.
    vocabulary_dir: the vocabulary.
    min_tokens: shorter files are dropped.
    max_tokens: longer ones too.
  """

  read: str
  splits: str
  target: str
  vocabulary_dir: str
  min_tokens: int
  max_tokens: int

  def documents(self, index: int) -> Iterator[SourceFile]:
    """Those of a unit that were read."""
    return read_documents(pathlib.Path(self.read, f'{index:06d}'))

  def read_splits(self, index: int) -> np.ndarray:
    """Index into SPLITS of each document that was read, or DROPPED."""
    return np.fromfile(self.splits_file(index), np.int8)

  def splits_file(self, index: int) -> pathlib.Path:
    return pathlib.Path(self.splits, f'{index:06d}')

  def __call__(self, index: int, unit: Unit) -> None:
    """Tokenises one unit.

    Raises:
      UserError: the disk is full.
    """
    del unit  # What it held was read.
    vocabulary = cached_vocabulary(self.vocabulary_dir)
    longest = self.max_tokens * vocabulary.longest_piece
    documents = self.documents(index)
    dropped = collections.defaultdict(collections.Counter)
    kept = {name: collections.defaultdict(collections.Counter)
            for name in ('files', 'tokens', 'characters', 'licences')}
    with (
        whole_folder(self.folder(index)) as folder,
        _Parts(folder, vocabulary) as parts,
    ):
      for file, number in zip(documents, self.read_splits(index), strict=True):
        if number < 0:
          dropped[file.language]['duplicate'] += 1
          continue
        if len(file.text) > longest:
          # Told without encoding: such files are few, but hold many tokens.
          dropped[file.language]['too_long'] += 1
          continue
        ids, starts = vocabulary.encode_with_word_starts(file.text)
        if len(ids) < self.min_tokens:
          dropped[file.language]['too_short'] += 1
        elif len(ids) > self.max_tokens:
          dropped[file.language]['too_long'] += 1
        else:
          split = SPLITS[number]
          parts.write(split, file, ids, starts)
          kept['files'][split][file.language] += 1
          # Each is followed by the end of the document.
          kept['tokens'][split][file.language] += len(ids) + 1
          kept['characters'][split][file.language] += len(file.text)
          kept['licences'][split][file.licence] += 1
      parts.close()
      (folder / SUMMARY).write_text(json.dumps({'dropped': dropped, **kept}))


@functools.lru_cache(maxsize=1)
def cached_vocabulary(folder: str) -> Vocabulary:
  """The vocabulary of a folder, which a worker uses for one unit after another.
  """
  return load_vocabulary(folder)


class _Parts:
  """The files of each split, opened when the first document comes."""

  def __init__(self, folder: pathlib.Path, vocabulary: Vocabulary):
    self._folder = folder
    self._dtype = token_dtype(vocabulary.vocab_size)
    self._stack = contextlib.ExitStack()
    self._files = {}
    self._shards = {}

  def __enter__(self) -> '_Parts':
    return self

  def __exit__(self, *unused_error) -> None:
    self._stack.close()

  def write(
      self, split: str, file: SourceFile, ids: np.ndarray, starts: np.ndarray
  ) -> None:
    from codet5p_jax.corpus.tfds_builder import serialise

    if split not in self._files:
      path = self._folder / split
      self._files[split] = [
          self._stack.enter_context(open(f'{path}.{kind}', 'wb'))
          for kind in ('ids', 'starts', 'lengths')
      ]
      self._shards[split] = open_writer(path.with_suffix('.array_record'))
    id_file, start_file, length_file = self._files[split]
    id_file.write(ids.astype(self._dtype).tobytes())
    start_file.write(np.packbits(starts).tobytes())
    length_file.write(np.array([len(ids)], np.int32).tobytes())
    self._shards[split].write(serialise(file))

  def close(self) -> None:
    """Finishes the shards; not after an error, which it would hide."""
    for shard in self._shards.values():
      shard.close()


def read_tokens(
    folder: pathlib.Path, split: str, vocab_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """The ids and word starts of each document of a split, in order."""
  path = folder / split
  if not (folder / f'{split}.lengths').exists():
    return
  dtype = token_dtype(vocab_size)
  with open(f'{path}.ids', 'rb') as ids, open(f'{path}.starts', 'rb') as starts:
    for length in np.fromfile(f'{path}.lengths', np.int32).tolist():
      bits = np.frombuffer(starts.read(-(-length // 8)), np.uint8)
      yield (
          np.frombuffer(ids.read(length * dtype.itemsize), dtype),
          np.unpackbits(bits, count=length).astype(bool),
      )
