"""Mean losses and accuracies over a split."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from codet5p_jax.array_typing import Tree
from codet5p_jax.errors import require_positive
from codet5p_jax.training.batches import evaluation_batches
from codet5p_jax.training.logging import means
from codet5p_jax.training.train_step import TrainStep


def evaluate_objectives(
    train_step: TrainStep,
    params: Tree,
    frozen_params: Tree,
    objective_state: Tree,
    datasets: Mapping[str, Any],
    num_batches: int | None,
) -> dict[str, float]:
  """Mean metrics of every objective over a split, each example once.

  Args:
    train_step: of the run.
    params: the trainable parameters.
    frozen_params: the others.
    objective_state: {objective name: its state}.
    datasets: {objective name: grain.MapDataset of examples}.
    num_batches: at most so many batches of each; None for all.

  Returns:
    {"<objective>/<metric>": mean over target tokens}.

  Raises:
    UserError: fewer than one batch is asked for.
  """
  require_positive(num_batches=num_batches)
  values = {}
  for objective in train_step.config.objectives:
    sums = None
    for batch in evaluation_batches(
        datasets[objective.name],
        train_step.config.microbatch_size,
        num_batches,
        train_step,
    ):
      metrics = train_step.evaluate(
          params,
          frozen_params,
          objective_state[objective.name],
          batch,
          objective,
      )
      sums = metrics if sums is None else jax.tree.map(jnp.add, sums, metrics)
    for name, value in means(sums).items():
      values[f'{objective.name}/{name}'] = value
  return values
