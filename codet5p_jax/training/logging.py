"""What a run tells: metrics.jsonl, TensorBoard, and a progress bar."""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from codet5p_jax.errors import UserError
from codet5p_jax.training.run_folder import RunFolder, append_metrics
from codet5p_jax.training.train_step import Metrics

_logger = logging.getLogger(__name__)


class RunLog:
  """Writes a run's metrics; owns the open event file and the progress bar.

  A row of metrics.jsonl is a JSON object:
    step                updates made
    kind                "train" or "evaluation"
    <objective>/loss    mean negative log-likelihood of a target token, nats
    <objective>/accuracy   share of target tokens that were the likeliest
    <objective>/tokens  target tokens of this step (of the evaluation)
    grad_norm           global norm of the gradients, before clipping
    learning_rate       of this step
    target_tokens_per_second   since the row before
    input_wait_seconds  waited for input since the start of this process
  Losses are those of the very step, so a resumed run repeats them exactly.
  """

  def __init__(self, folder: RunFolder, first_step: int, last_step: int):
    from tensorboardX import SummaryWriter

    self._path = folder.metrics
    self._is_writer = jax.process_index() == 0
    if self._is_writer:
      self._events = SummaryWriter(str(folder.events), purge_step=first_step)
    self._bar = tqdm.tqdm(
        total=last_step,
        initial=first_step,
        desc='training',
        unit=' steps',
        dynamic_ncols=True,
        mininterval=1.0,
        disable=not self._is_writer,
    )
    self._last_time = time.monotonic()
    self._tokens = 0.0

  def close(self) -> None:
    self._bar.close()
    if self._is_writer:
      self._events.close()

  def advance(self, values: Mapping[str, float]) -> None:
    """Counts a step that was made, given what `means` made of its metrics."""
    self._tokens += _total_tokens(values)
    self._bar.update()

  def train(
      self, step: int, values: Mapping[str, float], **more: float
  ) -> None:
    """Logs the metrics of a step."""
    now = time.monotonic()
    rate = self._tokens / max(now - self._last_time, 1e-9)
    self._last_time, self._tokens = now, 0.0
    row = {**values, **more, 'target_tokens_per_second': round(rate, 1)}
    losses = [f'{v:.3f}' for k, v in values.items() if k.endswith('/loss')]
    self._bar.set_postfix_str(f'loss {" ".join(losses)}, {rate:,.0f} tokens/s')
    self._write(step, 'train', row)

  def evaluation(self, step: int, values: Mapping[str, float]) -> None:
    """Logs the metrics of an evaluation on the validation split."""
    self._write(step, 'evaluation', values)
    if not self._is_writer:
      return
    shown = ', '.join(f'{name} {value:.4g}' for name, value in values.items())
    with logging_redirect_tqdm():
      _logger.info('Step %d, validation: %s', step, shown)
    # The evaluation's time is none of the training's.
    self._last_time, self._tokens = time.monotonic(), 0.0

  def _write(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
    if not self._is_writer:
      return
    append_metrics(self._path, {'step': step, 'kind': kind, **row})
    for name, value in row.items():
      self._events.add_scalar(f'{kind}/{name}', value, step)


def means(metrics: Metrics) -> dict[str, float]:
  """Fetches metrics from the devices and divides sums by weights.

  The weight of an objective's loss is its number of target tokens.
  """
  values = {}
  for name, (total, weight) in jax.device_get(metrics).items():
    values[name] = float(total) / float(weight) if weight else 0.0
    objective, _, metric = name.rpartition('/')
    if metric == 'loss':
      values[f'{objective}/tokens'.lstrip('/')] = float(weight)
  return values


def check_finite(step: int, values: Mapping[str, float]) -> None:
  """Stops a run whose numbers have left the realm of numbers.

  Raises:
    UserError: names the step and the objective.
  """
  for name, value in values.items():
    if not math.isfinite(value):
      objective, _, metric = name.rpartition('/')
      raise UserError(
          f'expected finite numbers at step {step}, found that {metric} of '
          f'{objective or "all objectives"} is {value}; lower LEARNING_RATE or '
          f'look at the data of that step. The checkpoints written before are '
          f'whole'
      )


def _total_tokens(values: Mapping[str, float]) -> float:
  return sum(v for k, v in values.items() if k.endswith('/tokens'))
