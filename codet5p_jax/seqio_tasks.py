"""Objectives as seqio tasks, for seqio's mixtures, caching and inspection.

A task makes the very examples that `evaluation_examples` gives the trainer, by
the same functions, under the names seqio uses: `inputs` and `targets`, without
padding. Nothing is registered at import.

seqio and TensorFlow are imported here, not in training.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from codet5p_jax import stage_1
from codet5p_jax.corpus.folder import SPLITS
from codet5p_jax.corpus.provision import corpus_of
from codet5p_jax.data.seqio_vocabularies import SeqioVocabulary
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.training.batches import EVALUATION_SEED, example_generator

# At most so many parts of a split are read, and cached, side by side.
MAX_SHARDS = 64

STAGE_1 = 'stage_1'


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

  def make_example(row):
    inputs, targets = tf.numpy_function(
        source_and_target,
        [row['index'], row['tokens'], row['word_starts']],
        (tf.int32, tf.int32),
    )
    return {
        'inputs': tf.ensure_shape(inputs, [None]),
        'targets': tf.ensure_shape(targets, [None]),
    }

  def make_examples(rows):
    return rows.map(make_example, num_parallel_calls=tf.data.AUTOTUNE)

  feature = seqio.Feature(SeqioVocabulary(vocabulary), add_eos=False)
  seqio.TaskRegistry.add(
      name,
      source=TokenRowsSource(
          {
              split: objective.rows(corpus_dir, split, vocabulary)
              for split in SPLITS
          }
      ),
      preprocessors=[seqio.CacheDatasetPlaceholder(), make_examples],
      output_features={'inputs': feature, 'targets': feature},
  )


class TokenRowsSource(seqio.DataSource):
  """Token rows by split: {'index', 'tokens', 'word_starts'}, int32.

  seqio's own source of TensorFlow Datasets cannot read ArrayRecord.
  """

  def __init__(self, rows: dict[str, Any]):
    self._rows = rows
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
      return found['tokens'], found['word_starts'].astype(np.int32)

    def read(index):
      tokens, starts = tf.numpy_function(row, [index], (tf.int32, tf.int32))
      return {
          'index': tf.cast(index, tf.int32),
          'tokens': tf.ensure_shape(tokens, [None]),
          'word_starts': tf.ensure_shape(starts, [None]),
      }

    indices = tf.data.Dataset.range(first, last)
    if shuffle:
      indices = indices.shuffle(max(last - first, 1), seed)
    return indices.map(read, num_parallel_calls=tf.data.AUTOTUNE)
