"""Weights without their training: what every program but `train` loads.

    model/arrays/<group>/  one array per layer, up to half a gigabyte a group
    model/metadata.json    shapes, dtypes, groups and what the caller adds
    model/checksums.json

Groups are written and read one after the other, so that a model can pass
through a machine that could not hold it. Tables have the vocabulary's rows
alone: those that only pad them are cut when saved and added when loaded.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from codet5p_jax.array_typing import Tree
from codet5p_jax.errors import UserError
from codet5p_jax.layers.embedding import padded_vocab_size
from codet5p_jax.storage import explaining_storage_faults, local_path
from codet5p_jax.training.checkpoints.description import (
    Description,
    describe_leaves,
    require_same_leaves,
)
from codet5p_jax.training.checkpoints.layout import (
    Leaves,
    flatten,
    nest,
    stack_leaves,
    unstack_leaves,
)
from codet5p_jax.training.checkpoints.restore import abstract_leaves
from codet5p_jax.training.checkpoints.verify import verify, write_checksums
from codet5p_jax.training.distributed import on_first_process
from codet5p_jax.training.files import read_json, write_json

_ARRAYS = 'arrays'
_METADATA = 'metadata.json'

# A group ends before it would pass this; a larger array is one of its own.
_GROUP_BYTES = 2**29

# Leaves with a row, or a number, for each token of the vocabulary.
_TABLES = (
    'token_embedder/embedding', 'output_head/kernel', 'output_head/bias'
)  # fmt: skip


def save_weights(
    folder: str | os.PathLike,
    params: Tree,
    metadata: dict[str, Any],
    vocab_size: int,
) -> None:
  """Writes a folder of weights, replacing an old one only when complete.

  Every process calls it with its part of the same arrays.

  Args:
    folder: the folder itself, such as `run/model`; its parent may be missing.
    params: nested dictionaries, scanned or unrolled.
    metadata: JSON values, without the keys `format_version` and `arrays`.
    vocab_size: rows of the tables that are tokens; the others are left out.

  Raises:
    UserError: the disk is full or the folder not writable; an old folder is
      then whole.
  """
  leaves = unstack_leaves(flatten(params))
  jax.block_until_ready(leaves)  # See `failing_together`.
  write_weights(
      folder,
      ((path, _without_padding(path, leaf, vocab_size))
       for path, leaf in leaves.items()),
      metadata,
  )  # fmt: skip


def write_weights(
    folder: str | os.PathLike,
    leaves: Iterable[tuple[str, Any]],
    metadata: dict[str, Any],
) -> None:
  """As `save_weights`, of leaves that are made while they are written.

  Args:
    folder: the folder itself.
    leaves: (path, array) as in a checkpoint, one per layer and without
      padding. At most a group of them is held.
    metadata: as for `save_weights`.

  Raises:
    UserError: as `save_weights`, and what `leaves` raises.
  """
  folder = local_path(folder)
  temporary = folder.with_name(f'{folder.name}.temporary')
  if 'arrays' in metadata:
    raise ValueError('metadata has the reserved key arrays')
  arrays: Description = {}

  def prepare():
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / _ARRAYS).mkdir(parents=True)

  def finish():
    write_json(temporary / _METADATA, {**metadata, 'arrays': arrays})
    write_checksums(temporary)
    verify(temporary)
    _replace(folder, temporary)

  with explaining_storage_faults(
      f'cannot write weights {folder}', 'free space or mend its permissions'
  ):
    try:
      on_first_process(prepare)
      with ocp.StandardCheckpointer() as checkpointer:
        for number, group in enumerate(_groups(leaves)):
          checkpointer.save(temporary / _ARRAYS / str(number), nest(group))
          checkpointer.wait_until_finished()
          for path, entry in describe_leaves(group).items():
            arrays[path] = entry | {'group': number}
          group.clear()  # Or it would be held until the next is made.
      on_first_process(finish)
    except BaseException:
      shutil.rmtree(temporary, ignore_errors=True)
      raise


class SavedWeights:
  """A folder of weights, opened.

  Attributes:
    folder: the folder itself.
    metadata: as it was saved, without what stands in `shapes`.
    shapes: shape and dtype of each leaf, by path.
  """

  def __init__(self, folder: str | os.PathLike):
    """Compares the folder's files with their checksums; reads no array.

    Raises:
      DamagedCheckpoint: a file is not what was written.
      UserError: there is no such folder, or another version wrote it.
    """
    self.folder = _readable(local_path(folder))
    verify(self.folder)
    self.metadata = read_json(self.folder / _METADATA)
    self.arrays = self.metadata.pop('arrays')
    if any('group' not in entry for entry in self.arrays.values()):
      raise UserError(
          f'expected groups of arrays in {self.folder}, found the form of an '
          f'earlier version; write the weights again with this one'
      )
    self.shapes = {
        path: jax.ShapeDtypeStruct(
            tuple(entry['shape']), jnp.dtype(entry['dtype'])
        )
        for path, entry in self.arrays.items()
    }

  def read(self, path: str) -> np.ndarray:
    """Returns one leaf with the dtype in which it was saved."""
    # The type that is asked for keeps the leaf off the devices.
    arguments = ocp.args.PyTreeRestore(
        item=nest({path: self.shapes[path]}),
        restore_args=nest({path: ocp.RestoreArgs(restore_type=np.ndarray)}),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      restored = checkpointer.restore(self._group(path), arguments)
    return flatten(restored)[path]

  def restore(self, targets: Leaves) -> Leaves:
    """Reads all leaves into the shapes, dtypes and shardings of targets.

    Args:
      targets: {path: shape, dtype and sharding}, of all leaves. Tables may
        have rows that pad them, and get zeros there; any floating dtype may
        be asked for.

    Raises:
      UserError: the targets are not the leaves of the folder. No array was
        read.
    """
    require_same_leaves(
        {
            path: _as_target(path, entry, targets.get(path))
            for path, entry in self.arrays.items()
        },
        describe_leaves(targets),
        f'weights {self.folder}',
    )
    groups: dict[Path, Leaves] = {}
    for path in self.arrays:
      groups.setdefault(self._group(path), {})[path] = targets[path]
    leaves = {}
    with ocp.StandardCheckpointer() as checkpointer:
      for folder, group in groups.items():
        # Shapes were compared: only padding is added.
        restored = checkpointer.restore(folder, nest(group), strict=False)
        leaves |= flatten(restored)
    return leaves

  def _group(self, path: str) -> Path:
    return self.folder / _ARRAYS / str(self.arrays[path]['group'])


def load_weights(
    folder: str | os.PathLike, abstract_params: Tree
) -> tuple[Tree, dict[str, Any]]:
  """Reads weights into the shapes, dtypes and shardings of a target.

  Args:
    folder: as given to `save_weights`.
    abstract_params: nested dictionaries of `jax.ShapeDtypeStruct` with
      shardings (or of arrays) on any mesh, scanned or unrolled.

  Returns:
    The parameters and the metadata.

  Raises:
    DamagedCheckpoint: a file is not what was written.
    UserError: there is no such folder, another version wrote it, or it does
      not fit the target. No array was read.
  """
  saved = SavedWeights(folder)
  leaves = saved.restore(abstract_leaves(abstract_params))
  return stack_leaves(leaves, abstract_params), saved.metadata


def _groups(leaves: Iterable[tuple[str, Any]]) -> Iterator[Leaves]:
  """Yields {path: array} of successive leaves, up to `_GROUP_BYTES` each."""
  group: Leaves = {}
  size = 0
  for path, leaf in leaves:
    if group and size + leaf.nbytes > _GROUP_BYTES:
      yield group
      group, size = {}, 0
    group[path] = leaf
    size += leaf.nbytes
  if group:
    yield group


def _is_table(path: str) -> bool:
  return f'/{path}'.endswith(tuple(f'/{table}' for table in _TABLES))


def _without_padding(path: str, leaf: Any, vocab_size: int) -> Any:
  """Returns a table without the rows that pad it, any other leaf as it is."""
  if not _is_table(path) or leaf.shape[0] != padded_vocab_size(vocab_size):
    return leaf
  if not isinstance(leaf, jax.Array):
    return leaf[:vocab_size]
  sharding = leaf.sharding
  if isinstance(sharding, NamedSharding):
    # What is left may not divide into the rows' shards.
    spec = PartitionSpec(None, *sharding.spec[1:])
    sharding = NamedSharding(sharding.mesh, spec)
  return jax.jit(lambda x: x[:vocab_size], out_shardings=sharding)(leaf)


def _as_target(
    path: str, entry: Mapping[str, Any], target: Any
) -> dict[str, Any]:
  """Returns an entry of metadata as it is once padding and cast are done."""
  shape, dtype = list(entry['shape']), jnp.dtype(entry['dtype'])
  if target is not None:
    if _is_table(path) and target.shape[0] == padded_vocab_size(shape[0]):
      shape[0] = target.shape[0]
    if all(jnp.issubdtype(x, jnp.floating) for x in (dtype, target.dtype)):
      dtype = target.dtype
  return {'shape': shape, 'dtype': str(dtype)}


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
