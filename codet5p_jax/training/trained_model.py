"""A run folder back to a model that can be used; no gin needed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from codet5p_jax.array_typing import Tree
from codet5p_jax.data.vocabularies import Vocabulary, load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.sharding import make_mesh
from codet5p_jax.storage import local_path
from codet5p_jax.training.checkpoints.weights import load_weights
from codet5p_jax.training.partition import merge_params, partition_params
from codet5p_jax.training.run_folder import RunFolder, read_config, rebuild
from codet5p_jax.training.train_step import (
    StepConfig,
    TrainStep,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """What a run made.

  Attributes:
    folder: of the run.
    config: config.json, rebuilt.
    train_step: the run's step, on this machine's mesh.
    vocabulary: the run's own.
    params: the trainable parameters.
    frozen_params: the others.
    step: updates the weights have seen.
  """

  folder: RunFolder
  config: dict[str, Any]
  train_step: TrainStep
  vocabulary: Vocabulary
  params: Tree
  frozen_params: Tree
  step: int

  @property
  def all_params(self) -> Tree:
    return merge_params(self.params, self.frozen_params)


def load_trained_model(
    run_dir: str,
    mesh_shape: Sequence[int] = (1, -1, 1),
    batch_size: int | None = None,
) -> TrainedModel:
  """Reads a run folder: its weights, else those of its newest checkpoint.

  Args:
    run_dir: the run's folder.
    mesh_shape: on which the weights are spread.
    batch_size: of evaluations; by default the run's micro-batch.

  Raises:
    UserError: the folder is none of a run, holds no weights, or is damaged.
  """
  folder = RunFolder(local_path(run_dir))
  config = rebuild(read_config(run_dir))
  fields = {field.name for field in dataclasses.fields(StepConfig)}
  step_config = StepConfig(
      **{name: value for name, value in config.items() if name in fields}
  )
  step_config = dataclasses.replace(
      step_config,
      batch_size=batch_size or step_config.microbatch_size,
      num_microbatches=1,
      mesh_shape=tuple(mesh_shape),
  )
  vocabulary = load_vocabulary(folder.vocabulary)
  if vocabulary.fingerprint != config['vocabulary_fingerprint']:
    raise UserError(
        f'expected in {folder.vocabulary} the vocabulary that the run was '
        f'trained with ({config["vocabulary_fingerprint"][:16]}), found '
        f'another ({vocabulary.fingerprint[:16]}); put back its own'
    )
  train_step = make_train_step(step_config, make_mesh(mesh_shape))
  state = train_step.abstract_state
  if folder.model.exists():
    target = merge_params(state.params, state.frozen_params)
    params, metadata = load_weights(folder.model, target)
    trainable, frozen = partition_params(params, step_config.trainable)
    step = metadata['step']
  else:
    trainable, frozen, step = _from_checkpoint(folder, train_step)
  return TrainedModel(
      folder, config, train_step, vocabulary, trainable, frozen, step
  )


def _from_checkpoint(
    folder: RunFolder, train_step: TrainStep
) -> tuple[Tree, Tree, int]:
  from codet5p_jax.training.checkpoints.save import Checkpoints

  if train_step.abstract_state.frozen_params:
    raise UserError(
        f'expected the weights of a finished run in {folder.model}, found '
        f'none, and checkpoints hold no frozen parameters; let the run finish'
    )
  with Checkpoints(folder.checkpoints) as saved:
    state, _, _ = saved.restore(None, train_step.abstract_state)
  return state.params, state.frozen_params, int(state.step)
