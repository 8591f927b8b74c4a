"""The checkpoints of a run: saved beside the training, restored strictly."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from codet5p_jax.errors import UserError
from codet5p_jax.storage import explaining_storage_faults, local_path
from codet5p_jax.training.checkpoints.layout import (
    Leaves,
    flatten,
    nest,
    unstack_leaves,
)
from codet5p_jax.training.checkpoints.restore import (
    ARRAY_ITEMS,
    describe_items,
    read_metadata,
    restore_step,
)
from codet5p_jax.training.checkpoints.verify import (
    BOOKKEEPING,
    DamagedCheckpoint,
    complete_checksums,
    verify,
    write_checksums,
)
from codet5p_jax.training.files import FORMAT_VERSION

# Keys of the metadata that `save` writes itself.
_OWN_METADATA = ('format_version', 'step', 'arrays')


class Checkpoints:
  """The checkpoints of a run, one folder per step; owns the save under way.

  A step holds the items trainable, optimizer and objective_state (arrays, one
  per layer), cursor and metadata (JSON), and `checksums.json`. Frozen
  parameters are never saved: metadata keeps their fingerprint.

  Every process of a run makes the same calls in the same order. Reading calls
  create nothing, so a folder can be read while another program writes it.
  """

  def __init__(
      self, folder: str | os.PathLike, *, max_to_keep: int | None = None
  ):
    """Opens a folder, which may not exist yet.

    Args:
      folder: of all steps, on a file system that all processes see.
      max_to_keep: newest steps that a save leaves; None keeps all.

    Raises:
      UserError: `max_to_keep` is less than 1, or the folder a bucket.
    """
    if max_to_keep is not None and max_to_keep < 1:
      raise UserError(
          f'expected to keep at least 1 checkpoint, found {max_to_keep}; set '
          f'a larger number, or None to keep all'
      )
    self.folder = local_path(folder)
    self._max_to_keep = max_to_keep
    self._manager: ocp.CheckpointManager | None = None
    self._step_under_way: int | None = None

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception_info) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Returns the committed steps, ascending; half-written ones are none."""
    if not self.folder.is_dir():
      return []
    # Orbax commits by renaming to the bare number. Its own list would hold
    # the step under way too.
    return sorted(
        int(path.name)
        for path in self.folder.iterdir()
        if path.name.isdecimal() and path.is_dir()
    )

  def latest_step(self) -> int | None:
    """Returns the newest committed step, None if there is none."""
    return max(self.steps(), default=None)

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
    their device memory once more.

    Args:
      step: updates made, equal to `state.step`.
      state: a TrainState, scanned or unrolled.
      cursor: JSON values, where the data goes on.
      metadata: JSON values; `frozen_fingerprint` is required if the state has
        frozen parameters.

    Raises:
      UserError: this save or the one before found the disk full or the folder
        not writable, or the folder holds this step or a later one. Steps
        saved before are whole.
      ValueError: the arguments contradict each other, or an array is not one
        that Orbax saves rightly from several processes.
    """
    self.wait_until_finished()
    items = {
        item: flatten(getattr(state, field))
        for item, field in ARRAY_ITEMS.items()
    }
    self._check_arguments(step, state, cursor, metadata, items)
    items = {item: unstack_leaves(leaves) for item, leaves in items.items()}
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
        'arrays': describe_items(items),
    })
    with self._explaining_faults(step):
      if self._manager is None:
        self._manager = self._open_manager()
      self._step_under_way = step
      # Forced: what is to be saved, the caller decides.
      self._manager.save(step, args=ocp.args.Composite(**arguments), force=True)

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
    if step not in steps:
      raise UserError(
          f'expected {"a checkpoint" if step is None else f"step {step}"} in '
          f'{self.folder}, found {f"steps {steps}" if steps else "none"}; '
          f'check the folder and the step'
      )
    if flatten(abstract_state.frozen_params) and frozen_fingerprint is None:
      raise ValueError('frozen parameters need their frozen_fingerprint')
    try:
      return restore_step(
          self.step_dir(step), abstract_state, frozen_fingerprint
      )
    except DamagedCheckpoint as error:
      raise DamagedCheckpoint(
          error.folder, error.fault, self._advice(step)
      ) from error

  def metadata(self, step: int) -> dict[str, Any]:
    """Returns the metadata of a committed step.

    Raises:
      UserError: there is no such step, or a newer version wrote it.
    """
    return read_metadata(self.step_dir(step))

  def check_for_errors(self) -> None:
    """Raises what went wrong in the background, without waiting.

    Raises:
      UserError: as `save`.
    """
    if self._manager is not None and not self._manager.is_saving_in_progress():
      self.wait_until_finished()

  def wait_until_finished(self) -> None:
    """Waits until the save under way is committed, with its checksums.

    Raises:
      UserError: as `save`.
    """
    step = self._step_under_way
    if self._manager is None or step is None:
      return
    with self._explaining_faults(step):
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        complete_checksums(self.step_dir(step))
      self._step_under_way = None

  def close(self) -> None:
    """Waits for the save under way and frees what belongs to it.

    Raises:
      UserError: as `save`.
    """
    self.wait_until_finished()
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def _open_manager(self) -> ocp.CheckpointManager:
    if jax.process_index() == 0:
      _remove_unfinished(self.folder)
    return ocp.CheckpointManager(
        self.folder,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(
                n=self._max_to_keep
            ),
            # What killed or failed saves left.
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=self._sign_step
            ),
        ),
    )

  def _sign_step(self) -> None:
    """Writes the checksums of the step under way; Orbax calls it on process 0.

    Orbax calls it when all items are complete and before it renames the
    folder: no step is ever committed without checksums, and none before is
    deleted until the new one has them.
    """
    (unfinished,) = self.folder.glob(
        f'{self._step_under_way}.orbax-checkpoint-tmp*'
    )
    write_checksums(unfinished, leave_out=BOOKKEEPING)

  @contextlib.contextmanager
  def _explaining_faults(self, step: int) -> Iterator[None]:
    """Turns faults of the disk into UserError, and lets a save be retried."""
    with explaining_storage_faults(
        f'cannot write checkpoint {self.step_dir(step)}',
        f'free space or choose another folder, then go on from '
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
    self._step_under_way = None
    if manager is not None:
      # A second error would hide the one that is being raised.
      with contextlib.suppress(Exception):
        manager.close()

  def _described_latest(self) -> str:
    latest = self.latest_step()
    return 'the start' if latest is None else f'step {latest}'

  def _advice(self, step: int) -> str:
    """Says what to do about a damaged step."""
    for earlier in reversed([x for x in self.steps() if x < step]):
      with contextlib.suppress(UserError):
        verify(self.step_dir(earlier))
        return (
            f'the newest whole checkpoint before it is step {earlier}: move '
            f'the folders of later steps away to go on from there'
        )
    return (
        'no whole checkpoint comes before it: restore it from a copy, or '
        'move it away to start anew'
    )

  def _check_arguments(
      self,
      step: int,
      state: Any,
      cursor: dict[str, Any],
      metadata: dict[str, Any],
      items: dict[str, Leaves],
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
    for item, leaves in items.items():
      for path, leaf in leaves.items():
        _require_shared(f'{item}/{path}', leaf)


def _remove_unfinished(folder: Path, patience: float = 10.0) -> None:
  """Removes what killed or failed saves left.

  Orbax does so too, but gives up where a thread of a save that failed in this
  process is still writing.

  Args:
    folder: of all steps.
    patience: seconds to wait for such threads.

  Raises:
    OSError: something cannot be removed.
  """
  deadline = time.monotonic() + patience
  for path in folder.glob('*.orbax-checkpoint-tmp*'):
    while path.exists():
      try:
        shutil.rmtree(path)
      except OSError:
        if time.monotonic() > deadline:
          raise
      time.sleep(0.05)


def _require_shared(path: str, leaf: Any) -> None:
  """Refuses what Orbax saves from process 0 alone, without a word."""
  if not isinstance(leaf, jax.Array | np.ndarray):
    raise ValueError(f'expected an array at {path}, found {type(leaf)}')
  if jax.process_count() > 1 and (
      not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
  ):
    raise ValueError(
        f'expected an array over all processes at {path}, found one of this '
        f'process alone'
    )
