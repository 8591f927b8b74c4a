"""Losses of a trained model over a split."""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.training.batches import evaluation_examples
from codet5p_jax.training.evaluation import evaluate_objectives
from codet5p_jax.training.run_folder import read_config, write_result
from codet5p_jax.trained_model import load_trained_model

_logger = logging.getLogger(__name__)


def evaluate(
    run_dir: str,
    split: str = 'validation',
    data_dir: str | None = None,
    batch_size: int | None = None,
    batch_count: int | None = None,
    mesh_shape: Sequence[int] = (1, -1, 1),
    init_from: Sequence[Any] | None = None,
    operative_config: Callable[[], str] | None = None,
) -> dict[str, float]:
  """Evaluates the objectives a run was trained with, and prints the means.

  Args:
    run_dir: the run's folder; the result goes to `evaluation/<split>` in it.
    split: of the data.
    data_dir: by default the run's own.
    batch_size: rows at a time, in multiples of an objective's batch_scale; by
      default the run's.
    batch_count: at most so many batches; None for the whole split.
    mesh_shape: (replica, data, model).
    init_from: where frozen weights lie now; see `load_trained_model`.
    operative_config: gives the configuration that replays this run.

  Returns:
    {"<objective>/<metric>": mean}.

  Raises:
    UserError: the run folder or the data is not what it should be.
  """
  require_positive(batch_size=batch_size, batch_count=batch_count)
  if 'objectives' not in read_config(run_dir):
    raise UserError(
        f'expected a run with objectives to evaluate, found a converted model '
        f'in {run_dir}; start a run from it: see INIT_FROM in runs/step.gin'
    )
  trained = load_trained_model(
      run_dir, mesh_shape, batch_size, init_from=init_from
  )
  data_dir = data_dir or trained.config['data_dir']
  objectives = trained.train_step.config.objectives
  values = evaluate_objectives(
      trained.train_step,
      trained.params,
      trained.frozen_params,
      {
          o.name: o.init_state(trained.train_step.model, trained.all_params)
          for o in objectives
      },
      {
          o.name: evaluation_examples(o, data_dir, split, trained.vocabulary)
          for o in objectives
      },
      batch_count,
  )
  folder = trained.folder.path / 'evaluation' / split
  write_result(folder / 'metrics.json', {'step': trained.step, **values})
  if operative_config is not None:
    write_result(folder / 'operative_config.gin', operative_config())
  print(json.dumps({'step': trained.step, 'split': split, **values}, indent=2))
  _logger.info('Written to %s.', folder)
  return values
