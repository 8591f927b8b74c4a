"""Training: pre-training and fine-tuning alike."""

import collections
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from codet5p_jax.conversion.init_from import absolute
from codet5p_jax.corpus.provision import corpus_of
from codet5p_jax.data.vocabularies import Vocabulary, load_vocabulary
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.initialisation import (
    first_state,
    format_parts,
    parts_table,
    plan_first_state,
)
from codet5p_jax.planning.chips import peak_flops_per_second
from codet5p_jax.planning.flops import training_flops
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.batches import (
    TrainBatches,
    evaluation_examples,
    training_examples,
)
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.checkpoints.weights import save_weights
from codet5p_jax.training.evaluation import evaluate_objectives
from codet5p_jax.training.logging import RunLog, check_finite, means
from codet5p_jax.training.partition import merge_params
from codet5p_jax.storage import local_path
from codet5p_jax.training.run_folder import (
    RunFolder,
    open_run_folder,
    trim_metrics,
    write_result,
)
from codet5p_jax.training.train_step import (
    StepConfig,
    TrainState,
    TrainStep,
    make_train_step,
    microbatch_counts,
)

_logger = logging.getLogger(__name__)


def train(
    step_config: StepConfig,
    run_dir: str,
    data_dir: str,
    train_steps: int,
    vocabulary_dir: str | None = None,
    init_from: Sequence[Any] = (),
    log_every: int = 10,
    evaluate_every: int = 1000,
    evaluation_batch_count: int | None = 20,
    checkpoint_every: int = 1000,
    checkpoints_to_keep: int | None = 3,
    operative_config: Callable[[], str] | None = None,
) -> None:
  """Trains a model, or goes on where a run of the same settings stopped.

  Args:
    step_config: what a step computes.
    run_dir: the run's folder; describes itself, see training/run_folder.py.
    data_dir: what the objectives read. Where that is a corpus folder, source
      files do as well, such as a folder of them or
      jsonl://rows.jsonl?field=code: a corpus is made of them beside the run.
    train_steps: updates to make, those before a stop included.
    vocabulary_dir: the vocabulary; by default `data_dir`/vocabulary.
    init_from: weights to start from, see conversion/init_from.py; empty for a
      model that is drawn. What they give and the run does not train is not
      written again: loading the run reads it from there.
    log_every: steps between rows of metrics.jsonl.
    evaluate_every: steps between evaluations on the validation split; there is
      one at the end in any case.
    evaluation_batch_count: batches of an evaluation; None for the whole split.
    checkpoint_every: steps between checkpoints; there is one at the end.
    checkpoints_to_keep: the newest ones; None for all.
    operative_config: gives the configuration that replays this run.

  Raises:
    UserError: the settings contradict each other, the folder or the data; or
      a loss is not finite.
  """
  require_positive(
      train_steps=train_steps,
      log_every=log_every,
      evaluate_every=evaluate_every,
      evaluation_batch_count=evaluation_batch_count,
      checkpoint_every=checkpoint_every,
      checkpoints_to_keep=checkpoints_to_keep,
  )
  if not step_config.objectives:
    raise UserError('expected objectives to train, found none; set OBJECTIVES')
  mesh = make_mesh(step_config.mesh_shape)
  train_step = make_train_step(step_config, mesh)
  if all(objective.reads_corpus for objective in step_config.objectives):
    data_dir = corpus_of(
        data_dir,
        f'{run_dir.rstrip("/")}.corpus',
        vocabulary_dir,
        step_config.model.vocab_size,
    )
  vocabulary = load_vocabulary(vocabulary_dir or f'{data_dir}/vocabulary')
  _check_vocabulary(vocabulary, step_config)
  resumes = RunFolder(local_path(run_dir)).has_checkpoints()
  initialisation = plan_first_state(init_from, train_step, vocabulary, resumes)
  objectives = step_config.objectives
  training = {
      o.name: training_examples(o, data_dir, vocabulary, step_config.seed)
      for o in objectives
  }
  validation = {
      o.name: evaluation_examples(o, data_dir, 'validation', vocabulary)
      for o in objectives
  }
  identity = _identity(step_config, train_steps, vocabulary, data_dir)
  folder = open_run_folder(
      run_dir,
      identity,
      may_differ=('computation.remat_policy', 'computation.scan_layers'),
  )
  if not folder.vocabulary.exists():
    vocabulary.save(folder.vocabulary)
  if operative_config is not None:
    write_result(folder.path / 'operative_config.gin', operative_config())

  with Checkpoints(
      folder.checkpoints, max_to_keep=checkpoints_to_keep
  ) as saved:
    if not resumes:
      parts = parts_table(initialisation, train_step.abstract_state)
      _logger.info('%s', format_parts(parts))
      write_result(folder.path / 'parts.json', {'parts': parts})
    state, frozen = first_state(initialisation, train_step, saved)
    first = int(state.step)
    trim_metrics(folder.metrics, first)
    if first:
      _logger.info('Going on at step %d of %d.', first, train_steps)
    if first >= train_steps and folder.model.exists():
      _logger.info('The run in %s is complete.', folder.path)
      return
    _logger.info('Compiling the train step.')
    log = RunLog(
        folder,
        first,
        train_steps,
        {
            o.name: training_flops(
                step_config.model,
                o.batch_spec(step_config.microbatch_rows(o)),
                flatten_dict(train_step.abstract_state.params, sep='/').keys(),
                step_config.computation,
            ).least
            for o in objectives
        },
        peak_flops_per_second(mesh.devices.flatten().tolist()),
    )
    try:
      state = _loop(
          state,
          _Loop(
              train_step=train_step,
              batches=TrainBatches(step_config, train_step, training),
              last=train_steps,
              log=log,
              log_every=log_every,
              learning_rate=step_config.optimizer.schedule(),
              evaluate_every=evaluate_every,
              evaluate=lambda state: evaluate_objectives(
                  train_step,
                  state.params,
                  state.frozen_params,
                  state.objective_state,
                  validation,
                  evaluation_batch_count,
              ),
              checkpoint_every=checkpoint_every,
              saved=saved,
              metadata={
                  'frozen_fingerprint': frozen.fingerprint,
                  'init_from': absolute(init_from),
              },
          ),
      )
    finally:
      log.close()
  params = state.params
  if not frozen.digests:  # Frozen as it was drawn: nothing else has it.
    params = merge_params(params, state.frozen_params)
  save_weights(
      folder.model,
      params,
      {
          'step': int(state.step),
          'frozen_digests': frozen.digests,
          'init_from': absolute(init_from),
      },
      step_config.model.vocab_size,
  )
  _logger.info('Weights in %s.', folder.model)


@dataclasses.dataclass(frozen=True)
class _Loop:
  """What the loop needs; see `train`."""

  train_step: TrainStep
  batches: TrainBatches
  last: int
  log: RunLog
  log_every: int
  learning_rate: Callable[[int], Any]
  evaluate_every: int
  evaluate: Callable[[TrainState], dict[str, float]]
  checkpoint_every: int
  saved: Checkpoints
  metadata: dict[str, Any]


def _loop(state: TrainState, loop: _Loop) -> TrainState:
  """Makes the steps from the state's own to the last."""
  first = int(state.step)
  pending: collections.deque = collections.deque()
  seen_counts: list[dict[str, int]] = []  # A step is compiled for each.

  def settle(leave: int) -> None:
    # Looks at metrics one step late, so that the device always has the next
    # step at hand while the host reads those of the last.
    while len(pending) > leave:
      step, metrics, counts, compiled = pending.popleft()
      values = means(metrics)
      check_finite(step, values)
      loop.log.advance(values, counts, compiled)
      if step % loop.log_every == 0 or step == loop.last:
        loop.log.train(
            step,
            values,
            loop.batches.seconds_waiting,
            learning_rate=float(loop.learning_rate(step - 1)),
        )

  for number, batch in enumerate(loop.batches.read(first, loop.last), first):
    counts = microbatch_counts(loop.train_step.config, number)
    compiles = counts not in seen_counts
    if compiles:
      seen_counts.append(counts)
      settle(leave=0)  # Lest the compiling count as time of the step before.
    state, metrics = loop.train_step.step(state, batch)
    step = number + 1
    pending.append((step, metrics, counts, compiles))
    settle(leave=0 if compiles else 1)
    loop.saved.check_for_errors()
    is_last = step == loop.last
    if step % loop.evaluate_every == 0 or is_last:
      settle(leave=0)
      with loop.log.pause():
        loop.log.evaluation(step, loop.evaluate(state))
    if step % loop.checkpoint_every == 0 or is_last:
      settle(leave=0)  # Never saves a state whose loss was not seen.
      with loop.log.pause():
        loop.saved.save(step, state, {'step': step}, loop.metadata)
  return state


def _check_vocabulary(vocabulary: Vocabulary, config: StepConfig) -> None:
  """Checks that a vocabulary's tokens are those that the model speaks."""
  model = config.model
  if vocabulary.vocab_size != model.vocab_size:
    raise UserError(
        f'expected a vocabulary of {model.vocab_size} tokens, as the model '
        f'has, found one of {vocabulary.vocab_size}; choose the model or the '
        f'vocabulary accordingly'
    )
  if vocabulary.kind not in model.vocabulary_kinds:
    raise UserError(
        f'expected a vocabulary of kind {" or ".join(model.vocabulary_kinds)}, '
        f'as the model was made for, found {vocabulary.kind}; choose the model '
        f'or the vocabulary accordingly'
    )
  tokens = vocabulary.task_tokens
  if (tokens.pad, tokens.eos) != (model.pad_id, model.eos_id):
    raise UserError(
        f'expected the tokens {model.pad_id} for padding and {model.eos_id} '
        f'for the end of a text, as the model has, found {tokens.pad} and '
        f'{tokens.eos} in the vocabulary; set pad_id and eos_id of the model'
    )


def _identity(
    config: StepConfig,
    train_steps: int,
    vocabulary: Vocabulary,
    data_dir: str,
) -> dict[str, Any]:
  """What makes a run this run; its layout on devices does not."""
  fields = (
      'model',
      'objectives',
      'optimizer',
      'batch_size',
      'num_microbatches',
      'trainable',
      'frozen_dtype',
      'seed',
      'computation',
  )
  return {
      **{field: getattr(config, field) for field in fields},
      'train_steps': train_steps,
      'vocabulary_fingerprint': vocabulary.fingerprint,
      'data_dir': str(data_dir),
  }
