"""The optimizer: AdamW, linear warm-up and decay, clipping."""

import dataclasses

import jax
import optax

from codet5p_jax.array_typing import Tree
from codet5p_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class AdamW:
  """AdamW as CodeT5+ is trained with (paper, section 4.2; the rest by choice).

  Attributes:
    peak_learning_rate: reached at the end of the warm-up.
    warmup_steps: of linear rise from 0.
    decay_steps: step at which the linear decay reaches 0, the warm-up
      included; the run's number of steps.
    weight_decay: of matrices; norms, biases and a temperature are not decayed.
    beta1: of the first moment.
    beta2: of the second moment.
    epsilon: added to the root of the second moment.
    max_grad_norm: gradients are scaled down to this global norm.
  """

  peak_learning_rate: float
  warmup_steps: int
  decay_steps: int
  weight_decay: float
  beta1: float = 0.9
  beta2: float = 0.999
  epsilon: float = 1e-8
  max_grad_norm: float = 1.0

  def __post_init__(self):
    if self.warmup_steps >= self.decay_steps:
      raise UserError(
          f'expected fewer warm-up steps than training steps; found '
          f'{self.warmup_steps} and {self.decay_steps}; lower WARMUP_STEPS or '
          f'raise TRAIN_STEPS'
      )

  def schedule(self) -> optax.Schedule:
    """Learning rate as a function of the number of updates made so far."""
    return optax.join_schedules(
        [
            # The first update already moves: step 0 is one part of the rise.
            optax.linear_schedule(
                self.peak_learning_rate / max(self.warmup_steps, 1),
                self.peak_learning_rate,
                max(self.warmup_steps - 1, 1),
            ),
            optax.linear_schedule(
                self.peak_learning_rate,
                0.0,
                self.decay_steps - self.warmup_steps,
            ),
        ],
        [self.warmup_steps],
    )

  def make(self) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(self.max_grad_norm),
        optax.adamw(
            self.schedule(),
            self.beta1,
            self.beta2,
            self.epsilon,
            weight_decay=self.weight_decay,
            mask=_is_decayed,
        ),
    )


def _is_decayed(params: Tree) -> Tree:
  """Decays all but norm scales and biases, as is usual for transformers.

  A `value`, such as the temperature, has no reason to be near 0 either.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key not in ('scale', 'bias', 'value'), params
  )


@dataclasses.dataclass(frozen=True)
class SGD:
  """Plain gradient descent, for checks that AdamW's division would blur.

  Attributes:
    learning_rate: constant.
  """

  learning_rate: float

  def schedule(self) -> optax.Schedule:
    return optax.constant_schedule(self.learning_rate)

  def make(self) -> optax.GradientTransformation:
    return optax.sgd(self.learning_rate)
