"""The folder of a run, or of a converted model, back to a model to use."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from codet5p_jax.array_typing import Tree
from codet5p_jax.conversion.init_from import FRESH, plan_initialisation
from codet5p_jax.conversion.sources import open_source
from codet5p_jax.data.vocabularies import Vocabulary, load_vocabulary
from codet5p_jax.decoding.prefill import decoding_params
from codet5p_jax.errors import UserError
from codet5p_jax.initialisation import frozen_paths, load_given
from codet5p_jax.models.computation import Computation
from codet5p_jax.sharding import DECODING_RULES, make_mesh
from codet5p_jax.storage import local_path
from codet5p_jax.training.checkpoints.fingerprint import join_digests
from codet5p_jax.training.checkpoints.layout import nest, stack_leaves
from codet5p_jax.training.checkpoints.restore import abstract_leaves
from codet5p_jax.training.checkpoints.weights import SavedWeights
from codet5p_jax.training.optimizers import SGD
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
    dtype: str | None = None,
    init_from: Sequence[Any] | None = None,
    to_generate: bool = False,
) -> TrainedModel:
  """Reads a run folder: its weights, else those of its newest checkpoint.

  Args:
    run_dir: the run's folder, or one that `convert` made.
    mesh_shape: on which the weights are spread.
    batch_size: of evaluations; by default the run's micro-batch.
    dtype: of the computation; by default the run's, and float32 for a
      converted model, whose weights are held in it as well.
    init_from: where the weights lie that the run started from and left frozen,
      if they were moved; see conversion/init_from.py. Not looked at where
      nothing is frozen.
    to_generate: hold the weights as generating needs them: layers of their
      own, spread for it, in the dtypes of `decoding_params`.

  Raises:
    UserError: the folder is none of a run, holds no weights, or is damaged; or
      what is frozen is not what the run was trained with.
  """
  folder = RunFolder(local_path(run_dir))
  config = rebuild(read_config(run_dir))
  step_config = _step_config(config, tuple(mesh_shape), batch_size, dtype)
  if to_generate:
    step_config = dataclasses.replace(
        step_config,
        rules=DECODING_RULES,
        computation=dataclasses.replace(
            step_config.computation, scan_layers=False
        ),
    )
  vocabulary = load_own_vocabulary(folder, config)
  train_step = make_train_step(
      step_config, make_mesh(mesh_shape), is_trained=False
  )
  if folder.model.exists():
    params, frozen, step = _from_weights(folder, train_step, init_from, config)
  else:
    params, frozen, step = _from_checkpoint(folder, train_step, init_from)
  if to_generate:
    dtype = step_config.computation.dtype
    params = decoding_params(params, dtype)
    frozen = decoding_params(frozen, dtype)
  return TrainedModel(
      folder, config, train_step, vocabulary, params, frozen, step
  )


def load_own_vocabulary(
    folder: RunFolder, config: Mapping[str, Any]
) -> Vocabulary:
  """Reads the vocabulary in a run folder.

  Raises:
    UserError: it is not the one that config.json tells of.
  """
  vocabulary = load_vocabulary(folder.vocabulary)
  if vocabulary.fingerprint != config['vocabulary_fingerprint']:
    raise UserError(
        f'expected in {folder.vocabulary} the vocabulary that the run was '
        f'trained with ({config["vocabulary_fingerprint"][:16]}), found '
        f'another ({vocabulary.fingerprint[:16]}); put back its own'
    )
  return vocabulary


def step_settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of StepConfig among those of config.json; a run has all."""
  fields = {field.name for field in dataclasses.fields(StepConfig)}
  return {name: value for name, value in config.items() if name in fields}


def _step_config(
    config: Mapping[str, Any],
    mesh_shape: tuple[int, ...],
    batch_size: int | None,
    dtype: str | None,
) -> StepConfig:
  values = step_settings(config)
  if 'objectives' not in values:  # A converted model was trained elsewhere.
    values |= {
        'objectives': (),
        'optimizer': SGD(0.0),
        'batch_size': 1,
        'computation': Computation(dtype='float32'),
    }
  step_config = StepConfig(**values)
  computation = step_config.computation
  if dtype is not None:
    computation = dataclasses.replace(computation, dtype=dtype)
  return dataclasses.replace(
      step_config,
      batch_size=batch_size or step_config.microbatch_size,
      num_microbatches=1,
      mesh_shape=mesh_shape,
      computation=computation,
  )


def _from_weights(
    folder: RunFolder,
    train_step: TrainStep,
    init_from: Sequence[Any] | None,
    config: Mapping[str, Any],
) -> tuple[Tree, Tree, int]:
  saved, state = SavedWeights(folder.model), train_step.abstract_state
  if digests := saved.metadata.get('frozen_digests'):
    frozen, found = _load_frozen(
        train_step,
        saved.metadata['init_from'] if init_from is None else init_from,
        digests,
    )
    params = stack_leaves(
        saved.restore(abstract_leaves(state.params)), state.params
    )
    return params, frozen, saved.metadata['step']
  everything = merge_params(state.params, state.frozen_params)
  if 'objectives' not in config:
    # To be used, not trained: half the memory where bfloat16 is asked for.
    dtype = train_step.config.computation.dtype
    everything = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
        everything,
    )
  everything = stack_leaves(
      saved.restore(abstract_leaves(everything)), everything
  )
  params, frozen = partition_params(everything, train_step.config.trainable)
  return params, frozen, saved.metadata['step']


def _load_frozen(
    train_step: TrainStep,
    init_from: Sequence[Any],
    expected: Mapping[str, str] | None = None,
) -> tuple[Tree, dict[str, str]]:
  """The frozen parameters of a run, and the digest of each.

  Args:
    train_step: of the run.
    init_from: where they lie.
    expected: their digests, if they are known.
  """
  abstract = train_step.abstract_state.frozen_params
  needed = frozen_paths(abstract)
  initialisation = plan_initialisation(
      init_from, train_step.config.model, open_source, needed
  )
  initialisation.require_known(needed)
  given, digests = load_given(
      initialisation, abstract, train_step.axis_names
  )
  if expected is not None:
    initialisation.require_digests(expected, digests)
  return nest(given), digests


def _from_checkpoint(
    folder: RunFolder, train_step: TrainStep, init_from: Sequence[Any] | None
) -> tuple[Tree, Tree, int]:
  from codet5p_jax.training.checkpoints.save import Checkpoints

  target, fingerprint = train_step.abstract_state, None
  with Checkpoints(folder.checkpoints) as saved:
    if jax.tree.leaves(target.frozen_params) and saved.steps():
      if init_from is None:
        init_from = saved.metadata(saved.latest_step())['init_from']
      if not any(entry[0] != FRESH for entry in init_from):
        raise UserError(
            f'expected the weights of a finished run in {folder.model}, found '
            f'none, and checkpoints hold no frozen parameters; let the run '
            f'finish'
        )
      frozen, digests = _load_frozen(train_step, init_from)
      fingerprint = join_digests(digests.items())
      target = dataclasses.replace(target, frozen_params=frozen)
    state, _, _ = saved.restore(None, target, frozen_fingerprint=fingerprint)
  return state.params, state.frozen_params, int(state.step)
