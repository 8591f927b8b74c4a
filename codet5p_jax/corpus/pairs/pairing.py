"""The third map, documents to pairs, and what becomes of its results.

For each unit it writes a folder of its own, which appears when it is whole:

    pairs.jsonl      a pair a line, as `pair_store` keeps it
    splits           of each its index into SPLITS, int8
    tokens           the ids of each text and code, little-endian
    token_lengths    how many of each, int32 [pairs, 2]
    sets             the hashed identifiers and literals of each code, uint32
    set_lengths      how many, int32
    band_keys        MinHash keys, uint64 [bands, pairs]
    summary.json     number of pairs, and of functions left out
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import tqdm

from codet5p_jax.corpus import folder as layout
from codet5p_jax.corpus.pair_store import PairTokenWriter
from codet5p_jax.corpus.pairs.extraction import REASONS, Pair, extract_pairs
from codet5p_jax.corpus.pairs.near_duplicates import (
    BANDS,
    band_keys,
    hash_tokens,
    mark_near_duplicates,
    tokens_of,
)
from codet5p_jax.corpus.reading import SUMMARY, UnitFolders, whole_folder
from codet5p_jax.corpus.records import open_writer
from codet5p_jax.corpus.source_files import SourceFile
from codet5p_jax.corpus.token_store import token_dtype
from codet5p_jax.corpus.tokenisation import TokeniseUnit, cached_vocabulary
from codet5p_jax.corpus.units import Unit
from codet5p_jax.data.vocabularies import Vocabulary

_logger = logging.getLogger(__name__)

_BATCH = 500
_UNITS_OPEN = 64


@dataclasses.dataclass(frozen=True)
class PairUnit(UnitFolders):
  """Extracts and tokenises the pairs of a unit's documents.

  Attributes:
    tokenising: the map before, which knows documents, splits and vocabulary.
    target: the folder of the folders to write.
  """

  tokenising: TokeniseUnit
  target: str

  def __call__(self, index: int, unit: Unit) -> None:
    """Makes the pairs of one unit.

    Raises:
      UserError: the disk is full.
    """
    del unit  # What it held was read.
    vocabulary = cached_vocabulary(self.tokenising.vocabulary_dir)
    documents = self.tokenising.documents(index)
    splits = self.tokenising.read_splits(index)
    dropped = collections.defaultdict(collections.Counter)
    with (
        whole_folder(self.folder(index)) as folder,
        contextlib.ExitStack() as stack,
    ):
      parts = _Parts(folder, token_dtype(vocabulary.vocab_size), stack)
      placed = zip(documents, splits.tolist(), strict=True)
      pairs = _pairs(placed, dropped)
      # In large batches, which take a tenth of the time of single texts.
      while batch := list(itertools.islice(pairs, _BATCH)):
        texts = vocabulary.encode_batch([pair.text for pair, *_ in batch])
        codes = vocabulary.encode_batch([pair.code for pair, *_ in batch])
        for found, *sides in zip(batch, texts, codes, strict=True):
          if all(sides):
            parts.write(*found, sides)
          else:
            dropped[found[1].language]['empty'] += 1
      summary = {'pairs': parts.finish(), 'dropped': dropped}
      (folder / SUMMARY).write_text(json.dumps(summary))


def _pairs(
    placed: Iterable[tuple[SourceFile, int]],
    dropped: Mapping[str, collections.Counter],
) -> Iterator[tuple[Pair, SourceFile, int]]:
  """The pairs of documents and their splits; counts what is left out."""
  for file, split in placed:
    if split < 0:
      continue  # The pairs of a duplicate are those of the file before it.
    for found in extract_pairs(file):
      if isinstance(found, Pair):
        yield found, file, split
      else:
        dropped[file.language][found] += 1


class _Parts:
  """The files of a unit."""

  def __init__(
      self, folder: pathlib.Path, dtype: np.dtype, stack: contextlib.ExitStack
  ):
    self._folder = folder
    self._dtype = dtype
    self._files = {
        name: stack.enter_context(open(folder / name, 'wb'))
        for name in (
            'pairs.jsonl', 'splits', 'tokens', 'token_lengths', 'sets',
            'set_lengths',
        )
    }  # fmt: skip
    self._band_keys = []

  def write(
      self, pair: Pair, file: SourceFile, split: int, sides: list[list[int]]
  ) -> None:
    """Appends a pair and the token ids of its sides."""
    row = dataclasses.asdict(pair)
    for name in ('language', 'licence', 'origin', 'path'):
      row[name] = getattr(file, name)
    line = json.dumps(row, ensure_ascii=False, sort_keys=True) + '\n'
    hashes = hash_tokens(tokens_of(pair.code, file.language))
    written = {
        'splits': np.array(split, np.int8),
        'tokens': np.concatenate(sides).astype(self._dtype),
        'token_lengths': np.array([*map(len, sides)], np.int32),
        'sets': hashes,
        'set_lengths': np.array(len(hashes), np.int32),
    }
    self._files['pairs.jsonl'].write(line.encode())
    for name, values in written.items():
      self._files[name].write(values.tobytes())
    self._band_keys.append(band_keys(hashes))

  def finish(self) -> int:
    """Writes what needs all pairs; returns their number."""
    keys = np.array(self._band_keys, np.uint64).reshape(-1, BANDS)
    np.ascontiguousarray(keys.T).tofile(self._folder / 'band_keys')
    return len(keys)


def gather_pairs(
    made: pathlib.Path,
    num_units: int,
    pairing: PairUnit,
    vocabulary: Vocabulary,
) -> dict[str, object]:
  """Puts the units' pairs together in the order of the plan.

  Near-duplicates of pairs before them, in whatever split, are left out. Those
  of training come first, so a published test set may lose some.

  Args:
    made: the corpus folder that is being made.
    num_units: number of units.
    pairing: what was mapped over them.
    vocabulary: the one that it tokenised with.

  Returns:
    What the metadata tells of pairs.
  """
  stores = made / layout.PAIR_TOKENS / vocabulary.fingerprint[:16]
  for folder in (made / layout.PAIRS, made / layout.PAIR_TOKENS):
    # A stopped run may have been here before.
    shutil.rmtree(folder, ignore_errors=True)
  (made / layout.PAIRS).mkdir(parents=True)
  summaries = [pairing.summary(index) for index in range(num_units)]
  sizes = [summary['pairs'] for summary in summaries]
  is_near = _near_duplicates(pairing, sizes)
  texts, tokens = [], []
  for split in layout.SPLITS:
    path = made / layout.PAIRS / f'{split}.array_record'
    texts.append(open_writer(path))
    tokens.append(
        PairTokenWriter(
            stores / split, vocabulary.vocab_size, vocabulary.fingerprint
        )
    )
  kept = collections.Counter(dict.fromkeys(layout.SPLITS, 0))
  by_language = collections.Counter()
  dropped = collections.defaultdict(collections.Counter)
  for summary in summaries:
    for language, counts in summary['dropped'].items():
      dropped[language].update(counts)
  begin = 0
  for index in tqdm.tqdm(range(num_units), 'gathering pairs', unit=' units'):
    pairs = _read_pairs(pairing.folder(index), vocabulary.vocab_size)
    for place, (line, split, sides) in enumerate(pairs, begin):
      language = json.loads(line)['language']
      if is_near[place]:
        dropped[language]['near_duplicate'] += 1
        continue
      texts[split].write(line)
      tokens[split].write(*sides)
      kept[layout.SPLITS[split]] += 1
      by_language[language] += 1
    begin += sizes[index]
  for writer in (*texts, *tokens):
    writer.close()
  for split, number in kept.items():
    if not number:
      _logger.warning(
          'The %s split has no pair of text and code: its files hold no '
          'documented function that the rules keep.',
          split,
      )
  by_reason = collections.Counter(dict.fromkeys(REASONS, 0))
  for counts in dropped.values():
    by_reason.update(counts)
  return {
      'pairs': dict(kept),
      'pairs_by_language': dict(by_language),
      'pairs_dropped': dict(by_reason),
      'pairs_dropped_by_language': {k: dict(v) for k, v in dropped.items()},
  }


def _near_duplicates(pairing: PairUnit, sizes: list[int]) -> np.ndarray:
  """Whether each pair is near one before, bool [pairs of all units]."""
  set_sizes = np.concatenate([
      np.fromfile(pairing.folder(index) / 'set_lengths', np.int32)
      for index in range(len(sizes))
  ])
  ends = np.cumsum(set_sizes, dtype=np.int64)
  first_of_unit = np.cumsum([0, *sizes])

  @functools.lru_cache(_UNITS_OPEN)
  def sets_of_unit(unit: int) -> np.ndarray:
    return np.memmap(pairing.folder(unit) / 'sets', np.uint32, 'r')

  def read_set(place: int) -> np.ndarray:
    unit = int(np.searchsorted(first_of_unit, place, 'right')) - 1
    first = first_of_unit[unit]
    base = ends[first] - set_sizes[first]
    end = ends[place] - base
    return sets_of_unit(unit)[end - set_sizes[place] : end]

  def read_keys(band: int, unit: int) -> np.ndarray:
    path, size = pairing.folder(unit) / 'band_keys', sizes[unit]
    return np.fromfile(path, np.uint64, size, offset=8 * band * size)

  splits = np.concatenate([
      np.fromfile(pairing.folder(index) / 'splits', np.int8)
      for index in range(len(sizes))
  ])
  _logger.info('Looking for near-duplicates among %d pairs.', sum(sizes))
  return mark_near_duplicates(
      read_keys, sizes, read_set, set_sizes, splits > 0
  )


def _read_pairs(
    folder: pathlib.Path, vocab_size: int
) -> Iterator[tuple[bytes, int, list[np.ndarray]]]:
  """The JSON, split and token ids of each pair of a unit, in order."""
  dtype = token_dtype(vocab_size)
  splits = np.fromfile(folder / 'splits', np.int8).tolist()
  lengths = np.fromfile(folder / 'token_lengths', np.int32).reshape(-1, 2)
  with (
      open(folder / 'pairs.jsonl', 'rb') as lines,
      open(folder / 'tokens', 'rb') as tokens,
  ):
    for split, pair in zip(splits, lengths.tolist(), strict=True):
      sides = [
          np.frombuffer(tokens.read(length * dtype.itemsize), dtype)
          for length in pair
      ]
      yield lines.readline().rstrip(b'\n'), split, sides
