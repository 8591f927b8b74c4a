"""Reading a step of a checkpoint folder, all of it or none."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from codet5p_jax.array_typing import Tree
from codet5p_jax.errors import UserError
from codet5p_jax.training.checkpoints.description import (
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
from codet5p_jax.training.checkpoints.verify import verify
from codet5p_jax.training.files import read_json

# The items of arrays in a checkpoint, and the fields of TrainState they hold.
ARRAY_ITEMS = {
    'trainable': 'params',
    'optimizer': 'opt_state',
    'objective_state': 'objective_state',
}

# The name that Orbax gives to the one file of a JSON item.
_JSON_FILE = 'metadata'


def read_metadata(step_dir: Path) -> dict[str, Any]:
  """Returns the metadata of a step, without reading or verifying the rest.

  Raises:
    UserError: there is none, or a newer version wrote it.
  """
  return read_json(step_dir / 'metadata' / _JSON_FILE)


def restore_step(
    step_dir: Path, abstract_state: Any, frozen_fingerprint: str | None
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
  """Restores one step into the shapes and shardings of a target.

  Args:
    step_dir: folder of the step.
    abstract_state: a TrainState of `jax.ShapeDtypeStruct` with shardings (or
      of arrays) on any mesh, scanned or unrolled. Its frozen parameters are
      never read; they go into the result as they are.
    frozen_fingerprint: of the frozen parameters of this run; None if it has
      none.

  Returns:
    The state, the cursor and the metadata, as they were saved.

  Raises:
    DamagedCheckpoint: a file is not what was written.
    UserError: the checkpoint does not fit the target. No array was read.
  """
  verify(step_dir)
  metadata = read_metadata(step_dir)
  found = metadata.get('frozen_fingerprint')
  if found != frozen_fingerprint:
    raise UserError(
        f'expected in {step_dir} the frozen parameters with fingerprint '
        f'{frozen_fingerprint or "none"}, found {found or "none"}; give the '
        f'frozen source it was trained with, or another checkpoint'
    )
  items = {
      item: abstract_leaves(getattr(abstract_state, field))
      for item, field in ARRAY_ITEMS.items()
  }
  require_same_leaves(
      metadata['arrays'], describe_items(items), f'checkpoint {step_dir}'
  )
  fields = {
      field: stack_leaves(
          read_leaves(step_dir / item, items[item]),
          getattr(abstract_state, field),
      )
      for item, field in ARRAY_ITEMS.items()
  }
  fields['step'] = _scalar_like(metadata['step'], abstract_state.step)
  cursor = read_json(step_dir / 'cursor' / _JSON_FILE)
  return dataclasses.replace(abstract_state, **fields), cursor, metadata


def abstract_leaves(tree: Tree) -> Leaves:
  """Returns {path: shape, dtype and sharding}, per layer, of a target."""
  leaves = {path: _abstract(path, x) for path, x in flatten(tree).items()}
  return unstack_leaves(leaves)


def describe_items(items: dict[str, Leaves]) -> dict[str, dict[str, Any]]:
  """Returns shapes and dtypes by `item/path`."""
  return describe_leaves({
      f'{item}/{path}': leaf
      for item, leaves in items.items()
      for path, leaf in leaves.items()
  })


def read_leaves(folder: Path, targets: Leaves) -> Leaves:
  """Reads an item's arrays into the shardings of {path: target}.

  The shapes must have been compared before: Orbax would pad or cut.
  """
  if not targets:
    return {}
  with ocp.StandardCheckpointer() as checkpointer:
    return flatten(checkpointer.restore(folder, nest(targets)))


def _abstract(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    if jax.process_count() > 1:
      raise ValueError(f'expected a sharding for {path}, found none')
    sharding = SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _scalar_like(value: int, target: Any) -> jax.Array:
  target = _abstract('step', target)
  array = np.asarray(value, target.dtype)
  return jax.make_array_from_callback((), target.sharding, lambda _: array)
