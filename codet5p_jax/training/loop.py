"""The loop of a run: steps, and what comes between them."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

from codet5p_jax.errors import Preempted
from codet5p_jax.training.batches import TrainBatches
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.compilation_cache import telling_of_compilation
from codet5p_jax.training.distributed import on_first_process, wait_for_all
from codet5p_jax.training.files import sync
from codet5p_jax.training.logging import RunLog, means
from codet5p_jax.training.preemption import PreemptionNotice
from codet5p_jax.training.run_folder import RunFolder
from codet5p_jax.training.run_lock import RunLock
from codet5p_jax.training.step_health import check_step
from codet5p_jax.training.timeline import Timeline
from codet5p_jax.training.train_step import (
    TrainState,
    TrainStep,
    microbatch_counts,
)
from codet5p_jax.training.watchdog import Watchdog

# Compiling, and waiting for a whole checkpoint, take longer than a step.
PATIENCE = 6


@dataclasses.dataclass(frozen=True)
class Loop:
  """What the loop needs.

  Attributes:
    train_step: of the run.
    batches: by step.
    folder: of the run.
    last: updates to make, those before a stop included.
    log: of the run.
    timeline: of the run.
    log_every: steps between rows of it.
    learning_rate: (updates made) to that of the next.
    evaluate_every: steps between evaluations; there is one at the end.
    evaluate: (state, what to call after each batch) to the metrics of the
      validation split.
    evaluated_step: of the newest evaluation in the log; None without any.
    checkpoint_every: steps between checkpoints; there is one at the end.
    saved: the checkpoints.
    metadata: of every checkpoint.
    notice: of the machine being taken away.
    watchdog: ends a process that hangs.
    hang_seconds: that a step may take, or a batch of an evaluation; what has
      to be compiled, and saving, may take `PATIENCE` times as long.
    lock: of the run folder; held by the first process.
  """

  train_step: TrainStep
  batches: TrainBatches
  folder: RunFolder
  last: int
  log: RunLog
  timeline: Timeline
  log_every: int
  learning_rate: Callable[[int], Any]
  evaluate_every: int
  evaluate: Callable[[TrainState, Callable[[], None]], dict[str, float]]
  evaluated_step: int | None
  checkpoint_every: int
  saved: Checkpoints
  metadata: dict[str, Any]
  notice: PreemptionNotice
  watchdog: Watchdog
  hang_seconds: float
  lock: RunLock


class _Noticed(Exception):
  """A notice arrived amid an evaluation."""


def make_steps(state: TrainState, loop: Loop) -> TrainState:
  """Makes the steps from the state's own to the last.

  Raises:
    Preempted: the machine is about to be taken away; the state is saved.
    UserError: too many steps in a row were bad, a checkpoint cannot be written,
      or another run took the folder.
  """
  first = int(state.step)
  timeline = loop.timeline
  pending: collections.deque = collections.deque()
  seen_counts: list[dict[str, int]] = []  # A step is compiled for each.

  def settle(leave: int) -> None:
    # Looks at metrics one step late, so that the device always has the next
    # step at hand while the host reads those of the last.
    while len(pending) > leave:
      step, metrics, counts, compiled = pending.popleft()
      values = means(metrics)
      loop.log.advance(values, counts, compiled)
      if step % loop.log_every == 0 or step == loop.last:
        loop.log.train(
            step,
            values,
            learning_rate=float(loop.learning_rate(step - 1)),
        )
      check_step(
          step,
          values,
          loop.train_step.config.bad_steps,
          loop.folder,
          loop.batches.at,
          timeline.event,
      )

  def evaluate(step: int) -> None:
    _expect(loop, f'the evaluation at step {step}', PATIENCE)
    with timeline.within('evaluation'):
      values = loop.evaluate(state, lambda: _between_batches(loop, step))
    loop.log.evaluation(step, values)

  def before_saving() -> None:
    loop.lock.require_held()
    # A checkpoint that outlives a power cut needs the rows before it.
    sync(loop.folder.metrics)

  def save(step: int) -> None:
    _expect(loop, f'saving the checkpoint of step {step}', PATIENCE)
    on_first_process(before_saving)
    with timeline.within('checkpoint'):
      loop.saved.save(step, state, {'step': step}, loop.metadata)
    timeline.progress()  # A later session may go on from here.

  step = first
  try:
    # A run that was stopped amid this evaluation has saved its state before.
    if first and _is_due(loop, first, loop.evaluate_every):
      if loop.evaluated_step != first:
        evaluate(first)
    _expect(loop, f'the batch of step {first + 1}', PATIENCE)
    batches = timeline.awaited(loop.batches.read(first, loop.last))
    for number, batch in enumerate(batches, first):
      step = number + 1
      counts = microbatch_counts(loop.train_step.config, number)
      compiles = counts not in seen_counts
      _expect(loop, f'step {step}', PATIENCE if compiles else 1)
      if compiles:
        seen_counts.append(counts)
        settle(leave=0)  # Lest the compiling count as time of the step before.
        names = ' and '.join(counts)
        with (
            timeline.within('compile'),
            telling_of_compilation(f'the train step of {names}'),
        ):
          state, metrics = loop.train_step.step(state, batch)
      else:
        state, metrics = loop.train_step.step(state, batch)
      pending.append((step, metrics, counts, compiles))
      settle(leave=0 if compiles else 1)
      loop.saved.check_for_errors()
      if loop.notice.arrived():
        raise _Noticed
      if _is_due(loop, step, loop.evaluate_every):
        settle(leave=0)
        evaluate(step)
      if _is_due(loop, step, loop.checkpoint_every):
        settle(leave=0)  # Never saves a state whose loss was not seen.
        save(step)
      _expect(loop, f'the batch of step {step + 1}', 1)
  except _Noticed:
    settle(leave=0)
    timeline.event('preempted')
    if step > first:
      save(step)
    with timeline.within('checkpoint'):
      loop.saved.wait_until_finished()
      wait_for_all()
    timeline.progress()
    raise Preempted(
        f'told to end, as when a machine is taken away: step {step} of '
        f'{loop.last} is saved, and the same command goes on from there'
    ) from None
  return state


def _is_due(loop: Loop, step: int, every: int) -> bool:
  return step % every == 0 or step == loop.last


def _expect(loop: Loop, what: str, patience: int) -> None:
  loop.watchdog.expect(what, loop.hang_seconds * patience)


def _between_batches(loop: Loop, step: int) -> None:
  # Every objective compiles its own.
  _expect(loop, f'the evaluation at step {step}', PATIENCE)
  if loop.notice.arrived():
    raise _Noticed
