"""What a run tells: metrics.jsonl, TensorBoard, and a progress bar."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from codet5p_jax.errors import UserError
from codet5p_jax.training.run_folder import RunFolder, append_metrics
from codet5p_jax.training.train_step import Metrics

_logger = logging.getLogger(__name__)

# exp of it, as of no loss above, is finite in float32 too.
_MAX_LOSS_OF_PERPLEXITY = 80.0


class RunLog:
  """Writes a run's metrics; owns the open event file and the progress bar.

  A row of metrics.jsonl is a JSON object:
    step                updates made
    kind                "train" or "evaluation"
    <objective>/loss    mean negative log-likelihood of a target token, nats
    <objective>/perplexity   exp of the loss
    <objective>/accuracy   share of target tokens that were the likeliest
    <objective>/unigram_entropy   of the targets of an evaluation, in nats
    <objective>/tokens  target tokens of this step (of the evaluation)
    grad_norm           global norm of the gradients, before clipping
    learning_rate       of this step
    input_wait_seconds  waited for input since the row before
    train_seconds       spent on steps since the row before
    steps_per_second    of those steps
    target_tokens_per_second   of those steps
    mfu                 model FLOPs of those steps, as a share of what the
                        devices could have done at most; "n/a" where no table
                        has their peak
  In evaluations sentinels and the first <s> count neither as targets nor as
  tokens, so losses of denoising are higher there than in training. Losses of
  training are those of the very step, so a resumed run repeats them exactly. A
  step holds one or several objectives, and a row has those of its step.
  `train_seconds` and the rates leave out evaluations, checkpoints and steps
  that had to be compiled; the rates are missing where no step is left.
  """

  def __init__(
      self,
      folder: RunFolder,
      first_step: int,
      last_step: int,
      microbatch_flops: Mapping[str, int],
      peak_flops_per_second: float | None,
  ):
    """Opens the files and shows the bar.

    Args:
      folder: of the run.
      first_step: updates made before.
      last_step: updates when the run is complete.
      microbatch_flops: model FLOPs of a micro-batch of each objective.
      peak_flops_per_second: of all devices together; None if unknown.
    """
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
    self._microbatch_flops = microbatch_flops
    self._peak_flops_per_second = peak_flops_per_second
    self._short_names = short_names(list(microbatch_flops))
    self._losses: dict[str, float] = {}
    self._seconds_waiting = 0.0
    self._last_time = time.monotonic()
    self._forget_steps()

  def close(self) -> None:
    self._bar.close()
    if self._is_writer:
      self._events.close()

  def advance(
      self,
      values: Mapping[str, float],
      microbatches: Mapping[str, int],
      compiled: bool = False,
  ) -> None:
    """Counts a step that was made.

    Args:
      values: what `means` made of its metrics.
      microbatches: the step's micro-batches of each objective.
      compiled: whether the step was compiled since the step before was
        counted; its time is then none of the training's.
    """
    now = time.monotonic()
    if not compiled:
      self._seconds += now - self._last_time
      self._steps += 1
      self._tokens += _total_tokens(values)
      self._flops += sum(
          count * self._microbatch_flops[name]
          for name, count in microbatches.items()
      )
    self._last_time = now
    self._bar.update()

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """The time spent within is none of the training's."""
    begin = time.monotonic()
    yield
    self._last_time += time.monotonic() - begin

  def train(
      self,
      step: int,
      values: Mapping[str, float],
      seconds_waiting: float,
      **more: float,
  ) -> None:
    """Logs the metrics of a step.

    Args:
      step: updates made.
      values: what `means` made of the metrics of the last.
      seconds_waiting: for input, since the log was opened.
      **more: numbers to log.
    """
    waited = seconds_waiting - self._seconds_waiting
    self._seconds_waiting = seconds_waiting
    row = {
        **values,
        **more,
        'input_wait_seconds': round(waited, 3),
        'train_seconds': round(self._seconds, 3),
    }
    for name in self._short_names:
      if f'{name}/loss' in values:
        self._losses[name] = values[f'{name}/loss']
    shown = [f'loss {self._shown_losses()}']
    if self._seconds > 0:
      rates = self._rates()
      row.update(rates)
      shown.append(f'{rates["target_tokens_per_second"]:,.0f} tokens/s')
      mfu = rates['mfu']
      shown.append(
          'MFU n/a' if isinstance(mfu, str) else f'MFU {100 * mfu:.1f} %'
      )
    self._forget_steps()
    self._bar.set_postfix_str(', '.join(shown))
    self._write(step, 'train', row)

  def evaluation(self, step: int, values: Mapping[str, float]) -> None:
    """Logs the metrics of an evaluation on the validation split."""
    self._write(step, 'evaluation', values)
    if not self._is_writer:
      return
    shown = ', '.join(f'{name} {value:.4g}' for name, value in values.items())
    with logging_redirect_tqdm():
      _logger.info('Step %d, validation: %s', step, shown)

  def _rates(self) -> dict[str, Any]:
    flops_per_second = self._flops / self._seconds
    peak = self._peak_flops_per_second
    return {
        'steps_per_second': float(f'{self._steps / self._seconds:.5g}'),
        'target_tokens_per_second': round(self._tokens / self._seconds, 1),
        'mfu': 'n/a' if peak is None else round(flops_per_second / peak, 5),
    }

  def _forget_steps(self) -> None:
    self._seconds, self._steps, self._tokens, self._flops = 0.0, 0, 0.0, 0.0

  def _shown_losses(self) -> str:
    """The newest loss of each objective, named where there are several."""
    if len(self._short_names) == 1:
      return ''.join(f'{loss:.3f}' for loss in self._losses.values())
    return ' '.join(
        f'{short} {self._losses[name]:.3f}'
        for name, short in self._short_names.items()
        if name in self._losses
    )

  def _write(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
    if not self._is_writer:
      return
    append_metrics(self._path, {'step': step, 'kind': kind, **row})
    for name, value in row.items():
      if not isinstance(value, str):
        self._events.add_scalar(f'{kind}/{name}', value, step)


def short_names(names: Sequence[str]) -> dict[str, str]:
  """The first words of each name, as few as tell it from the others.

  >>> short_names(['causal_lm', 'seq2seq_causal_lm', 'causal_model'])
  {'causal_lm': 'causal_lm', 'seq2seq_causal_lm': 'seq2seq',
   'causal_model': 'causal_model'}
  """
  shortened = {}
  for name in names:
    words = name.split('_')
    beginnings = ['_'.join(words[: n + 1]) for n in range(len(words))]
    shortened[name] = next(
        (
            beginning
            for beginning in beginnings
            if not any(
                f'{other}_'.startswith(f'{beginning}_')
                for other in names
                if other != name
            )
        ),
        name,
    )
  return shortened


def means(metrics: Metrics) -> dict[str, float]:
  """Fetches metrics from the devices and divides sums by weights.

  The weight of an objective's loss is its number of target tokens. Beside each
  loss stands its perplexity, which stays finite however large the loss.
  """
  values = {}
  for name, (total, weight) in jax.device_get(metrics).items():
    values[name] = float(total) / float(weight) if weight else 0.0
    objective, _, metric = name.rpartition('/')
    if metric == 'loss':
      perplexity = math.exp(min(values[name], _MAX_LOSS_OF_PERPLEXITY))
      values[f'{objective}/perplexity'.lstrip('/')] = perplexity
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
