"""What a run tells: metrics.jsonl, TensorBoard, and a progress bar."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from codet5p_jax.training.event_file import EventFile
from codet5p_jax.training.run_folder import RunFolder, append_metrics
from codet5p_jax.training.timeline import Timeline
from codet5p_jax.training.objective import Metrics

_logger = logging.getLogger(__name__)

# exp of it, as of no loss above, is finite in float32 too.
_MAX_LOSS_OF_PERPLEXITY = 80.0


class RunLog:
  """Writes a run's metrics; owns the open event file and the progress bar.

  A row of metrics.jsonl is a JSON object:
    step                updates made
    kind                "train" or "evaluation"
    <objective>/loss    mean negative log-likelihood of a target token, nats;
                        of `bimodal` the sum of the means of its losses
    <objective>/perplexity   exp of the loss, where that is of target tokens
    <objective>/accuracy   share of target tokens that were the likeliest
    <objective>/unigram_entropy   of the targets of an evaluation, in nats
    <objective>/tokens  target tokens of this step (of the evaluation)
    <objective>/loss_deviations   standard deviations that the loss lies above
                        the mean of steps before; 0 while those are few
    grad_norm           global norm of the gradients, before clipping
    learning_rate       of this step, if all steps were good
    bad_steps           steps since the row before that were left out
    bad_in_a_row        as many of them as end with this step
    input_wait_seconds  waited for input since the row before
    train_seconds       spent on steps since the row before
    steps_per_second    of those steps
    target_tokens_per_second   of those steps
    mfu                 model FLOPs of those steps, as a share of what the
                        devices could have done at most; "n/a" where no table
                        has their peak
  Beside these `bimodal` has <loss>_loss and <loss>_accuracy of its losses,
  contrastive (of a text or code), matching (of a verdict), text_to_code and
  code_to_text (of a target token), and the temperature of its similarities.
  What a pair is compared with is the batch and the queue, in an evaluation the
  batch alone, so those losses do not compare.
  In evaluations sentinels and the first <s> count neither as targets nor as
  tokens, so losses of denoising are higher there than in training. Losses of
  training are those of the very step, so a resumed run repeats them exactly. A
  step holds one or several objectives, and a row has those of its step.
  `train_seconds` and the rates leave out evaluations, checkpoints and steps
  that had to be compiled; the rates are missing where no step is left.

  All seconds are those of the run's timeline, which gets a row with every row
  of training, and an event with every evaluation. TensorBoard also gets
  `goodput/<bucket>`, the shares of the timeline's buckets in the time since
  this process began.
  A bad step (see training/step_health.py) has the losses that it had, as text
  where they are not finite ("nan", "inf"), and counts as a step like any other.
  The optimizer did not see it, so the learning rate of later steps is that of
  as many steps before as were left out up to then.
  """

  def __init__(
      self,
      folder: RunFolder,
      first_step: int,
      last_step: int,
      microbatch_flops: Mapping[str, int],
      peak_flops_per_second: float | None,
      timeline: Timeline,
  ):
    """Opens the files and shows the bar.

    Args:
      folder: of the run.
      first_step: updates made before.
      last_step: updates when the run is complete.
      microbatch_flops: model FLOPs of a micro-batch of each objective.
      peak_flops_per_second: of all devices together; None if unknown.
      timeline: of the run. What its buckets `step` and `input` count is time
        of the steps.
    """
    self._path = folder.metrics
    self._is_writer = jax.process_index() == 0
    if self._is_writer:
      self._events = EventFile(folder.events, first_step)
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
    self._timeline = timeline
    self._seconds_waiting = timeline.seconds('input')
    self._seconds_of_steps = timeline.seconds('step', 'input')
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
    self._timeline.advance()
    self._bad_steps += int(values['bad_steps'])
    now = self._timeline.seconds('step', 'input')
    if not compiled:
      self._seconds += now - self._seconds_of_steps
      self._steps += 1
      self._tokens += _total_tokens(values)
      self._flops += sum(
          count * self._microbatch_flops[name]
          for name, count in microbatches.items()
      )
    self._seconds_of_steps = now
    self._bar.update()

  def train(
      self, step: int, values: Mapping[str, float], **more: float
  ) -> None:
    """Logs the metrics of a step.

    Args:
      step: updates made.
      values: what `means` made of the metrics of the last.
      **more: numbers to log.
    """
    waiting = self._timeline.seconds('input')
    waited = waiting - self._seconds_waiting
    self._seconds_waiting = waiting
    row = {
        **values,
        **more,
        'bad_steps': self._bad_steps,
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
      if tokens := rates['target_tokens_per_second']:
        # Contrast and matching predict none.
        shown.append(f'{tokens:,.0f} tokens/s')
      mfu = rates['mfu']
      shown.append(
          'MFU n/a' if isinstance(mfu, str) else f'MFU {100 * mfu:.1f} %'
      )
    self._forget_steps()
    self._bar.set_postfix_str(', '.join(shown))
    self._write(step, 'train', row)
    self._timeline.progress()
    self._show(step, 'goodput', self._timeline.shares())

  def evaluation(self, step: int, values: Mapping[str, float]) -> None:
    """Logs the metrics of an evaluation on the validation split."""
    self._write(step, 'evaluation', values)
    self._timeline.event('evaluation')
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
    self._bad_steps = 0

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
    self._show(step, kind, row)

  def _show(self, step: int, group: str, values: Mapping[str, Any]) -> None:
    """Gives the numbers to TensorBoard."""
    if not self._is_writer:
      return
    numbers = {
        f'{group}/{name}': float(value)
        for name, value in values.items()
        if not isinstance(value, str) and math.isfinite(value)
    }
    self._events.write(step, numbers)


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

  Beside a loss that is a mean over target tokens stands its perplexity, which
  stays finite however large the loss. `tokens` are a sum.
  """
  fetched = jax.device_get(metrics)
  values = {}
  for name, (total, weight) in fetched.items():
    objective, _, metric = name.rpartition('/')
    if metric == 'tokens':
      values[name] = float(total)
      continue
    values[name] = float(total) / float(weight) if weight else 0.0
    if metric != 'loss':
      continue
    tokens, _ = fetched[f'{objective}/tokens'.lstrip('/')]
    # In a damaged batch neither is a number.
    if np.array_equal(tokens, weight, equal_nan=True):
      perplexity = math.exp(min(values[name], _MAX_LOSS_OF_PERPLEXITY))
      values[f'{objective}/perplexity'.lstrip('/')] = perplexity
  return values


def _total_tokens(values: Mapping[str, float]) -> float:
  """Target tokens of a step; those of a damaged batch may be no number."""
  tokens = [v for name, v in values.items() if name.endswith('/tokens')]
  return sum(filter(math.isfinite, tokens), 0.0)
