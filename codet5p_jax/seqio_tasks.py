"""Objectives as seqio tasks, for seqio's mixtures, caching and inspection.

A task makes the very examples that `evaluation_examples` gives the trainer, by
the same functions, without padding; sources and targets under the names that
seqio uses: `inputs` and `targets`. Nothing is registered at import.

seqio and TensorFlow are imported here, not in training.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from codet5p_jax import stage_1
from codet5p_jax.corpus.folder import SPLITS
from codet5p_jax.corpus.provision import corpus_of
from codet5p_jax.data.seqio_vocabularies import SeqioVocabulary
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.training.batches import (
    EVALUATION_SEED,
    example_generator,
    unpadded_example,
)

# At most so many parts of a split are read, and cached, side by side.
MAX_SHARDS = 64

STAGE_1 = 'stage_1'
STAGE_2 = 'stage_2'


def register_stage_1(
    data: str,
    corpus_dir: str | None = None,
    vocabulary_dir: str | None = None,
    objectives: Sequence[Any] = stage_1.OBJECTIVES,
    seed: int = EVALUATION_SEED,
) -> None:
  """Registers each objective as a task, and their mixture as `stage_1`.

  The rates of the mixture are those of the objectives: equal, as in the paper.
  A module that calls this is what `seqio_cache_tasks --module_import` takes.

  Args:
    data: a corpus folder; or source files, such as a folder of them or
      jsonl://rows.jsonl?field=code, of which a corpus is made.
    corpus_dir: where such a corpus goes.
    vocabulary_dir: by default the corpus folder's own.
    objectives: with the lengths that are wanted.
    seed: of the random numbers; a task draws the same for a row every time.

  Raises:
    UserError: there is no such data or vocabulary, or no corpus_dir where one
      is needed.
  """
  corpus_dir = corpus_of(data, corpus_dir, vocabulary_dir)
  vocabulary = load_vocabulary(vocabulary_dir or f'{corpus_dir}/vocabulary')
  for objective in objectives:
    register_task(objective.name, objective, corpus_dir, vocabulary, seed)
  seqio.MixtureRegistry.add(
      STAGE_1,
      [(objective.name, objective.rate) for objective in objectives],
  )


def register_stage_2(
    data: str,
    corpus_dir: str | None = None,
    vocabulary_dir: str | None = None,
    objective: Bimodal = Bimodal(),
) -> None:
  """Registers pairs of text and code, and writing each of the other.

  The task `bimodal` has the features `text` and `code`. `text_to_code` and
  `code_to_text` have `inputs`, and `targets` that begin with the task token, as
  the decoder writes them; their mixture at equal rates is `stage_2`.

  Args:
    data: see `register_stage_1`; a corpus folder must have pairs.
    corpus_dir: likewise.
    vocabulary_dir: likewise.
    objective: with the lengths that are wanted.

  Raises:
    UserError: there is no such data or vocabulary, or no pairs, or no
      corpus_dir where one is needed.
  """
  corpus_dir = corpus_of(data, corpus_dir, vocabulary_dir, pairs=True)
  vocabulary = load_vocabulary(vocabulary_dir or f'{corpus_dir}/vocabulary')
  ids = vocabulary.task_tokens

  def text_and_code(index, text, code):
    row = {'text': text, 'code': code}
    generator = example_generator(EVALUATION_SEED, int(index))
    made = unpadded_example(objective, row, generator, vocabulary)
    return made['text'], made['code']

  def text_to_code(*row):
    text, code = text_and_code(*row)
    return text, _begun_by(ids.cdec, code)

  def code_to_text(*row):
    text, code = text_and_code(*row)
    return code, _begun_by(ids.tdec, text)

  sides, writes = ('text', 'code'), ('inputs', 'targets')
  source = RowsSource(_rows_by_split(objective, corpus_dir, vocabulary), sides)
  for name, make, features in (
      (objective.name, text_and_code, sides),
      ('text_to_code', text_to_code, writes),
      ('code_to_text', code_to_text, writes),
  ):
    _add_task(name, source, make, features, vocabulary)
  seqio.MixtureRegistry.add(
      STAGE_2, [('text_to_code', 1.0), ('code_to_text', 1.0)]
  )


def _begun_by(task_token: int, framed: np.ndarray) -> np.ndarray:
  """A sequence with a task token in place of its <s>."""
  return np.concatenate([[task_token], framed[1:]]).astype(np.int32)


def register_task(
    name: str,
    objective: Any,
    corpus_dir: str,
    vocabulary: Any,
    seed: int = EVALUATION_SEED,
) -> None:
  """Registers an objective over a corpus folder as a seqio task.

  What `seqio_cache_tasks` caches is the rows; what an objective draws at
  random is drawn after it.

  Args:
    name: of the task in seqio's registry.
    objective: of token rows, such as `CausalLM`.
    corpus_dir: a corpus folder.
    vocabulary: the one whose token store is read.
    seed: see `register_stage_1`.

  Raises:
    UserError: there is no such corpus, or it was not tokenised with the
      vocabulary.
  """

  def source_and_target(index, tokens, word_starts):
    return objective.source_and_target(
        {'tokens': tokens, 'word_starts': word_starts.astype(bool)},
        example_generator(seed, int(index)),
        vocabulary,
    )

  source = RowsSource(
      _rows_by_split(objective, corpus_dir, vocabulary),
      ('tokens', 'word_starts'),
  )
  _add_task(
      name, source, source_and_target, ('inputs', 'targets'), vocabulary
  )


def _rows_by_split(
    objective: Any, corpus_dir: str, vocabulary: Any
) -> dict[str, Any]:
  return {
      split: objective.rows(corpus_dir, split, vocabulary) for split in SPLITS
  }


def _add_task(
    name: str,
    source: 'RowsSource',
    make: Callable[..., tuple[np.ndarray, np.ndarray]],
    features: Sequence[str],
    vocabulary: Any,
) -> None:
  """Registers a task.

  Args:
    name: of the task.
    source: of the rows.
    make: (index, and each of a row's fields) -> each of the features.
    features: of the examples; token ids.
    vocabulary: of the features.
  """

  def make_example(row):
    made = tf.numpy_function(
        make,
        [row[field] for field in ('index', *source.fields)],
        [tf.int32] * len(features),
    )
    return {
        feature: tf.ensure_shape(ids, [None])
        for feature, ids in zip(features, made, strict=True)
    }

  def make_examples(rows):
    return rows.map(make_example, num_parallel_calls=tf.data.AUTOTUNE)

  feature = seqio.Feature(SeqioVocabulary(vocabulary), add_eos=False)
  seqio.TaskRegistry.add(
      name,
      source=source,
      preprocessors=[seqio.CacheDatasetPlaceholder(), make_examples],
      output_features=dict.fromkeys(features, feature),
  )


class RowsSource(seqio.DataSource):
  """Rows by split: {'index' and the fields of a row}, int32.

  seqio's own source of TensorFlow Datasets cannot read ArrayRecord.
  """

  def __init__(self, rows: dict[str, Any], fields: Sequence[str]):
    self._rows = rows
    self.fields = tuple(fields)
    super().__init__(
        splits=tuple(rows),
        num_input_examples={split: len(part) for split, part in rows.items()},
    )

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    shards = min(MAX_SHARDS, len(self._rows[split]))
    return [f'{split}-{shard:02d}' for shard in range(shards)]

  def get_dataset(
      self,
      split: str,
      shuffle: bool = True,
      seed: int | None = None,
      shard_info: seqio.ShardInfo | None = None,
  ) -> tf.data.Dataset:
    """Rows in the order of the store; `shuffle` shuffles all of them."""
    rows = self._rows[split]
    shard_info = shard_info or seqio.ShardInfo(0, 1)
    # Stretches, so that reading them all in turn keeps the order.
    first, last = (
        len(rows) * number // shard_info.num_shards
        for number in (shard_info.index, shard_info.index + 1)
    )

    def row(index):
      found = rows[int(index)]
      return [found[field].astype(np.int32) for field in self.fields]

    def read(index):
      found = tf.numpy_function(row, [index], [tf.int32] * len(self.fields))
      fields = {
          field: tf.ensure_shape(values, [None])
          for field, values in zip(self.fields, found, strict=True)
      }
      return {'index': tf.cast(index, tf.int32), **fields}

    indices = tf.data.Dataset.range(first, last)
    if shuffle:
      indices = indices.shuffle(max(last - first, 1), seed)
    return indices.map(read, num_parallel_calls=tf.data.AUTOTUNE)
