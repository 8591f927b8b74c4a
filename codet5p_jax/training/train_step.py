"""The train step: made once, for training, tests and ahead-of-time compiles.

A step takes one batch per objective, cut into micro-batches, and makes one
update from the mean loss over all their target tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codet5p_jax.array_typing import Tree
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.layers import quantization
from codet5p_jax.models.computation import Computation
from codet5p_jax.sharding import (
    BATCH_AXES,
    DEFAULT_RULES,
    Rules,
    activation_sharding,
    batch_axes_size,
    tree_shardings,
)
from codet5p_jax.training.accumulation import accumulate
from codet5p_jax.training.objective import (
    Batch,
    Metrics,
    Objective,
    StepBatch,
)
from codet5p_jax.training.partition import merge_params, partition_params
from codet5p_jax.training.step_health import (
    BadSteps,
    first_health,
    judge_step,
    keep_unless,
)


@flax.struct.dataclass
class TrainState:
  """Everything a step reads and renews.

  Attributes:
    step: updates made so far, and those that were left out.
    params: the trainable parameters, float32.
    frozen_params: the others; no gradient, no optimizer slot. Stored in the
      configuration's `frozen_dtype`, see layers/quantization.py.
    opt_state: of the trainable parameters only.
    objective_state: {objective name: its state}.
    health: what is remembered of the losses, see training/step_health.py.

  The last three are None where a model is only used.
  """

  step: Tree
  params: Tree
  frozen_params: Tree
  opt_state: Tree
  objective_state: Tree
  health: Tree = flax.struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """All that decides what a step computes.

  Attributes:
    model: configuration of the network.
    computation: how the network is computed.
    objectives: those trained together; none for a model that is only used.
    optimizer: see training/optimizers.py.
    batch_size: rows of a step, over all devices and micro-batches; an
      objective may multiply them by its `batch_scale`.
    num_microbatches: parts into which a step's rows are cut to save memory.
      Each holds one objective. One part: objectives take turns, each with its
      own mean. Several: the mean is over the target tokens of all, so those
      with more of them weigh more.
    trainable: patterns of parameter paths, see `partition_params`.
    frozen_dtype: of the other parameters: "float32", "bfloat16" or "int8".
    seed: of initial weights, data order and dropout.
    mesh_shape: (replica, data, model), one of them may be -1.
    rules: logical axis names to mesh axes.
    bad_steps: which steps change nothing.
  """

  model: Any
  objectives: Sequence[Any]
  optimizer: Any
  batch_size: int
  num_microbatches: int = 1
  trainable: Sequence[str] = ('.*',)
  frozen_dtype: str = 'bfloat16'
  seed: int = 0
  computation: Computation = Computation()
  mesh_shape: Sequence[int] = (1, -1, 1)
  rules: Rules = DEFAULT_RULES
  bad_steps: BadSteps = BadSteps()

  def __post_init__(self):
    # gin gives lists where tuples are written as lists.
    for field in ('objectives', 'trainable', 'mesh_shape'):
      object.__setattr__(self, field, tuple(getattr(self, field)))
    names = [objective.name for objective in self.objectives]
    if len(set(names)) != len(names):
      raise UserError(
          f'expected objectives with names of their own, found {names}; mend '
          f'OBJECTIVES'
      )
    if min((o.first_step for o in self.objectives), default=0):
      raise UserError(
          f'expected an objective that is trained from step 0 on, found that '
          f'the first of {", ".join(names)} starts later; set the first_step '
          f'of one to 0'
      )
    require_positive(
        batch_size=self.batch_size, num_microbatches=self.num_microbatches
    )
    if self.batch_size % self.num_microbatches:
      raise UserError(
          f'expected a batch size that the number of micro-batches divides, '
          f'found {self.batch_size} and {self.num_microbatches}; mend '
          f'BATCH_SIZE or NUM_MICROBATCHES'
      )
    if self.frozen_dtype not in quantization.FROZEN_DTYPES:
      raise UserError(
          f'expected a frozen_dtype among '
          f'{", ".join(quantization.FROZEN_DTYPES)}, found '
          f'{self.frozen_dtype!r}; set FROZEN_DTYPE'
      )
    for objective in self.objectives:
      objective.check_model(self.model)
      if self.num_microbatches > 1 and not objective.accumulates:
        raise UserError(
            f'expected one micro-batch with {objective.name}, whose rows are '
            f'compared with each other, found {self.num_microbatches}; set '
            f'NUM_MICROBATCHES=1, and to save memory REMAT_POLICY=full or more '
            f'devices'
        )

  @property
  def microbatch_size(self) -> int:
    return self.batch_size // self.num_microbatches

  def microbatch_rows(self, objective: Objective) -> int:
    """Rows of an objective's micro-batches."""
    return self.microbatch_size * objective.batch_scale


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """A compiled step and what is needed to call it.

  Attributes:
    config: what it was made from.
    mesh: the devices.
    model: the network.
    init: (given) -> TrainState on the mesh. `given`, {path: array}, are
      parameters in the form of `abstract_state`: they go into the state as
      they are and are consumed. Only the others are drawn.
    step: (TrainState, StepBatch) -> (TrainState, Metrics); the state passed in
      is consumed. A bad step changes nothing but `step` and `health`. Not for a
      model that is only used.
    gradients: (TrainState, StepBatch) -> (mean gradients, Metrics), as in
      `step`; nothing is consumed.
    evaluate: (params, frozen_params, {feature: [batch, ...]}, objective) ->
      Metrics, without dropout.
    abstract_state: shapes, dtypes and shardings of the state.
    axis_names: logical names of the axes of every parameter, by path.
    batch_sharding: of every feature [micro-batches, batch, ...].
    evaluation_sharding: of every feature [batch, ...] of an evaluation batch.
  """

  config: StepConfig
  mesh: Mesh
  model: nn.Module
  init: Callable[..., TrainState]
  step: Callable[[TrainState, StepBatch], tuple[TrainState, Metrics]]
  gradients: Callable[[TrainState, StepBatch], tuple[Tree, Metrics]]
  evaluate: Callable[[Tree, Tree, Batch, Objective], Metrics]
  abstract_state: TrainState
  axis_names: Mapping[str, tuple[str | None, ...]]
  batch_sharding: NamedSharding
  evaluation_sharding: NamedSharding


def make_train_step(
    config: StepConfig, mesh: Mesh, is_trained: bool = True
) -> TrainStep:
  """Builds the step of a configuration on a mesh; allocates nothing.

  Args:
    config: of the step.
    mesh: the devices.
    is_trained: False for a model that is only used: its state is parameters
      alone. So an evaluation may have batches that training could not have.

  Raises:
    UserError: the mesh divides the batch or the model's heads unevenly.
  """
  _check_divisible(config, mesh)
  model = config.model.make_model(config.computation)
  optimizer = config.optimizer.make()

  def draw() -> Tree:
    return model.init_params(jax.random.key(config.seed))

  names = _axis_names(draw)
  init = _make_init(config, optimizer if is_trained else None, draw, names)
  shapes = jax.eval_shape(init, {})
  state_shardings = _state_shardings(shapes, names, config, mesh)
  abstract_state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      state_shardings,
  )
  compiled_init = jax.jit(init, out_shardings=state_shardings, donate_argnums=0)

  def checked_init(given: Mapping[str, jax.Array] = {}) -> TrainState:
    _check_given(given, abstract_state)
    return compiled_init(dict(given))

  batch_sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
  evaluation_sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  replicated = NamedSharding(mesh, PartitionSpec())

  def loss_sum(params, frozen, objective, state, batch, key):
    return objective.loss(
        model, merge_params(params, frozen), state, batch, key
    )

  measure = _make_measure(config, mesh, loss_sum)

  def evaluate(params, frozen, batch, objective):
    with activation_sharding(mesh, config.rules):
      loss, output = loss_sum(params, frozen, objective, {}, batch, None)
    return output.with_loss(loss)

  return TrainStep(
      config=config,
      mesh=mesh,
      model=model,
      init=checked_init,
      step=jax.jit(
          _make_step(measure, optimizer),
          in_shardings=(state_shardings, batch_sharding),
          out_shardings=(state_shardings, replicated),
          donate_argnums=0,
      ),
      gradients=jax.jit(
          lambda state, batches: measure(state, batches)[:2],
          in_shardings=(state_shardings, batch_sharding),
          out_shardings=(state_shardings.params, replicated),
      ),
      evaluate=jax.jit(
          evaluate,
          in_shardings=(
              state_shardings.params,
              state_shardings.frozen_params,
              evaluation_sharding,
          ),
          out_shardings=replicated,
          static_argnums=3,
      ),
      abstract_state=abstract_state,
      axis_names=names,
      batch_sharding=batch_sharding,
      evaluation_sharding=evaluation_sharding,
  )


def _make_init(
    config: StepConfig,
    optimizer: optax.GradientTransformation | None,
    draw: Callable[[], Tree],
    names: Mapping[str, tuple[str | None, ...]],
) -> Callable[[Mapping[str, jax.Array]], TrainState]:
  """`TrainStep.init` before it is compiled; with None nothing is trained."""

  def init(given: Mapping[str, jax.Array]) -> TrainState:
    # Of what is given, nothing is drawn: JAX drops what no result needs.
    params, frozen = partition_params(nn.unbox(draw()), config.trainable)
    frozen = _store_frozen(frozen, names, config.frozen_dtype)
    params, frozen = (_replace(tree, given) for tree in (params, frozen))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen_params=frozen,
        opt_state=None,
        objective_state=None,
        health=None,
    )
    if optimizer is None:
      return state
    everything = merge_params(params, frozen)
    return state.replace(
        opt_state=optimizer.init(params),
        objective_state={
            objective.name: objective.init_state(
                everything, config.microbatch_rows(objective)
            )
            for objective in config.objectives
        },
        health=first_health(o.name for o in config.objectives),
    )

  return init


def _make_measure(
    config: StepConfig, mesh: Mesh, loss_sum: Callable
) -> Callable[[TrainState, StepBatch], tuple[Tree, Metrics, Tree, Tree]]:
  """A step up to the optimizer, not compiled.

  Returns:
    A function that gives mean gradients, metrics, the new objective state, and
    the new health, which tells whether the step is bad. `loss_sum` is as in
    `accumulate`.
  """
  objectives = {o.name: o for o in config.objectives}

  def measure(state: TrainState, batches: StepBatch):
    with activation_sharding(mesh, config.rules):
      grads, total, metrics, objective_state = accumulate(
          loss_sum, state, batches, objectives, config
      )
    # Means of nothing are 0, not NaN: a batch may hold no target at all.
    grads = jax.tree.map(lambda g: g / jnp.maximum(total, 1.0), grads)
    grad_norm = optax.tree.norm(grads)
    losses = {name: metrics[f'{name}/loss'] for name in batches}
    health, judged = judge_step(
        config.bad_steps, state.health, losses, grad_norm
    )
    metrics |= {'grad_norm': (grad_norm, jnp.ones(())), **judged}
    return grads, metrics, objective_state, health

  return measure


def _make_step(
    measure: Callable, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, StepBatch], tuple[TrainState, Metrics]]:
  """`TrainStep.step` before it is compiled."""

  def step(state: TrainState, batches: StepBatch):
    grads, metrics, objective_state, health = measure(state, batches)
    updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params
    )
    new = (
        optax.apply_updates(state.params, updates), opt_state, objective_state
    )  # fmt: skip
    old = (state.params, state.opt_state, state.objective_state)
    # Every entry of the new state depends on the old one anyway, so choosing
    # between them needs no memory.
    params, opt_state, objective_state = keep_unless(
        health['bad_in_a_row'] == 0, new, old
    )
    return (
        TrainState(
            step=state.step + 1,
            params=params,
            frozen_params=state.frozen_params,
            opt_state=opt_state,
            objective_state=objective_state,
            health=health,
        ),
        metrics,
    )

  return step


def step_batch_spec(
    config: StepConfig, train_step: TrainStep, counts: Mapping[str, int]
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """Shapes of a step's batches, for compiling ahead of time.

  Args:
    config: of the step.
    train_step: made from it.
    counts: micro-batches of each objective, see `microbatch_counts`.
  """
  return {
      objective.name: {
          name: jax.ShapeDtypeStruct(
              (counts[objective.name], *spec.shape),
              spec.dtype,
              sharding=train_step.batch_sharding,
          )
          for name, spec in objective.batch_spec(
              config.microbatch_rows(objective)
          ).items()
      }
      for objective in config.objectives
      if objective.name in counts
  }


def microbatch_counts(config: StepConfig, step: int) -> dict[str, int]:
  """How many micro-batches of each objective a step holds: f(seed, step).

  Systematic sampling: one random number places the step's micro-batches at
  equal distances on a circle that the objectives share by their rates. So over
  many steps every objective gets its share, and within a step the micro-batches
  cycle through the objectives, each within one of its share. Only objectives
  whose first step has come take part.
  """
  objectives = [o for o in config.objectives if o.first_step <= step]
  rates = np.array([o.rate for o in objectives], np.float64)
  start = np.random.default_rng((config.seed, step)).random()
  num_microbatches = config.num_microbatches
  places = (start + np.arange(num_microbatches)) / num_microbatches
  borders = np.cumsum(rates / rates.sum())[:-1]
  drawn = np.searchsorted(borders, places, side='right')
  return {
      objective.name: int(np.sum(drawn == index))
      for index, objective in enumerate(objectives)
      if index in drawn
  }


def _axis_names(draw: Callable[[], Tree]) -> dict[str, tuple[str | None, ...]]:
  """Logical axis names of every parameter, by path."""
  specs = nn.get_partition_spec(jax.eval_shape(draw))
  return {
      path: tuple(spec)
      for path, spec in flax.traverse_util.flatten_dict(specs, sep='/').items()
  }


def _store_frozen(
    frozen: Tree, names: Mapping[str, tuple[str | None, ...]], dtype: str
) -> Tree:
  """The form in which frozen parameters are kept."""
  stored: dict[str, jax.Array] = {}
  for path, leaf in flax.traverse_util.flatten_dict(frozen, sep='/').items():
    stored |= quantization.store(path, leaf, names[path], dtype)
  return flax.traverse_util.unflatten_dict(stored, sep='/')


def _replace(params: Tree, given: Mapping[str, jax.Array]) -> Tree:
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  return flax.traverse_util.unflatten_dict(
      {path: given.get(path, leaf) for path, leaf in flat.items()}, sep='/'
  )


def _check_given(
    given: Mapping[str, jax.Array], abstract_state: TrainState
) -> None:
  """Parameters that are given must have the form that the state keeps."""
  expected = flax.traverse_util.flatten_dict(
      merge_params(abstract_state.params, abstract_state.frozen_params),
      sep='/',
  )
  for path, array in given.items():
    if path not in expected:
      raise ValueError(f'{path} is no parameter of the state')
    leaf = expected[path]
    if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
      raise ValueError(
          f'{path} is {array.dtype}{array.shape}, but the state keeps '
          f'{leaf.dtype}{leaf.shape}'
      )
    scale = f'{path}_scale'
    if scale in expected and scale not in given:
      raise ValueError(f'{path} is given without {scale}')


def _state_shardings(
    state: TrainState,
    names: Mapping[str, tuple[str | None, ...]],
    config: StepConfig,
    mesh: Mesh,
) -> TrainState:
  """Shardings of the state: slots are placed as their parameters are."""

  # Frozen kernels may have scales beside them, whose names follow.
  stored = {}
  for path, axes in names.items():
    stored |= quantization.stored_names(path, axes, config.frozen_dtype)
  paths = flax.traverse_util.flatten_dict(
      merge_params(state.params, state.frozen_params), sep='/'
  )

  def shardings(params):
    flat = flax.traverse_util.flatten_dict(params, sep='/')
    flat = {path: stored[path] for path in flat}
    return flax.traverse_util.unflatten_dict(
        tree_shardings(flat, mesh, config.rules), sep='/'
    )

  params, frozen = shardings(state.params), shardings(state.frozen_params)
  _check_parameters_divide(
      merge_params(state.params, state.frozen_params),
      merge_params(params, frozen),
      mesh,
  )
  replicated = NamedSharding(mesh, PartitionSpec())
  by_path = flax.traverse_util.flatten_dict(params, sep='/')

  def slot(path, leaf):
    # An optimizer's slot carries its parameter's path at the end of its own.
    keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
    return by_path.get('/'.join(map(str, keys)), replicated)

  return TrainState(
      step=replicated,
      params=params,
      frozen_params=frozen,
      opt_state=jax.tree_util.tree_map_with_path(slot, state.opt_state),
      objective_state=None if state.objective_state is None else {
          objective.name: tree_shardings(
              objective.state_axes({path: stored[path] for path in paths}),
              mesh,
              config.rules,
          )
          for objective in config.objectives
      },
      health=jax.tree.map(lambda _: replicated, state.health),
  )


def _check_divisible(config: StepConfig, mesh: Mesh) -> None:
  shards = batch_axes_size(mesh)
  if config.objectives and config.microbatch_size % shards:
    lower = config.batch_size // (shards * config.num_microbatches)
    suggestion = max(lower, 1) * shards * config.num_microbatches
    raise UserError(
        f'batch size {config.batch_size} in {config.num_microbatches} '
        f'micro-batches is not divisible by the {shards} shards of the '
        f"mesh's replica * data axes; set BATCH_SIZE={suggestion}, or change "
        f'MESH_SHAPE'
    )
  model_shards = mesh.shape['model']
  for part, heads in config.model.head_counts().items():
    if heads % model_shards:
      raise UserError(
          f"the mesh's model axis of {model_shards} does not divide the "
          f"model's {heads} heads ({part}); set MESH_SHAPE so that it does"
      )


def _check_parameters_divide(shapes: Tree, shardings: Tree, mesh: Mesh) -> None:
  def check(path, leaf, sharding):
    for size, axis in zip(leaf.shape, sharding.spec):
      shards = 1 if axis is None else mesh.shape[axis]
      if size % shards:
        name = '/'.join(key.key for key in path)
        raise UserError(
            f"expected the mesh's {axis} axis to divide {name}, found {shards} "
            f'shards of an axis of {size}; set MESH_SHAPE so that it does'
        )

  jax.tree_util.tree_map_with_path(check, shapes, shardings)
