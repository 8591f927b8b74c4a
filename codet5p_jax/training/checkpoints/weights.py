"""Weights without their training: what every program but `train` loads.

    model/arrays/          one array per layer
    model/metadata.json    shapes, dtypes and what the caller adds
    model/checksums.json
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from codet5p_jax.array_typing import Tree
from codet5p_jax.storage import explaining_storage_faults, local_path
from codet5p_jax.training.checkpoints.description import (
    describe_leaves,
    require_same_leaves,
)
from codet5p_jax.training.checkpoints.layout import (
    flatten,
    nest,
    stack_leaves,
    unstack_leaves,
)
from codet5p_jax.training.checkpoints.restore import (
    abstract_leaves,
    read_leaves,
)
from codet5p_jax.training.checkpoints.verify import verify, write_checksums
from codet5p_jax.training.files import read_json, write_json

_ARRAYS = 'arrays'
_METADATA = 'metadata.json'


def save_weights(
    folder: str | os.PathLike, params: Tree, metadata: dict[str, Any]
) -> None:
  """Writes a folder of weights, replacing an old one only when complete.

  Every process calls it with its part of the same arrays.

  Args:
    folder: the folder itself, such as `run/model`; its parent may be missing.
    params: nested dictionaries, scanned or unrolled.
    metadata: JSON values, without the keys `format_version` and `arrays`.

  Raises:
    UserError: the disk is full or the folder not writable; an old folder is
      then whole.
  """
  folder = local_path(folder)
  temporary = folder.with_name(f'{folder.name}.temporary')
  if 'arrays' in metadata:
    raise ValueError('metadata has the reserved key arrays')
  leaves = unstack_leaves(flatten(params))

  def prepare():
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)

  def finish():
    write_json(
        temporary / _METADATA, {**metadata, 'arrays': describe_leaves(leaves)}
    )
    write_checksums(temporary)
    verify(temporary)
    _replace(folder, temporary)

  with explaining_storage_faults(
      f'cannot write weights {folder}', 'free space or choose another folder'
  ):
    try:
      _on_first_process(prepare, 'prepare_weights')
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(temporary / _ARRAYS, nest(leaves))
      _on_first_process(finish, 'finish_weights')
    except BaseException:
      shutil.rmtree(temporary, ignore_errors=True)
      raise


def load_weights(
    folder: str | os.PathLike, abstract_params: Tree
) -> tuple[Tree, dict[str, Any]]:
  """Reads weights into the shapes and shardings of a target.

  Args:
    folder: as given to `save_weights`.
    abstract_params: nested dictionaries of `jax.ShapeDtypeStruct` with
      shardings (or of arrays) on any mesh, scanned or unrolled.

  Returns:
    The parameters and the metadata.

  Raises:
    DamagedCheckpoint: a file is not what was written.
    UserError: there is no such folder, a newer version wrote it, or it does
      not fit the target. No array was read.
  """
  folder = _readable(local_path(folder))
  verify(folder)
  metadata = read_json(folder / _METADATA)
  targets = abstract_leaves(abstract_params)
  require_same_leaves(
      metadata['arrays'], describe_leaves(targets), f'weights {folder}'
  )
  leaves = read_leaves(folder / _ARRAYS, targets)
  return stack_leaves(leaves, abstract_params), metadata


def _previous(folder: Path) -> Path:
  """Returns where the old folder stands while the new one takes its place."""
  return folder.with_name(f'{folder.name}.previous')


def _replace(folder: Path, temporary: Path) -> None:
  """Puts the new folder in place of the old one.

  Folders cannot be exchanged in one stroke everywhere. Between the two
  renames the old one is found as `.previous`, by `load_weights` too; it is
  deleted only when the new one is in place.
  """
  previous = _previous(folder)
  if folder.exists():
    shutil.rmtree(previous, ignore_errors=True)
    os.rename(folder, previous)
  os.rename(temporary, folder)
  shutil.rmtree(previous, ignore_errors=True)


def _readable(folder: Path) -> Path:
  previous = _previous(folder)
  return previous if previous.is_dir() and not folder.exists() else folder


def _on_first_process(action: Callable[[], None], name: str) -> None:
  """Runs an action on process 0 while the others wait."""
  if jax.process_index() == 0:
    action()
  multihost_utils.sync_global_devices(name)
