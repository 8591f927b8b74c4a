"""Training: pre-training and fine-tuning alike."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from codet5p_jax.conversion.init_from import absolute
from codet5p_jax.corpus.provision import corpus_of
from codet5p_jax.data.vocabularies import Vocabulary, load_vocabulary
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.initialisation import (
    Frozen,
    first_state,
    format_parts,
    parts_table,
    plan_first_state,
)
from codet5p_jax.models.bimodal import BimodalConfig
from codet5p_jax.planning.chips import peak_flops_per_second
from codet5p_jax.planning.flops import training_flops
from codet5p_jax.sharding import make_mesh
from codet5p_jax.storage import local_path
from codet5p_jax.training.batches import (
    TrainBatches,
    data_fingerprint,
    evaluation_examples,
    training_examples,
)
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.checkpoints.steps import committed_steps
from codet5p_jax.training.checkpoints.verify import DamagedCheckpoint, verify
from codet5p_jax.training.checkpoints.weights import save_weights
from codet5p_jax.training.compilation_cache import using_compilation_cache
from codet5p_jax.training.distributed import (
    agree,
    as_first_process,
    failing_together,
    join,
    on_first_process,
    program_digest,
    wait_for_all,
)
from codet5p_jax.training.evaluation import evaluate_objectives
from codet5p_jax.training.logging import RunLog
from codet5p_jax.training.loop import PATIENCE, Loop, make_steps
from codet5p_jax.training.partition import merge_params
from codet5p_jax.training.preemption import PreemptionNotice
from codet5p_jax.training.run_folder import (
    RunFolder,
    describe,
    open_run_folder,
    read_metrics,
    trim_metrics,
    write_result,
)
from codet5p_jax.training.run_lock import RunLock, await_lock
from codet5p_jax.training.timeline import Timeline
from codet5p_jax.training.train_step import (
    StepConfig,
    TrainState,
    TrainStep,
    make_train_step,
)
from codet5p_jax.training.watchdog import Watchdog

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
    checkpoint_keep_every: int | None = None,
    hang_seconds: float = 600.0,
    join_seconds: float = 300.0,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
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
    checkpoint_keep_every: those of steps that are multiples of it are kept for
      good beside the newest ones; None for none.
    hang_seconds: a step that takes longer, or what has to be compiled or saved
      six times as long, ends the process with status 70 and its stacks in
      `hangs/`.
    join_seconds: that a process waits for the others before the first step.
    coordinator_address: host:port of process 0 where the run has several
      processes and JAX cannot find them: on TPUs, GKE and Slurm it can.
    num_processes: of the run.
    process_id: of this process, from 0 on.
    operative_config: gives the configuration that replays this run.

  Raises:
    UserError: the settings contradict each other, the folder or the data; or
      too many steps in a row were bad, see training/step_health.py; a host is
      missing or differs from the others; another run uses the folder.
    Preempted: the machine is about to be taken away; the run is saved.
  """
  join(coordinator_address, num_processes, process_id, join_seconds)
  require_positive(
      train_steps=train_steps,
      log_every=log_every,
      evaluate_every=evaluate_every,
      evaluation_batch_count=evaluation_batch_count,
      checkpoint_every=checkpoint_every,
      checkpoints_to_keep=checkpoints_to_keep,
      checkpoint_keep_every=checkpoint_keep_every,
      hang_seconds=hang_seconds,
  )
  if not step_config.objectives:
    raise UserError('expected objectives to train, found none; set OBJECTIVES')
  folder = RunFolder(local_path(run_dir))
  _agree_upon_settings(
      step_config,
      RUN_DIR=str(folder.path),
      DATA_DIR=data_dir,
      VOCABULARY_DIR=vocabulary_dir,
      INIT_FROM=init_from,
      TRAIN_STEPS=train_steps,
      # Whoever counts otherwise saves or evaluates while others do not.
      LOG_EVERY=log_every,
      EVALUATE_EVERY=(evaluate_every, evaluation_batch_count),
      CHECKPOINT_EVERY=(
          checkpoint_every,
          checkpoints_to_keep,
          checkpoint_keep_every,
      ),
  )
  mesh = make_mesh(step_config.mesh_shape)
  train_step = make_train_step(step_config, mesh)
  resumes = as_first_process(bool(committed_steps(folder.checkpoints)))
  data = _read_data(step_config, run_dir, data_dir, vocabulary_dir)
  with failing_together():
    initialisation = plan_first_state(
        init_from, train_step, data.vocabulary, resumes
    )
  identity = _identity(step_config, train_steps, data)
  parts = (
      None
      if resumes
      else parts_table(initialisation, train_step.abstract_state)
  )
  with contextlib.ExitStack() as held:
    watchdog = held.enter_context(Watchdog(folder.path / 'hangs'))
    notice = held.enter_context(PreemptionNotice())
    lock = RunLock(folder.lock)
    on_first_process(lambda: held.enter_context(lock))
    on_first_process(
        lambda: _prepare_folder(
            folder,
            identity,
            data.vocabulary,
            operative_config,
            parts,
        )
    )
    name = as_first_process(lock.name)
    with failing_together():
      await_lock(folder.lock, name)
    timeline = held.enter_context(
        Timeline(folder.timeline, jax.process_index() == 0)
    )
    held.enter_context(using_compilation_cache(folder.compiled))
    saved = held.enter_context(
        Checkpoints(
            folder.checkpoints,
            max_to_keep=checkpoints_to_keep,
            keep_every=checkpoint_keep_every,
            tell=timeline.event,
        )
    )
    watchdog.expect('restoring the state', hang_seconds * PATIENCE)
    state, frozen = first_state(initialisation, train_step, saved)
    first = int(state.step)
    on_first_process(lambda: trim_metrics(folder.metrics, first))
    if first:
      _logger.info('Going on at step %d of %d.', first, train_steps)
    if first >= train_steps and _is_complete(folder):
      _logger.info('The run in %s is complete.', folder.path)
      return
    _logger.info('Compiling the train step.')
    log = held.enter_context(
        contextlib.closing(
            RunLog(
                folder,
                first,
                train_steps,
                _microbatch_flops(train_step),
                peak_flops_per_second(mesh.devices.flatten().tolist()),
                timeline,
            )
        )
    )
    metadata = {
        'frozen_fingerprint': frozen.fingerprint,
        'init_from': absolute(init_from),
    }
    with timeline.training(first):
      # A session may have another rule than the one before: for `replay`.
      timeline.event('rule', bad_steps=describe(step_config.bad_steps))
      state = make_steps(
          state,
          Loop(
              train_step=train_step,
              batches=TrainBatches(step_config, train_step, data.training),
              folder=folder,
              last=train_steps,
              log=log,
              timeline=timeline,
              log_every=log_every,
              learning_rate=step_config.optimizer.schedule(),
              evaluate_every=evaluate_every,
              evaluate=lambda state, after_batch: evaluate_objectives(
                  train_step,
                  state.params,
                  state.frozen_params,
                  data.validation,
                  evaluation_batch_count,
                  after_batch,
              ),
              evaluated_step=as_first_process(_evaluated_step(folder)),
              checkpoint_every=checkpoint_every,
              saved=saved,
              metadata=metadata,
              notice=notice,
              watchdog=watchdog,
              hang_seconds=hang_seconds,
              lock=lock,
          ),
      )
    watchdog.expect('writing the weights', hang_seconds * PATIENCE)
    with timeline.within('checkpoint'):
      saved.wait_until_finished()
      on_first_process(lock.require_held)
      _write_weights(folder, step_config.model, state, frozen, init_from)
      wait_for_all()
  _logger.info('Weights in %s.', folder.model)


def _agree_upon_settings(step_config: StepConfig, **settings: Any) -> None:
  """Checks that all processes run the same program with the same settings."""
  if jax.process_count() == 1:
    return
  fields = {
      field.name: getattr(step_config, field.name)
      for field in dataclasses.fields(step_config)
  }
  agree({
      'program': program_digest(),
      **{
          name: json.dumps(describe(value))
          for name, value in {**fields, **settings}.items()
      },
  })


@dataclasses.dataclass(frozen=True)
class _Data:
  """What a run reads.

  Attributes:
    folder: of it.
    vocabulary: of the run.
    training: {objective name: endless examples}.
    validation: {objective name: examples}.
    fingerprints: {objective name: of the rows to train on}.
  """

  folder: str
  vocabulary: Vocabulary
  training: Mapping[str, Any]
  validation: Mapping[str, Any]
  fingerprints: Mapping[str, Any]


def _read_data(
    config: StepConfig, run_dir: str, data_dir: str, vocabulary_dir: str | None
) -> _Data:
  """Opens the data of a run, on every process alike.

  Raises:
    UserError: they are none for this model, or other data on some process.
  """
  objectives = config.objectives
  made = []
  if all(objective.reads != 'texts' for objective in objectives):
    # Of sources it makes a corpus, once.
    on_first_process(
        lambda: made.append(
            corpus_of(
                data_dir,
                f'{run_dir.rstrip("/")}.corpus',
                vocabulary_dir,
                config.model.vocab_size,
                any(objective.reads == 'pairs' for objective in objectives),
            )
        )
    )
  [folder] = as_first_process(made or [str(data_dir)])
  with failing_together():
    vocabulary = load_vocabulary(vocabulary_dir or f'{folder}/vocabulary')
    _check_vocabulary(vocabulary, config)
    fingerprints = {
        split: {
            o.name: data_fingerprint(o, folder, split, vocabulary)
            for o in objectives
        }
        for split in ('train', 'validation')
    }
    data = _Data(
        folder,
        vocabulary,
        {
            o.name: training_examples(o, folder, vocabulary, config.seed)
            for o in objectives
        },
        {
            o.name: evaluation_examples(o, folder, 'validation', vocabulary)
            for o in objectives
        },
        fingerprints['train'],
    )
  agree({'data': json.dumps([vocabulary.fingerprint, fingerprints])})
  return data


def _prepare_folder(
    folder: RunFolder,
    identity: Mapping[str, Any],
    vocabulary: Vocabulary,
    operative_config: Callable[[], str] | None,
    parts: Sequence[Mapping[str, Any]] | None,
) -> None:
  """Writes what describes the run.

  Args:
    folder: of the run, which this process has locked.
    identity: see `_identity`.
    vocabulary: of the run.
    operative_config: as for `train`.
    parts: what the model is made of, in a run that begins.

  Raises:
    UserError: the folder is that of another run, or cannot be written.
  """
  open_run_folder(
      folder.path,
      identity,
      may_differ=(
          'computation.remat_policy',
          'computation.scan_layers',
          'bad_steps',
      ),
  )
  if not folder.vocabulary.exists():
    vocabulary.save(folder.vocabulary)
  if operative_config is not None:
    write_result(folder.path / 'operative_config.gin', operative_config())
  if parts is not None:
    _logger.info('%s', format_parts(parts))
    write_result(folder.path / 'parts.json', {'parts': parts})


def _write_weights(
    folder: RunFolder,
    model: Any,
    state: TrainState,
    frozen: Frozen,
    init_from: Sequence[Any],
) -> None:
  """Writes the weights of a run that is complete; every process calls it."""
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
      model.vocab_size,
  )


def _microbatch_flops(train_step: TrainStep) -> dict[str, int]:
  """Model FLOPs of a micro-batch of each objective, the least possible."""
  config = train_step.config
  trained = flatten_dict(train_step.abstract_state.params, sep='/').keys()
  return {
      o.name: training_flops(
          config.model,
          o.passes(config.microbatch_rows(o)),
          trained,
          config.computation,
      ).least
      for o in config.objectives
  }


def _is_complete(folder: RunFolder) -> bool:
  """Whether the run's weights are there and whole, as process 0 finds.

  Raises:
    UserError: they cannot be read.
  """
  is_whole = False
  with failing_together():
    if jax.process_index() == 0 and folder.model.exists():
      try:
        verify(folder.model)
        is_whole = True
      except DamagedCheckpoint as error:
        _logger.warning(
            'The weights in %s are damaged: %s; they are written again.',
            folder.model,
            error.fault,
        )
  return as_first_process(is_whole)


def _evaluated_step(folder: RunFolder) -> int | None:
  """The step of the newest evaluation in the metrics; None without any."""
  steps = [
      row['step']
      for row in read_metrics(folder.metrics)
      if row['kind'] == 'evaluation'
  ]
  return max(steps, default=None)


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
  # An encoder alone reads none of these.
  if isinstance(model, BimodalConfig) and 'decoder' in model.head_counts():
    expected = model.match_id, model.text_decoder_id, model.code_decoder_id
    found = tokens.match, tokens.tdec, tokens.cdec
    if expected != found:
      raise UserError(
          f'expected the task tokens {expected} to match, to write text and to '
          f'write code, as the model has, found {found} in the vocabulary; set '
          f'match_id, text_decoder_id and code_decoder_id of the model'
      )


def _identity(
    config: StepConfig, train_steps: int, data: _Data
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
      'bad_steps',
  )
  return {
      **{field: getattr(config, field) for field in fields},
      'train_steps': train_steps,
      'vocabulary_fingerprint': data.vocabulary.fingerprint,
      'data_dir': data.folder,
      'data': data.fingerprints,
  }
