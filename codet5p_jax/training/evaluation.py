"""Mean losses and accuracies over a split, and how hard its targets are."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codet5p_jax.array_typing import Tree
from codet5p_jax.errors import require_positive
from codet5p_jax.training.batches import evaluation_batches
from codet5p_jax.training.logging import means
from codet5p_jax.training.train_step import TrainStep


def evaluate_objectives(
    train_step: TrainStep,
    params: Tree,
    frozen_params: Tree,
    datasets: Mapping[str, Any],
    num_batches: int | None,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
  """Mean metrics of every objective over a split, each example once.

  Args:
    train_step: of the run.
    params: the trainable parameters.
    frozen_params: the others.
    datasets: {objective name: examples}, see `evaluation_examples`.
    num_batches: at most so many batches of each; None for all.
    after_batch: called after each batch.

  Returns:
    {"<objective>/<metric>": mean over target tokens}. Among them
    `unigram_entropy`, the entropy in nats of the frequencies of the very
    targets: the loss of the best prediction that knows nothing but these.

  Raises:
    UserError: fewer than one batch is asked for.
  """
  require_positive(num_batches=num_batches)
  count_targets = _target_counter(
      train_step.mesh, train_step.config.model.vocab_size
  )
  values = {}
  for objective in train_step.config.objectives:
    sums = counts = None
    for batch in evaluation_batches(
        datasets[objective.name],
        train_step.config.microbatch_rows(objective),
        num_batches,
        train_step,
    ):
      metrics = train_step.evaluate(params, frozen_params, batch, objective)
      sums = metrics if sums is None else jax.tree.map(jnp.add, sums, metrics)
      if 'decoder_target_tokens' in batch:
        new = count_targets(
            batch['decoder_target_tokens'], batch['decoder_loss_weights']
        )
        counts = new if counts is None else counts + new
      try:
        after_batch()
      except BaseException:
        # Whoever ends an evaluation has other work for the devices, and on
        # CPUs two computations that exchange something may lock up.
        jax.block_until_ready((sums, counts))
        raise
    if counts is not None:
      values[f'{objective.name}/unigram_entropy'] = entropy(counts)
    for name, value in means(sums).items():
      values[f'{objective.name}/{name}'] = value
  return values


def entropy(counts: npt.ArrayLike) -> float:
  """Entropy, in nats, of the frequencies of things that were counted.

  >>> round(entropy([2, 1, 0, 1]) / float(np.log(2)), 6)
  1.5
  """
  counts = np.asarray(counts, np.float64)
  shares = counts[counts > 0] / counts.sum()
  return float(-np.sum(shares * np.log(shares)))


@functools.cache
def _target_counter(
    mesh: Mesh, vocab_size: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """(targets, weights) to the weight of each token id, on all hosts."""

  def count(targets, weights):
    return jnp.zeros(vocab_size, jnp.float32).at[targets].add(weights)

  return jax.jit(count, out_shardings=NamedSharding(mesh, PartitionSpec()))
