"""Builds a corpus folder: files, vocabulary, token stores, metadata.

    plan        sources to units (`sources`)
    read        a map: units to the documents that pass the filters (`reading`)
    split       duplicates are dropped, origins get their splits
    vocabulary  trained on a sample of the training documents
    tokenise    a map: documents to token ids and shards (`tokenisation`)
    pair        a map, where wanted: documents to pairs (`pairs.pairing`)
    gather      shards, tokens and pairs in the order of the plan

All happens in `<corpus_dir>.partial`. A map leaves a folder a unit, so a run
that was killed goes on, and how many processes work makes no difference.
"""

import collections
import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tqdm

from codet5p_jax.corpus import filters, licences, work_folder
from codet5p_jax.corpus import folder as layout
from codet5p_jax.corpus.deduplication import (
    SplitAssignment,
    keep_first,
    sampled_texts,
    write_splits,
)
from codet5p_jax.corpus.executors import Executor, Processes
from codet5p_jax.corpus.pairs.pairing import PairUnit, gather_pairs
from codet5p_jax.corpus.reading import (
    ReadUnit,
    read_documents,
    refuse_bad_rows,
)
from codet5p_jax.corpus.source_files import LANGUAGES
from codet5p_jax.corpus.sources import plan_units
from codet5p_jax.corpus.token_store import write_token_store
from codet5p_jax.corpus.tokenisation import TokeniseUnit, read_tokens
from codet5p_jax.corpus.units import Unit
from codet5p_jax.data.sentencepiece_models import SMALLEST_VOCAB_SIZE
from codet5p_jax.data.vocabularies import (
    SentencePiece,
    Vocabulary,
    load_vocabulary,
)
from codet5p_jax.errors import UserError, require_positive

FORMAT_VERSION = 1

_logger = logging.getLogger(__name__)

# A table may hold this share of bad rows, or this many.
_BAD_ROWS_SHARE, _BAD_ROWS = 0.01, 10


@dataclasses.dataclass(frozen=True)
class SourceSettings:
  """Which source files are read.

  Attributes:
    sources: see `sources.plan_units`.
    languages: those that are kept.
    licences: those that are kept where a licence is known.
    pairs: whether pairs of text and code are extracted. Rows in CodeSearchNet's
      format then have their documentation, and stay in the split that they
      were published in.
  """

  sources: tuple[str, ...] = ('standard_library',)
  languages: tuple[str, ...] = tuple(LANGUAGES)
  licences: tuple[str, ...] = licences.ALLOWED
  pairs: bool = False

  def __post_init__(self):
    unknown = sorted(set(self.languages) - set(LANGUAGES))
    if unknown or not self.languages:
      raise UserError(
          f'expected languages among {", ".join(LANGUAGES)}, found '
          f'{", ".join(unknown) or "none"}; set --languages'
      )


@dataclasses.dataclass(frozen=True)
class CorpusSettings(SourceSettings):
  """What makes a corpus what it is.

  Attributes:
    vocab_size: pieces of the vocabulary to train.
    vocabulary_characters: how much of the training files it is trained on.
    vocabulary_fingerprint: of a vocabulary that is given; None to train one.
    min_tokens: shorter files are dropped (the paper: 50).
    max_tokens: longer ones too (the paper: 2000).
  """

  vocab_size: int = 4096
  vocabulary_characters: int = 32_000_000
  vocabulary_fingerprint: str | None = None
  min_tokens: int = 50
  max_tokens: int = 2000

  def __post_init__(self):
    super().__post_init__()
    require_positive(
        vocabulary_characters=self.vocabulary_characters,
        min_tokens=self.min_tokens,
        max_tokens=self.max_tokens,
    )
    check_vocab_size(self.vocab_size)
    if self.min_tokens > self.max_tokens:
      raise UserError(
          f'expected min_tokens to be at most max_tokens, found '
          f'{self.min_tokens} and {self.max_tokens}; set --min_tokens'
      )


def check_vocab_size(vocab_size: int) -> None:
  """Raises UserError: less than the pieces that every vocabulary has."""
  if vocab_size < SMALLEST_VOCAB_SIZE:
    raise UserError(
        f'expected a vocabulary of at least {SMALLEST_VOCAB_SIZE} pieces, '
        f'which are the task tokens, the bytes, newline and tab, found '
        f'{vocab_size}; set --vocab_size'
    )


def build_corpus(
    settings: CorpusSettings,
    corpus_dir: pathlib.Path,
    vocabulary: Vocabulary | None = None,
    executor: Executor = Processes(),
) -> dict[str, object]:
  """Builds a corpus folder, which appears only when it is whole.

  Exact duplicates (white space aside) are dropped; whole origins are held out
  for validation and test; the vocabulary is trained on the training files.

  Args:
    settings: what to build.
    corpus_dir: must not exist.
    vocabulary: the one to tokenise with; None to train one.
    executor: where the work is done; the result does not depend on it.

  Returns:
    The metadata.

  Raises:
    UserError: a source is missing or damaged, the folder exists or cannot be
      written, or there is too little source for a corpus.
  """
  units, plan = make_plan(settings)
  with work_folder.work_folder(corpus_dir, plan) as work:
    reading = read_units(settings, units, work, executor)
    masks = keep_first(reading.keys, len(units))
    tokenising, assignment = _tokenise(
        settings, units, work, executor, vocabulary, reading, masks
    )
    if settings.pairs:
      pairing = _pair(units, work, executor, tokenising)
    made = work / 'corpus'
    metadata = _gather(made, len(units), reading, tokenising)
    if settings.pairs:
      used = load_vocabulary(made / layout.VOCABULARY)
      metadata.update(gather_pairs(made, len(units), pairing, used))
    metadata.update(
        origins=assignment.num_origins,
        split_by='file' if assignment.by_file else 'origin',
        settings=as_json(settings),
    )
    text = json.dumps(metadata, indent=2, sort_keys=True) + '\n'
    (made / layout.METADATA).write_text(text)
    work_folder.finish(work, made, corpus_dir)
  return metadata


def as_json(settings: SourceSettings) -> dict[str, object]:
  """Settings as they stand in the metadata, where tuples are lists."""
  return json.loads(json.dumps(dataclasses.asdict(settings)))


def make_plan(settings: SourceSettings) -> tuple[list[Unit], str]:
  """The units of the sources, and a text that changes whenever they do."""
  units = plan_units(settings.sources)
  plan = {
      'format_version': FORMAT_VERSION,
      'settings': dataclasses.asdict(settings),
      'units': [dataclasses.asdict(unit) for unit in units],
  }
  return units, json.dumps(plan)


def read_units(
    settings: SourceSettings,
    units: Sequence[Unit],
    work: pathlib.Path,
    executor: Executor,
) -> ReadUnit:
  """Reads and filters all units.

  Returns:
    What tells where the results lie.

  Raises:
    UserError: a source is damaged, or a table has too many bad rows.
  """
  reading = ReadUnit(
      str(work), settings.languages, settings.licences, settings.pairs
  )
  executor.run(reading, units, 'reading')
  tables = collections.defaultdict(list)
  for index, unit in enumerate(units):
    if unit.kind in ('jsonl', 'parquet'):
      tables[unit.path].append(reading.summary(index))
  for path, summaries in tables.items():
    _check_rows(path, summaries)
  return reading


def _check_rows(path: str, summaries: Sequence[dict]) -> None:
  """Raises UserError: too many rows of a table are bad."""
  rows = sum(summary['rows'] for summary in summaries)
  bad, first = 0, None
  before = 0
  for summary in summaries:
    if summary['first_bad_row'] and not first:
      number, detail = summary['first_bad_row']
      first = before + number, detail
    before += summary['rows']
    bad += sum(drops.get('bad_row', 0) for drops in summary['dropped'].values())
  if first and (bad == rows or bad > max(_BAD_ROWS, _BAD_ROWS_SHARE * rows)):
    refuse_bad_rows(path, bad, rows, *first)
  if first:
    _logger.warning(
        'Skipped %d bad rows of %d in %s, the first in line %d: %s.',
        bad, rows, path, *first,
    )  # fmt: skip


def _tokenise(
    settings: CorpusSettings,
    units: Sequence[Unit],
    work: pathlib.Path,
    executor: Executor,
    vocabulary: Vocabulary | None,
    reading: ReadUnit,
    masks: Sequence[np.ndarray],
) -> tuple[TokeniseUnit, SplitAssignment]:
  """Splits, trains the vocabulary where none is given, and tokenises.

  Which files have a fitting length is known only at the end. Where that leaves
  nothing of a split, the origins of the split are not held out, and it is all
  done once more; only in a small corpus.
  """
  spent = np.empty(0, np.uint64)
  while True:
    assignment = SplitAssignment(reading.keys, masks, spent)
    if assignment.num_held < 3:
      _refuse_few_files(settings, reading, masks, spent)
    suffix = str(len(spent))
    vocabulary_dir = work / f'vocabulary-{suffix}'
    tokenising = TokeniseUnit(
        str(work / 'read'),
        str(work / f'splits-{suffix}'),
        str(work / f'tokenised-{suffix}'),
        str(vocabulary_dir),
        settings.min_tokens,
        settings.max_tokens,
    )
    pathlib.Path(tokenising.splits).mkdir(exist_ok=True)
    for index in range(len(units)):
      write_splits(tokenising.splits_file(index), assignment.splits(index))
    if vocabulary is None and not vocabulary_dir.exists():
      _train(settings, reading, tokenising, len(units)).save(vocabulary_dir)
    elif vocabulary is not None:
      vocabulary.save(vocabulary_dir)
    executor.run(tokenising, units, 'tokenising')
    empty = set(range(len(layout.SPLITS)))
    for index in range(len(units)):
      files = tokenising.summary(index)['files']
      empty -= {number for number, split in enumerate(layout.SPLITS)
                if split in files}
    if not empty:
      break
    spent = np.union1d(
        spent,
        np.concatenate([assignment.keys_of_split(split) for split in empty]),
    )
  if assignment.by_file:
    _logger.warning(
        'There are fewer than 3 packages or repositories to hold out, so '
        'single files are held out for validation and test.'
    )
  return tokenising, assignment


def _pair(
    units: Sequence[Unit],
    work: pathlib.Path,
    executor: Executor,
    tokenising: TokeniseUnit,
) -> PairUnit:
  """Extracts the pairs of all documents that are no duplicates."""
  pairing = PairUnit(tokenising, str(work / 'paired'))
  executor.run(pairing, units, 'pairing')
  return pairing


def _refuse_few_files(
    settings: CorpusSettings,
    reading: ReadUnit,
    masks: Sequence[np.ndarray],
    spent: np.ndarray,
) -> None:
  dropped = _added(reading.summary(i)['dropped'] for i in range(len(masks)))
  counts = collections.Counter()
  for by_reason in dropped.values():
    counts.update(by_reason)
  counts['duplicate'] = sum(int((~mask).sum()) for mask in masks)
  told = ', '.join(f'{n} {reason}' for reason, n in counts.items() if n)
  files = sum(int(mask.sum()) for mask in masks)
  lengths = ''
  if len(spent):
    lengths = (
        f', too few of them of {settings.min_tokens} to {settings.max_tokens} '
        f'tokens'
    )
  raise UserError(
      f'expected at least 3 files, one for each split, found {files}{lengths} '
      f'in {", ".join(settings.sources)} (dropped: {told or "none"}); add '
      f'sources'
  )


def _train(
    settings: CorpusSettings,
    reading: ReadUnit,
    tokenising: TokeniseUnit,
    num_units: int,
) -> Vocabulary:
  _logger.info('Training a vocabulary of %d pieces.', settings.vocab_size)
  texts = sampled_texts(
      reading.keys,
      lambda index: texts_of(reading, index),
      lambda index: tokenising.read_splits(index) == 0,
      num_units,
      settings.vocabulary_characters,
  )
  return SentencePiece.train(texts, settings.vocab_size)


def texts_of(reading: ReadUnit, index: int) -> Iterator[str]:
  """The texts of the documents of a unit, in order."""
  for file in read_documents(reading.folder(index)):
    yield file.text


def _gather(
    made: pathlib.Path,
    num_units: int,
    reading: ReadUnit,
    tokenising: TokeniseUnit,
) -> dict[str, object]:
  """Puts the units' results together in the order of the plan."""
  from codet5p_jax.corpus.tfds_builder import gather_shards

  vocabulary_dir = made / layout.VOCABULARY
  shutil.copytree(
      tokenising.vocabulary_dir, vocabulary_dir, dirs_exist_ok=True
  )
  vocabulary = load_vocabulary(vocabulary_dir)
  stores = made / layout.TOKENS / vocabulary.fingerprint[:16]
  # A stopped run may have been here before.
  shutil.rmtree(made / layout.TOKENS, ignore_errors=True)
  summaries = [tokenising.summary(index) for index in range(num_units)]
  tokens, shards = {}, {}
  for split in layout.SPLITS:
    with_files = [i for i in range(num_units) if split in summaries[i]['files']]
    documents = (
        document
        for index in tqdm.tqdm(with_files, f'gathering {split}', unit=' units')
        for document in read_tokens(
            tokenising.folder(index), split, vocabulary.vocab_size
        )
    )
    tokens[split] = write_token_store(
        stores / split,
        documents,
        vocabulary.task_tokens.eos,
        vocabulary.vocab_size,
        vocabulary.fingerprint,
    )['num_tokens']
    shards[split] = [
        (
            tokenising.folder(index) / f'{split}.array_record',
            sum(summaries[index]['files'][split].values()),
        )
        for index in with_files
    ]
  gather_shards(made / layout.FILES, shards)
  dropped = _added(
      summary['dropped']
      for summary in [*map(reading.summary, range(num_units)), *summaries]
  )
  by_reason = collections.Counter(dict.fromkeys(filters.REASONS, 0))
  for counts in dropped.values():
    by_reason.update(counts)
  kept = {
      name: _added(summary[name] for summary in summaries)
      for name in ('files', 'tokens', 'characters', 'licences')
  }
  return {
      'format_version': FORMAT_VERSION,
      'files': {split: sum(kept['files'][split].values())
                for split in layout.SPLITS},
      'tokens': tokens,
      'characters': {split: sum(kept['characters'][split].values())
                     for split in layout.SPLITS},
      'languages': _summed(kept['files']),
      'tokens_by_language': _summed(kept['tokens']),
      'licences': _summed(kept['licences']),
      'dropped': dict(by_reason),
      'dropped_by_language': dropped,
      'vocabulary_fingerprint': vocabulary.fingerprint,
  }


def _added(counts: Iterable[dict]) -> dict[str, dict[str, int]]:
  """Adds up counts of counts."""
  total = collections.defaultdict(collections.Counter)
  for each in counts:
    for name, inner in each.items():
      total[name].update(inner)
  return {name: dict(inner) for name, inner in total.items()}


def _summed(counts: dict[str, dict[str, int]]) -> dict[str, int]:
  """Adds up the inner counts."""
  total = collections.Counter()
  for inner in counts.values():
    total.update(inner)
  return dict(total)
