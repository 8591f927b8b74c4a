"""Bad steps: found and left out on the devices, told and counted on the host.

A step is bad if a loss or the norm of the gradients is not finite, or if a loss
is a spike. It changes nothing of the state but `step` and `health`, on all
hosts alike, for what decides is computed from sums over all of them. The
optimizer does not see it, so its schedule is late by one step afterwards.
"""

import dataclasses
import io
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from codet5p_jax.array_typing import Scalar, Tree
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.training.run_folder import RunFolder, write_result

_logger = logging.getLogger(__name__)

# Of the moving mean and variance: about the last 50 steps count.
DECAY = 0.98

# Parts of the mean. Losses that hardly vary would make a spike of any noise.
LEAST_DEVIATION = 0.01


@dataclasses.dataclass(frozen=True)
class BadSteps:
  """Which steps are left out, and how many of them end a run.

  The mean loss x of an objective in a step is a spike if the objective has had
  `spike_after` good steps or more and

      x > mean + spike_deviations * max(standard deviation, 0.01 |mean|)

  with the moving mean and variance over its good steps before. The n-th good
  step renews them with a weight w of max(0.02, 1 / n), so that they begin as
  plain averages: with d = x - mean, the mean grows by w d, and the variance
  becomes (1 - w) (variance + w d^2). Where a step holds several objectives, any
  of them makes it bad. An objective without a target in a step neither counts
  nor decides.

  Attributes:
    spike_deviations: a spike is so many standard deviations above the mean;
      None or 0 for no such rule.
    spike_after: good steps of an objective before its losses are compared.
    max_in_a_row: bad steps in a row that end the run.
  """

  spike_deviations: float | None = 6.0
  spike_after: int = 100
  max_in_a_row: int = 5

  def __post_init__(self):
    require_positive(
        spike_after=self.spike_after, max_in_a_row=self.max_in_a_row
    )
    if self.spike_deviations is not None and self.spike_deviations < 0:
      raise UserError(
          f'expected spike_deviations above 0, found {self.spike_deviations}; '
          f'set SPIKE_DEVIATIONS, to None for no spikes'
      )


def first_health(objectives: Iterable[str]) -> Tree:
  """What is remembered of the losses before the first step.

  Returns:
    `bad_in_a_row`, the bad steps up to now since the last good one, int32 [];
    and `losses`, {objective: {count, mean, variance}} of its good steps, int32
    and float32 []. All are 0.
  """
  return {
      'bad_in_a_row': jnp.zeros((), jnp.int32),
      'losses': {
          name: {
              'count': jnp.zeros((), jnp.int32),
              'mean': jnp.zeros(()),
              'variance': jnp.zeros(()),
          }
          for name in objectives
      },
  }


def judge_step(
    rule: BadSteps,
    health: Tree,
    losses: Mapping[str, tuple[Scalar, Scalar]],
    grad_norm: Scalar,
) -> tuple[Tree, dict[str, tuple[Scalar, Scalar]]]:
  """Decides whether a step is bad; part of the jitted step.

  Args:
    rule: see `BadSteps`.
    health: as `first_health` or this function returned it.
    losses: {objective: (sum, weight)}, of those that the step holds.
    grad_norm: of all gradients.

  Returns:
    The new health, whose `bad_in_a_row` is 0 if the step is good; and metrics
    as (sum, weight): `bad_steps`, 1 or 0, `bad_in_a_row`, and for every
    objective `loss_deviations`, how many standard deviations its loss lies
    above the mean, 0 where it is not compared.
  """
  one = jnp.ones(())
  is_good = jnp.isfinite(grad_norm)
  metrics, renewed = {}, {}
  for name, (total, weight) in losses.items():
    before = health['losses'][name]
    has_targets = weight != 0
    loss = total / jnp.where(has_targets, weight, 1.0)
    above = loss - before['mean']
    deviation = jnp.maximum(
        jnp.sqrt(before['variance']), LEAST_DEVIATION * jnp.abs(before['mean'])
    )
    deviations = jnp.where(
        has_targets & (before['count'] >= rule.spike_after),
        above / jnp.maximum(deviation, jnp.finfo(deviation.dtype).tiny),
        0.0,
    )
    metrics[f'{name}/loss_deviations'] = (deviations, one)
    is_good &= jnp.isfinite(loss)
    if rule.spike_deviations:
      is_good &= deviations <= rule.spike_deviations
    count = before['count'] + 1
    share = jnp.maximum(1 - DECAY, 1 / count)
    after = {
        'count': count,
        'mean': before['mean'] + share * above,
        'variance': (1 - share) * (before['variance'] + share * above**2),
    }
    renewed[name] = (has_targets, after)
  in_a_row = jnp.where(is_good, 0, health['bad_in_a_row'] + 1)
  metrics['bad_steps'] = (jnp.where(is_good, 0.0, 1.0), one)
  metrics['bad_in_a_row'] = (in_a_row.astype(jnp.float32), one)
  kept = {
      name: keep_unless(is_good & has_targets, after, health['losses'][name])
      for name, (has_targets, after) in renewed.items()
  }
  return (
      {'bad_in_a_row': in_a_row, 'losses': {**health['losses'], **kept}},
      metrics,
  )


def keep_unless(condition: jax.Array, new: Tree, old: Tree) -> Tree:
  """The old leaves, bit by bit, unless a condition [] holds."""
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def describe_fault(values: Mapping[str, float], rule: BadSteps) -> str:
  """Says why a step was bad, with the objective and the value.

  >>> describe_fault({'pairs/loss': 9.5, 'pairs/loss_deviations': 7.25,
  ...                 'grad_norm': 2.0}, BadSteps())
  'loss of pairs is 9.5, 7.2 standard deviations above the mean (6 are allowed)'

  Args:
    values: what `training.logging.means` made of the step's metrics.
    rule: that it broke.
  """
  names = [
      key.rpartition('/')[0] for key in values if key.endswith('/loss')
  ]
  for name in names:
    loss = values[f'{name}/loss']
    if not math.isfinite(loss):
      return f'loss of {name} is {loss}'
  if not math.isfinite(values['grad_norm']):
    return f'the norm of the gradients is {values["grad_norm"]}'
  worst = _find_spike(values, rule)
  if worst is None:  # The devices divide in float32, the host does not.
    return 'the sum of a loss, or its mean in float32, is not finite'
  return (
      f'loss of {worst} is {values[f"{worst}/loss"]:.5g}, '
      f'{values[f"{worst}/loss_deviations"]:.1f} standard deviations above the '
      f'mean ({rule.spike_deviations:g} are allowed)'
  )


def _find_spike(values: Mapping[str, float], rule: BadSteps) -> str | None:
  """The objective whose loss is the worst of the spikes; None without any."""
  suffix = '/loss_deviations'
  spikes = {
      key.removesuffix(suffix): value
      for key, value in values.items()
      if key.endswith(suffix) and value > (rule.spike_deviations or math.inf)
  }
  return max(spikes, key=spikes.__getitem__, default=None)


def check_step(
    step: int,
    values: Mapping[str, float],
    rule: BadSteps,
    folder: RunFolder,
    batch_at: Callable[[int], Mapping[str, Mapping[str, jax.Array]]],
    tell: Callable[..., None],
) -> None:
  """Tells of a step that was left out, and ends the run after too many.

  Every process calls it with the same values, so all end together.

  Args:
    step: updates made, this one included.
    values: what `training.logging.means` made of its metrics.
    rule: of the run.
    folder: of the run; the batch of the last step goes to `bad_steps/` in it.
    batch_at: `TrainBatches.at`; a step's batch is that of the updates before.
    tell: `Timeline.event`.

  Raises:
    UserError: it is the last of `max_in_a_row` bad steps in a row; names the
      step, the fault, the batch, and how to make the step again.
  """
  if not values['bad_steps']:
    return
  fault = describe_fault(values, rule)
  if jax.process_index() == 0:
    with logging_redirect_tqdm():
      _logger.warning('Step %d is left out: %s.', step, fault)
  tell('bad_step', step=step, fault=fault)
  in_a_row = int(values['bad_in_a_row'])
  if in_a_row < rule.max_in_a_row:
    return
  path = save_batch(folder, step, batch_at(step - 1))
  # A loss that is higher for good stays a spike, as no bad step moves the mean.
  allow = (
      ''
      if _find_spike(values, rule) is None
      else 'go on with a larger SPIKE_DEVIATIONS, or None for no such rule, or '
  )
  raise UserError(
      f'expected fewer than {rule.max_in_a_row} bad steps in a row, found '
      f'{in_a_row} up to step {step}, where {fault}; run `codet5p replay '
      f'--run_dir={folder.path} --step={step}` to tell bad hardware from bad '
      f'data (the batch is in {path}); if it is neither, {allow}lower '
      f'LEARNING_RATE in another RUN_DIR. The checkpoints written before are '
      f'whole'
  )


def save_batch(
    folder: RunFolder, step: int, batch: Mapping[str, Mapping[str, jax.Array]]
) -> Path:
  """Writes the rows that this process holds of a step's batch.

  Args:
    folder: of the run.
    step: updates made, with that of this batch.
    batch: {objective: {feature: [micro-batches, batch, ...]}}.

  Returns:
    The file, `bad_steps/<step>.npz`, or `<step>.process<i>.npz` where there are
    several processes: arrays by `<objective>/<feature>`.

  Raises:
    UserError: the disk is full or the folder not writable.
  """
  arrays = {
      f'{objective}/{feature}': _own_rows(array)
      for objective, features in batch.items()
      for feature, array in features.items()
  }
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  part = f'.process{jax.process_index()}' if jax.process_count() > 1 else ''
  path = folder.bad_steps / f'{step}{part}.npz'
  write_result(path, content.getvalue())
  return path


def _own_rows(array: jax.Array) -> np.ndarray:
  """The rows, axis 1, on this process's devices, each once and in order."""
  parts = {
      shard.index[1].indices(array.shape[1])[0]: shard.data
      for shard in array.addressable_shards
  }
  return np.concatenate([parts[first] for first in sorted(parts)], axis=1)
