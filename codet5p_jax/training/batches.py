"""Batches as a pure function of (seed, step).

An objective's rows are shuffled anew for every pass over its split, by the
seed; step s takes the examples from s * batch_size on, in multiples of the
objective's `batch_scale`. What is random in example i follows from the seed and
i. Nothing is remembered between steps, so resuming costs nothing and any number
of hosts reads the same global batch, each only the rows its devices hold.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from codet5p_jax.training.teacher_forcing import without_markers
from codet5p_jax.training.objective import Objective, StepBatch
from codet5p_jax.training.train_step import (
    StepConfig,
    TrainStep,
    microbatch_counts,
)


# Of the random numbers of an evaluation: the same in every run.
EVALUATION_SEED = 0

_FINGERPRINT_ROWS = 64
# In place of the padding token, for some vocabularies end texts by that.
_PADDING = -1


def example_generator(seed: int, index: int) -> np.random.Generator:
  """The random numbers that example `index` of a stream is made with."""
  return np.random.default_rng((seed, index))


def training_rows(
    objective: Objective, data_dir: str, split: str, vocabulary: Any, seed: int
) -> Any:
  """A split's rows, endlessly, each pass in an order of its own."""
  import grain

  rows = objective.rows(data_dir, split, vocabulary)
  return _in_random_order(grain.MapDataset.source(rows), seed)


def training_row_numbers(num_rows: int, seed: int) -> Any:
  """Which of so many rows each example of training is made of.

  Returns:
    A grain.MapDataset, endless: a row's number by the number of an example of
    `training_examples`.
  """
  import grain

  return _in_random_order(grain.MapDataset.range(num_rows), seed)


def _in_random_order(dataset: Any, seed: int) -> Any:
  return dataset.seed(seed).shuffle().repeat()


def training_examples(
    objective: Objective, data_dir: str, vocabulary: Any, seed: int
) -> Any:
  """An endless grain.MapDataset of an objective's examples, by index.

  Every pass over the rows has another order, and draws other random numbers.
  """

  def example(index, row):
    generator = example_generator(seed, index)
    return objective.example(row, generator, vocabulary)

  rows = training_rows(objective, data_dir, 'train', vocabulary, seed)
  return rows.map_with_index(example)


def evaluation_examples(
    objective: Objective, data_dir: str, split: str, vocabulary: Any
) -> Any:
  """A grain.MapDataset of a split's examples, in order, each once.

  Sentinels and the first <s> carry no weight, see `without_markers`.
  """
  import grain

  def example(index, row):
    generator = example_generator(EVALUATION_SEED, index)
    made = objective.example(row, generator, vocabulary)
    if 'decoder_target_tokens' not in made:
      return made
    return without_markers(made, vocabulary.task_tokens)

  rows = objective.rows(data_dir, split, vocabulary)
  return grain.MapDataset.source(rows).map_with_index(example)


def unpadded_example(
    objective: Objective,
    row: Any,
    generator: np.random.Generator,
    vocabulary: Any,
) -> dict[str, np.ndarray]:
  """The token ids of an example, without its padding.

  Args:
    objective: makes the example.
    row: of it.
    generator: see `example_generator`.
    vocabulary: of the rows.

  Returns:
    {feature: int32 [tokens]} of those features whose names end in "_tokens",
    by their names without that, such as "decoder_target" or "text".
  """
  task_tokens = dataclasses.replace(vocabulary.task_tokens, pad=_PADDING)
  # Not by `copy`, which would read the vocabulary's files again.
  marking = object.__new__(type(vocabulary))
  vars(marking).update(vars(vocabulary), task_tokens=task_tokens)
  example = objective.example(row, generator, marking)
  return {
      name.removesuffix('_tokens'): ids[ids != _PADDING]
      for name, ids in example.items()
      if name.endswith('_tokens')
  }


def data_fingerprint(
    objective: Objective, data_dir: str, split: str, vocabulary: Any
) -> dict[str, Any]:
  """Tells data apart without reading all of it.

  Returns:
    The number of rows of the split, and a digest of the examples made of some
    of them, spread evenly.
  """
  rows = objective.rows(data_dir, split, vocabulary)
  count = min(len(rows), _FINGERPRINT_ROWS)
  digest = hashlib.sha256()
  for number in range(count):
    index = number * len(rows) // count
    generator = example_generator(EVALUATION_SEED, index)
    example = objective.example(rows[index], generator, vocabulary)
    for name in sorted(example):
      digest.update(np.ascontiguousarray(example[name]).tobytes())
  return {'rows': len(rows), 'digest': digest.hexdigest()}


def batch_examples(config: StepConfig, step: int) -> dict[str, range]:
  """Which examples of its endless stream each objective gives to a step.

  Args:
    config: of the run.
    step: updates made before.
  """
  examples = {}
  rows = {o.name: config.microbatch_rows(o) for o in config.objectives}
  for name, count in microbatch_counts(config, step).items():
    first = step * rows[name] * config.num_microbatches
    examples[name] = range(first, first + count * rows[name])
  return examples


class TrainBatches:
  """Training batches by step, read ahead by one thread."""

  def __init__(
      self,
      config: StepConfig,
      train_step: TrainStep,
      datasets: Mapping[str, Any],
  ):
    """Reads nothing yet.

    Args:
      config: gives the seed and the batch size.
      train_step: gives the sharding of a batch.
      datasets: {objective name: endless examples}, see `training_examples`.
    """
    self._config = config
    self._sharding = train_step.batch_sharding
    self._datasets = datasets
    self._objectives = {o.name: o for o in config.objectives}

  def at(self, step: int) -> StepBatch:
    """The batches of a step: {objective: {feature: [micro, batch, ...]}}."""
    config = self._config
    result = {}
    for name, numbers in batch_examples(config, step).items():
      dataset = self._datasets[name]
      rows = config.microbatch_rows(self._objectives[name])
      shape = (len(numbers) // rows, rows)

      def row(micro, index, dataset=dataset, numbers=numbers, rows=rows):
        return dataset[numbers[micro * rows + index]]

      result[name] = _global_arrays(row, shape, self._sharding)
    return result

  def read(self, first: int, last: int) -> Iterator[StepBatch]:
    """Yields the batches of steps first to last - 1, made two steps ahead."""
    ahead: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      for step in range(first, last + 2):
        if step < last:
          ahead.append(pool.submit(self.at, step))
        if step >= first + 2:
          yield ahead.popleft().result()


def evaluation_batches(
    dataset: Any,
    batch_size: int,
    num_batches: int | None,
    train_step: TrainStep,
) -> Iterator[dict[str, jax.Array]]:
  """Yields a split's examples once, in order, none dropped.

  The last batch is filled with rows of weight 0. Where fewer are asked for
  than there are, they are spread evenly: neighbours are of one package.

  Args:
    dataset: grain.MapDataset of examples.
    batch_size: rows of a batch.
    num_batches: at most so many; None for all.
    train_step: gives the sharding.
  """
  wanted = len(dataset)
  if num_batches is not None:
    wanted = min(wanted, num_batches * batch_size)
  for number in range(-(-wanted // batch_size)):

    def row(_, index, number=number):
      index += number * batch_size
      if index < wanted:
        return dataset[index * len(dataset) // wanted]
      return jax.tree.map(np.zeros_like, dataset[0])

    arrays = _global_arrays(row, (1, batch_size), train_step.batch_sharding)
    yield {name: array[0] for name, array in arrays.items()}


def _global_arrays(row, shape, sharding) -> dict[str, jax.Array]:
  """Builds arrays [*shape, ...], reading only this host's rows, each once.

  Args:
    row: (micro-batch, index in it) to example.
    shape: (micro-batches, rows of each).
    sharding: of the arrays' first two axes.
  """
  indices = sharding.addressable_devices_indices_map(shape)
  needed = {
      (micro, index)
      for slices in indices.values()
      for micro in range(*slices[0].indices(shape[0]))
      for index in range(*slices[1].indices(shape[1]))
  }
  rows = {place: row(*place) for place in sorted(needed)}
  example = next(iter(rows.values()))

  def feature(name):
    def part(slices):
      return np.stack([
          np.stack([
              rows[micro, index][name]
              for index in range(*slices[1].indices(shape[1]))
          ])
          for micro in range(*slices[0].indices(shape[0]))
      ])

    return jax.make_array_from_callback(
        (*shape, *example[name].shape), sharding, part
    )

  return {name: feature(name) for name in example}
