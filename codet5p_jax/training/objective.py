"""What an objective is: how data become examples, and batches losses."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from codet5p_jax.array_typing import PRNGKey, Scalar, Tree
from codet5p_jax.models.computation import Pass

Axes = tuple[str | None, ...]
# Arrays of one objective, or their shapes: {feature: [batch, ...]}.
Batch = Mapping[str, Any]
# {objective name: {feature: [micro-batches, batch, ...]}}.
StepBatch = Mapping[str, Batch]
# {name: (sum, weight)}: a mean is taken only when it is logged. `tokens` have
# no weight: they are a sum.
Metrics = dict[str, tuple[Scalar, Scalar]]


@flax.struct.dataclass
class ObjectiveOutput:
  """What a loss returns beside its sum.

  Attributes:
    weight: sum of the weights over which the loss is averaged.
    tokens: number of target tokens.
    metrics: {name: (sum, weight)}.
    state: the objective's state after this batch.
  """

  weight: Scalar
  tokens: Scalar
  metrics: Metrics
  state: Tree

  def with_loss(self, loss: Scalar) -> Metrics:
    """All metrics: the loss too, and `tokens`, a sum and no mean: weight 0."""
    return {
        'loss': (loss, self.weight),
        'tokens': (self.tokens, jnp.zeros(())),
        **self.metrics,
    }


@runtime_checkable
class Objective(Protocol):
  """How data become examples, what a batch holds, how it becomes a loss.

  Attributes:
    name: under which its batches, metrics and state are kept.
    rate: how often it is drawn, relative to the other objectives.
    first_step: the step from which on it is drawn; 0 for the whole run.
    batch_scale: rows of its micro-batches, in multiples of the run's.
    reads: what its data is: 'texts', files of its own kind, or the 'tokens' or
      'pairs' of a corpus folder.
    accumulates: whether its loss is a sum over rows, so that a batch may be
      cut into micro-batches.
  """

  name: str
  rate: float
  first_step: int
  batch_scale: int
  reads: str
  accumulates: bool

  def rows(self, data_dir: str, split: str, vocabulary: Any) -> Sequence[Any]:
    """The data of a split, by index; an example is made of each row."""

  def example(
      self, row: Any, generator: np.random.Generator, vocabulary: Any
  ) -> dict[str, np.ndarray]:
    """Makes an example: one row of a batch, {feature: [...]}."""

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch, from configuration alone."""

  def check_model(self, model: Any) -> None:
    """Raises a UserError where a model's configuration does not suit it."""

  def passes(self, batch_size: int) -> Sequence[Pass]:
    """The uses that a batch makes of the network, to count their work."""

  def init_state(self, params: Tree, batch_size: int) -> Tree:
    """State that gradients do not train, such as a queue; often {}."""

  def state_axes(self, parameter_axes: Mapping[str, Axes]) -> Tree:
    """Logical names of the axes of the state, in its structure.

    Args:
      parameter_axes: those of the parameters of `init_state`, by path.
    """

  def loss(
      self,
      model: nn.Module,
      params: Tree,
      state: Tree,
      batch: Batch,
      key: PRNGKey | None,
  ) -> tuple[Scalar, ObjectiveOutput]:
    """Returns the sum of losses.

    In an evaluation, `key` is None, `state` is {}, nothing is random, and the
    new state is looked at by nobody.
    """
