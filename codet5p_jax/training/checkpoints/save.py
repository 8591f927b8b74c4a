"""The checkpoints of a run: saved beside the training, restored strictly."""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from codet5p_jax.errors import UserError
from codet5p_jax.storage import explaining_storage_faults, local_path
from codet5p_jax.training.checkpoints.agreement import raising_together
from codet5p_jax.training.checkpoints.description import (
    Description,
    require_shared,
)
from codet5p_jax.training.checkpoints.layout import (
    flatten,
    nest,
    unstack_leaves,
)
from codet5p_jax.training.checkpoints.orbax_manager import (
    Manager,
    open_manager,
)
from codet5p_jax.training.checkpoints.restore import (
    ARRAY_ITEMS,
    array_leaves,
    describe_items,
    find_fault,
    is_listed_by_orbax,
    read_metadata,
    restore_step,
)
from codet5p_jax.training.checkpoints.steps import (
    DAMAGED,
    committed_steps,
    remove_unfinished,
    set_aside,
)
from codet5p_jax.training.checkpoints.sums import collect_sums, dispatch_sums
from codet5p_jax.training.checkpoints.verify import (
    BOOKKEEPING,
    DamagedCheckpoint,
    complete_checksums,
    size_on_disk,
    verify,
    write_checksums,
)
from codet5p_jax.training.distributed import as_first_process, on_first_process
from codet5p_jax.training.files import FORMAT_VERSION

_logger = logging.getLogger(__name__)

# Keys of the metadata that `save` writes itself.
_OWN_METADATA = ('format_version', 'step', 'arrays')

# Between looks at whether a save has failed, for who waits for its end.
_LOOK_SECONDS = 0.5

# Damaged steps named in one message.
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class SaveCost:
  """What a save cost.

  Attributes:
    step: that was saved.
    bytes: of all files of the step.
    waited_seconds: that the training stood still, in the call of `save`.
    seconds: from that call until the step was committed.
  """

  step: int
  bytes: int
  waited_seconds: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class _Save:
  """A save under way.

  Attributes:
    step: that is saved.
    arrays: by `item/path`, as `describe_items` describes them, and their
      `sums`.
    leaves_frozen: the state has parameters that are not saved.
    started: time of the call, of the monotonic clock.
  """

  step: int
  arrays: Description
  leaves_frozen: bool
  started: float


class Checkpoints:
  """The checkpoints of a run, one folder per step; owns the save under way.

  A step holds the items trainable, optimizer, objective_state and health
  (arrays, one per layer), cursor and metadata (JSON), and `checksums.json`.
  Frozen parameters are never saved: metadata keeps their fingerprint.

  Every process of a run makes the same calls in the same order. Reading calls
  create nothing, so a folder can be read while another program writes it. Only
  `save` and `resume` change it: they belong to the run that owns the folder.

  Attributes:
    folder: of all steps, absolute.
  """

  def __init__(
      self,
      folder: str | os.PathLike,
      *,
      max_to_keep: int | None = None,
      keep_every: int | None = None,
      tell: Callable[..., None] = lambda event, **details: None,
  ):
    """Opens a folder, which may not exist yet.

    Args:
      folder: of all steps, on a file system that all processes see.
      max_to_keep: newest steps that a save leaves; None keeps all.
      keep_every: steps that are multiples of it are kept for good; None for
        none.
      tell: `Timeline.event`; hears of each "checkpoint" what `SaveCost` says,
        once it is known to be committed and verified, and of each
        "damaged_checkpoint" its step and fault.

    Raises:
      UserError: a number is less than 1, or the folder a bucket.
    """
    if max_to_keep is not None and max_to_keep < 1:
      raise UserError(
          f'expected to keep at least 1 checkpoint, found {max_to_keep}; set '
          f'a larger number, or None to keep all'
      )
    if keep_every is not None and keep_every < 1:
      raise UserError(
          f'expected to keep checkpoints every 1 or more steps, found '
          f'{keep_every}; set a larger number, or None to keep none for good'
      )
    self.folder = local_path(folder)
    self._max_to_keep = max_to_keep
    self._keep_every = keep_every
    self._tell = tell
    self._manager: Manager | None = None
    self._save: _Save | None = None
    self._commit: concurrent.futures.Future[SaveCost | None] | None = None

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception_info) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Returns the committed steps, ascending; half-written ones are none."""
    # Orbax's own list would hold the step under way too.
    return committed_steps(self.folder)

  def latest_step(self) -> int | None:
    """Returns the newest committed step, None if there is none."""
    return max(self.steps(), default=None)

  def newest_step(self, before: int | None = None) -> int | None:
    """Returns the newest step, as process 0 sees the folder.

    Every process calls it.

    Args:
      before: only steps before this one count.
    """
    steps = [x for x in self.steps() if before is None or x < before]
    return as_first_process(max(steps, default=None))

  def step_dir(self, step: int) -> Path:
    """Returns the folder of a step."""
    return self.folder / str(step)

  def save(
      self,
      step: int,
      state: Any,
      cursor: dict[str, Any],
      metadata: dict[str, Any],
  ) -> None:
    """Copies the state to the host and writes it in the background.

    First waits for the save before. While it copies, the stacked arrays need
    their device memory once more. The step is committed only when Orbax lists
    exactly the arrays that it was given; afterwards its files are compared
    with their checksums, and one line is logged.

    Args:
      step: updates made, equal to `state.step`.
      state: a TrainState, scanned or unrolled.
      cursor: JSON values, where the data goes on.
      metadata: JSON values; `frozen_fingerprint` is required if the state has
        frozen parameters.

    Raises:
      UserError: this save or the one before found the disk full or the folder
        not writable, or the one before is damaged, or the folder holds this
        step or a later one. Steps saved before are whole.
      ValueError: the arguments contradict each other, or an array is not one
        that Orbax saves rightly from several processes.
    """
    started = time.monotonic()
    self.wait_until_finished()
    self._check_arguments(step, state, cursor, metadata)
    # On their way before the arrays are copied, so that the copy, which waits
    # for the devices anyway, waits for them too.
    sums = dispatch_sums(array_leaves(state))
    items = {
        item: unstack_leaves(flatten(getattr(state, field)))
        for item, field in ARRAY_ITEMS.items()
    }
    arrays = describe_items(items)
    summed = {
        path: {**arrays[path], 'sums': pair}
        for path, pair in collect_sums(sums).items()
    }
    arguments = {
        item: ocp.args.StandardSave(nest(leaves))
        for item, leaves in items.items()
        if leaves  # Orbax refuses an empty tree.
    }
    arguments['cursor'] = ocp.args.JsonSave(
        {'format_version': FORMAT_VERSION, **cursor}
    )
    arguments['metadata'] = ocp.args.JsonSave({
        'format_version': FORMAT_VERSION,
        'step': step,
        **metadata,
        'arrays': summed,
    })
    self._start(
        _Save(step, summed, bool(flatten(state.frozen_params)), started),
        ocp.args.Composite(**arguments),
    )

  def restore(
      self,
      step: int | None,
      abstract_state: Any,
      *,
      frozen_fingerprint: str | None = None,
  ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Restores a step into the shapes and shardings of `abstract_state`.

    Args:
      step: None for the latest.
      abstract_state: see `restore_step`.
      frozen_fingerprint: of this run's frozen parameters, None without any.

    Returns:
      The state, the cursor and the metadata (the caller's, with `step` and
      `arrays`).

    Raises:
      DamagedCheckpoint: names the wrong file and the newest whole step before.
      UserError: there is no such step, or it does not fit. No array was read.
    """
    self.wait_until_finished()
    steps = self.steps()
    step = max(steps, default=None) if step is None else step
    self._require_step(step, steps)
    with self._advising(step):
      return restore_step(
          self.step_dir(step), abstract_state, frozen_fingerprint
      )

  def resume(
      self, abstract_state: Any, *, frozen_fingerprint: str | None = None
  ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Restores the newest whole step, for the run that owns the folder.

    Damaged steps that are newer are set aside in `damaged/`, with one line
    logged for each, once a whole one is found and restored. If there is none,
    all stay where they are: the next start must not take the folder for that
    of a new run.

    Args:
      abstract_state: see `restore_step`.
      frozen_fingerprint: of this run's frozen parameters, None without any.

    Returns:
      As `restore`.

    Raises:
      UserError: there is no whole step, or the newest whole one does not fit;
        or what is damaged cannot be moved.
    """
    self.close()
    faults: dict[int, str] = {}
    while (step := self.newest_step(min(faults, default=None))) is not None:
      try:
        restored = restore_step(
            self.step_dir(step), abstract_state, frozen_fingerprint
        )
      except DamagedCheckpoint as error:
        # Not the error itself, which would hold the arrays read so far.
        faults[step] = error.fault
        continue
      with raising_together(self.folder):
        if jax.process_index() == 0:
          for damaged, fault in faults.items():
            self._set_aside(damaged, fault, f'step {step} is used instead')
      return restored
    self._require_step(None, sorted(faults))
    raise UserError(
        f'expected a whole checkpoint in {self.folder}, found damage in all '
        f'({_list_faults(faults)}); restore one from a copy, or move them away '
        f'to start anew'
    )

  def require_fresh(self) -> None:
    """Checks that a run without a checkpoint has not lost those it had.

    Raises:
      UserError: the folder has damaged checkpoints and no others.
    """
    shelf = self.folder / DAMAGED
    if not self.steps() and shelf.is_dir() and any(shelf.iterdir()):
      raise UserError(
          f'expected a checkpoint in {self.folder}, found damaged ones alone, '
          f'in {shelf}; restore one from a copy, or move that folder away to '
          f'start anew'
      )

  def metadata(self, step: int) -> dict[str, Any]:
    """Returns the metadata of a committed step, without verifying the rest.

    Raises:
      DamagedCheckpoint: they are missing or unreadable.
      UserError: there is no such step, or a newer version wrote it.
    """
    self._require_step(step, self.steps())
    with self._advising(step):
      return read_metadata(self.step_dir(step))

  def check_for_errors(self) -> None:
    """Raises what went wrong in the background, without waiting.

    Raises:
      UserError: as `save`.
    """
    has_failed = self._manager is not None and self._manager.fault is not None
    if self._commit is not None and (self._commit.done() or has_failed):
      self.wait_until_finished()

  def wait_until_finished(self) -> None:
    """Waits until the save under way is committed and verified.

    Raises:
      UserError: as `save`.
    """
    if self._commit is None:
      return
    with self._explaining_faults():
      while True:
        with contextlib.suppress(concurrent.futures.TimeoutError):
          cost = self._commit.result(_LOOK_SECONDS)
          break
        if self._manager.fault is not None and jax.process_count() > 1:
          raise self._manager.fault
    self._commit = self._save = None
    if cost is not None:
      self._tell('checkpoint', **dataclasses.asdict(cost))

  def close(self) -> None:
    """Waits for the save under way and frees what belongs to it.

    Raises:
      UserError: as `save`.
    """
    self.wait_until_finished()
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def _start(self, save: _Save, arguments: ocp.args.Composite) -> None:
    """Copies to the host, and leaves the rest to threads."""
    self._save = save
    with self._explaining_faults():
      if self._manager is None:
        self._manager = self._open_manager()
      # Forced: what is to be saved, the caller decides.
      self._manager.save(save.step, args=arguments, force=True)
      waited = time.monotonic() - save.started
      thread = concurrent.futures.ThreadPoolExecutor(1)
      self._commit = thread.submit(self._finish, self._manager, save, waited)
      thread.shutdown(wait=False)  # Takes no more, and ends with this one.

  def _open_manager(self) -> Manager:
    on_first_process(self._clear_folder)
    return open_manager(
        self.folder, self._max_to_keep, self._keep_every, self._sign_step
    )

  def _clear_folder(self) -> None:
    """Removes what would keep Orbax from opening the folder."""
    remove_unfinished(self.folder)
    for step in self.steps():
      if is_listed_by_orbax(self.step_dir(step)):
        continue
      try:
        verify(self.step_dir(step))
      except DamagedCheckpoint as error:
        self._set_aside(step, error.fault)
      else:
        # A kill, and a power cut, came before it was listed: Orbax had not
        # written it for good, and does without.
        (self.step_dir(step) / '_CHECKPOINT_METADATA').unlink()

  def _sign_step(self) -> None:
    """Proves and signs the step under way; Orbax calls it on process 0.

    Orbax calls it when all items are complete and before it renames the
    folder: no step is ever committed that lacks an array or checksums, and
    none before is deleted until the new one has them.
    """
    save = self._save
    (unfinished,) = self.folder.glob(f'{save.step}.orbax-checkpoint-tmp*')
    fault = find_fault(unfinished, save.arrays)
    if fault is not None:
      raise DamagedCheckpoint(
          self.step_dir(save.step),
          fault,
          f'it was not committed, go on from {self._described_latest()}',
      )
    write_checksums(unfinished, leave_out=BOOKKEEPING)

  def _finish(
      self, manager: Manager, save: _Save, waited: float
  ) -> SaveCost | None:
    """Waits for the commit, verifies it and tells of it; runs in a thread.

    Returns:
      On the first process what it cost. Others may not see the folder yet.
    """
    manager.wait_until_finished()
    seconds = time.monotonic() - save.started
    if jax.process_index() != 0:
      return None
    folder = self.step_dir(save.step)
    complete_checksums(folder)
    try:
      verify(folder)
    except DamagedCheckpoint as error:
      raise DamagedCheckpoint(
          folder,
          error.fault,
          'it was only just written, so check the disk; a run that starts '
          'again goes on from the newest whole one',
      ) from error
    cost = SaveCost(save.step, size_on_disk(folder), waited, seconds)
    _logger.info(
        'Checkpoint of step %d: %.1f MB in %.2f s, of which training waited '
        '%.2f s%s.',
        cost.step,
        cost.bytes / 1e6,
        cost.seconds,
        cost.waited_seconds,
        ' (frozen parameters are not in it)' if save.leaves_frozen else '',
    )
    return cost

  @contextlib.contextmanager
  def _explaining_faults(self) -> Iterator[None]:
    """Turns faults of the disk into UserError, and lets a save be retried."""
    with explaining_storage_faults(
        f'cannot write checkpoint {self.step_dir(self._save.step)}',
        f'free space or mend its permissions, then go on from '
        f'{self._described_latest()}',
    ):
      try:
        yield
      except Exception:
        self._abandon_manager()
        raise

  def _abandon_manager(self) -> None:
    """Drops a manager whose save failed; the next save opens a new one.

    The old one still counts the failed step and has forgotten steps that it
    was about to delete.
    """
    manager, self._manager = self._manager, None
    self._commit = self._save = None
    # Of several processes this one is about to end, and the others with it.
    if manager is not None and jax.process_count() == 1:
      # A second error would hide the one that is being raised. Waiting raises
      # once in every thread, and only then everything is closed.
      for end in (manager.wait_until_finished, manager.close):
        with contextlib.suppress(Exception):
          end()

  def _set_aside(self, step: int, fault: str, consequence: str = '') -> None:
    """Moves a damaged step away, and says so in one line."""
    folder = self.step_dir(step)
    with explaining_storage_faults(
        f'cannot set aside the damaged checkpoint {folder}',
        'mend the permissions of its folder, or move it away',
    ):
      place = set_aside(folder)
    self._tell('damaged_checkpoint', step=step, fault=fault)
    _logger.warning(
        'Checkpoint %s is damaged: %s; it was put into %s%s.',
        folder,
        fault,
        place,
        consequence and f', and {consequence}',
    )

  def _require_step(self, step: int | None, steps: list[int]) -> None:
    """Raises UserError if a step, or any, is not there."""
    if not steps or (step is not None and step not in steps):
      raise UserError(
          f'expected {"a checkpoint" if step is None else f"step {step}"} in '
          f'{self.folder}, found {f"steps {steps}" if steps else "none"}; '
          f'check the folder and the step'
      )

  @contextlib.contextmanager
  def _advising(self, step: int) -> Iterator[None]:
    """Adds to a damage which step to use instead."""
    try:
      yield
    except DamagedCheckpoint as error:
      raise DamagedCheckpoint(
          error.folder, error.fault, self._advice(step)
      ) from error

  def _described_latest(self) -> str:
    latest = self.latest_step()
    return 'the start' if latest is None else f'step {latest}'

  def _advice(self, step: int) -> str:
    """Says what to do about a damaged step."""
    for earlier in reversed([x for x in self.steps() if x < step]):
      with contextlib.suppress(UserError):
        verify(self.step_dir(earlier))
        return (
            f'step {earlier} before it is whole; `codet5p train` sets damaged '
            f'ones aside and goes on from the newest whole one'
        )
    return 'no whole checkpoint comes before it: restore it from a copy'

  def _check_arguments(
      self,
      step: int,
      state: Any,
      cursor: dict[str, Any],
      metadata: dict[str, Any],
  ) -> None:
    """Finds mistakes before anything is written, see `save`."""
    if int(state.step) != step:
      raise ValueError(f'state.step is {int(state.step)}, not {step}')
    if reserved := metadata.keys() & set(_OWN_METADATA):
      raise ValueError(f'metadata has the reserved keys {sorted(reserved)}')
    if 'format_version' in cursor:
      raise ValueError('the cursor has the reserved key format_version')
    # In the background a value that is not JSON would be found too late.
    json.dumps([cursor, metadata])
    frozen = bool(flatten(state.frozen_params))
    if frozen != (metadata.get('frozen_fingerprint') is not None):
      raise ValueError(
          'metadata must have a frozen_fingerprint if, and only if, the state '
          'has frozen parameters'
      )
    latest = self.latest_step()
    if latest is not None and step <= latest:
      raise UserError(
          f'expected {self.folder} to hold no checkpoint of step {step} or '
          f'later, found step {latest}; move those away, or use another folder'
      )
    for path, leaf in array_leaves(state).items():
      require_shared(path, leaf)


def _list_faults(faults: dict[int, str]) -> str:
  """Returns "step 3: ..., step 2: ..., and 4 more"."""
  words = [f'step {step}: {fault}' for step, fault in faults.items()]
  more = len(words) - _NAMED
  return ', '.join(words[:_NAMED] + ([f'and {more} more'] if more > 0 else []))
