"""Losses of a trained model over a split, and how well it finds codes."""

import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import tqdm

from codet5p_jax import retrieval
from codet5p_jax.corpus.folder import pair_texts
from codet5p_jax.corpus.pair_store import PairTexts
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.training.batches import evaluation_examples
from codet5p_jax.training.evaluation import evaluate_objectives
from codet5p_jax.training.run_folder import read_config, write_result
from codet5p_jax.trained_model import TrainedModel, load_trained_model

_logger = logging.getLogger(__name__)


def evaluate(
    run_dir: str,
    split: str = 'validation',
    data_dir: str | None = None,
    batch_size: int | None = None,
    batch_count: int | None = None,
    mesh_shape: Sequence[int] = (1, -1, 1),
    init_from: Sequence[Any] | None = None,
    pool_size: int | None = 1000,
    rerank: int = 32,
    operative_config: Callable[[], str] | None = None,
) -> dict[str, float | int]:
  """Evaluates the objectives a run was trained with, and prints the means.

  A model that was trained by contrast also finds the codes of texts among those
  of a pool; the mean reciprocal ranks are `<objective>/mrr`, of the encoder,
  `mrr_reranked` if it was trained to match, `mrr_bm25` and `mrr_chance`, see
  `codet5p_jax.retrieval`. The pool has `pool_size` pairs, if the split has so
  many, of which the first `rerank` are ranked again for each text.

  Args:
    run_dir: the run's folder; the result goes to `evaluation/<split>` in it.
    split: of the data.
    data_dir: by default the run's own.
    batch_size: rows at a time, in multiples of an objective's batch_scale; by
      default the run's.
    batch_count: at most so many batches; None for the whole split.
    mesh_shape: (replica, data, model).
    init_from: where frozen weights lie now; see `load_trained_model`.
    pool_size: pairs among which codes are found; None to find none.
    rerank: codes of each text that are ranked again, at most all of the pool.
    operative_config: gives the configuration that replays this run.

  Returns:
    {"<objective>/<metric>": mean}.

  Raises:
    UserError: the run folder or the data is not what it should be, or the pool
      has fewer pairs than are ranked again.
  """
  require_positive(
      batch_size=batch_size,
      batch_count=batch_count,
      pool_size=pool_size,
      rerank=rerank,
  )
  if 'objectives' not in read_config(run_dir):
    raise UserError(
        f'expected a run with objectives to evaluate, found a converted model '
        f'in {run_dir}; start a run from it: see INIT_FROM in runs/step.gin'
    )
  trained = load_trained_model(
      run_dir, mesh_shape, batch_size, init_from=init_from
  )
  data_dir = data_dir or trained.config['data_dir']
  examples = {
      o.name: evaluation_examples(o, data_dir, split, trained.vocabulary)
      for o in trained.train_step.config.objectives
  }
  searches = [
      _Search(trained, objective, examples[objective.name], pool_size, rerank)
      for objective in trained.train_step.config.objectives
      if _is_contrastive(objective) and pool_size is not None
  ]
  values = evaluate_objectives(
      trained.train_step,
      trained.params,
      trained.frozen_params,
      examples,
      batch_count,
  )
  for search in searches:
    values |= search.measure(pair_texts(pathlib.Path(data_dir), split))
  folder = trained.folder.path / 'evaluation' / split
  write_result(folder / 'metrics.json', {'step': trained.step, **values})
  if operative_config is not None:
    write_result(folder / 'operative_config.gin', operative_config())
  print(json.dumps({'step': trained.step, 'split': split, **values}, indent=2))
  _logger.info('Written to %s.', folder)
  return values


def _is_contrastive(objective: Any) -> bool:
  return isinstance(objective, Bimodal) and 'contrastive' in objective.losses


class _Search:
  """The search for codes of a pool by a model that an objective trained."""

  def __init__(
      self,
      trained: TrainedModel,
      objective: Bimodal,
      examples: Any,
      pool_size: int,
      rerank: int,
  ):
    """Chooses the pool.

    Args:
      trained: the model.
      objective: it was trained with.
      examples: of the split, by index.
      pool_size: pairs of the pool.
      rerank: codes of each text that are ranked again, if the model matches.

    Raises:
      UserError: there are too few pairs, or too few to rank so many again.
    """
    self._trained, self._objective = trained, objective
    self._num_reranked = rerank if 'matching' in objective.losses else None
    self._pool = retrieval.choose_pool(examples, pool_size)
    if self._num_reranked is not None:
      retrieval.check_reranked(rerank, len(self._pool))

  def measure(self, pairs: PairTexts) -> dict[str, float | int]:
    """Returns {"<objective>/<metric>": value}.

    Args:
      pairs: of the split, as they are.
    """
    train_step, size = self._trained.train_step, len(self._pool)
    with tqdm.tqdm(
        total=size * (self._num_reranked or 0),
        desc='ranking again',
        unit='code',
        delay=2.0,  # A small model needs no bar.
    ) as progress:
      ranks, ranks_again = retrieval.find_codes(
          train_step,
          self._trained.all_params,
          self._pool,
          train_step.config.microbatch_rows(self._objective),
          self._num_reranked,
          progress.update,
      )
    texts = [pairs[int(index)] for index in self._pool.indices]
    bm25_ranks = retrieval.bm25_ranks(
        [pair['text'] for pair in texts], [pair['code'] for pair in texts]
    )
    found = {
        'pool_size': size,
        'mrr': retrieval.mean_reciprocal_rank(ranks),
        'mrr_bm25': retrieval.mean_reciprocal_rank(bm25_ranks),
        'mrr_chance': retrieval.chance(size),
    }
    if ranks_again is not None:
      found |= {
          'reranked': self._num_reranked,
          'mrr_reranked': retrieval.mean_reciprocal_rank(ranks_again),
      }
    return {f'{self._objective.name}/{k}': v for k, v in found.items()}
