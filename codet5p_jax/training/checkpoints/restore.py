"""Reading a step of a checkpoint folder, all of it or none."""

import contextlib
import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from codet5p_jax.array_typing import Tree
from codet5p_jax.errors import UserError
from codet5p_jax.storage import is_damage
from codet5p_jax.training.checkpoints.agreement import raising_together
from codet5p_jax.training.checkpoints.description import (
    Description,
    describe_leaves,
    require_same_leaves,
)
from codet5p_jax.training.checkpoints.layout import (
    Leaves,
    flatten,
    nest,
    plan_layers,
    stack_leaves,
    unstack_leaves,
)
from codet5p_jax.training.checkpoints.sums import (
    collect_sums,
    count_copies,
    describe_difference,
    dispatch_sums,
    sum_array,
)
from codet5p_jax.training.checkpoints.verify import (
    DamagedCheckpoint,
    telling_damage_apart,
    verify,
)
from codet5p_jax.training.files import UnreadableFile, read_json

_logger = logging.getLogger(__name__)

# The items of arrays in a checkpoint, and the fields of TrainState they hold.
ARRAY_ITEMS = {
    'trainable': 'params',
    'optimizer': 'opt_state',
    'objective_state': 'objective_state',
    'health': 'health',
}

# Items that former versions did not write. They start from zeros.
_LATER_ITEMS = ('health',)

# The name that Orbax gives to the one file of a JSON item.
_JSON_FILE = 'metadata'

# What each of them must have.
_KEYS = {'cursor': set(), 'metadata': {'step', 'arrays'}}

# In what TensorStore says of a machine or a mount rather than of a file.
_OF_THE_MACHINE = re.compile(
    'RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED'
)

# Of an error of Orbax, which may fill pages.
_WORDS = 200


def read_metadata(step_dir: Path) -> dict[str, Any]:
  """Returns the metadata of a step, without reading or verifying the rest.

  Raises:
    DamagedCheckpoint: it is missing or unreadable.
    UserError: a newer version wrote it.
  """
  return _read_json_item(step_dir, 'metadata')


def restore_step(
    step_dir: Path, abstract_state: Any, frozen_fingerprint: str | None
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
  """Restores one step into the shapes and shardings of a target.

  Every process calls it, and all raise what one of them finds. The first one
  compares the files with their checksums.

  Args:
    step_dir: folder of the step.
    abstract_state: a TrainState of `jax.ShapeDtypeStruct` with shardings (or
      of arrays) on any mesh, scanned or unrolled. Its frozen parameters are
      never read; they go into the result as they are. Nor are fields that are
      None.
    frozen_fingerprint: of the frozen parameters of this run; None if it has
      none.

  Returns:
    The state, the cursor and the metadata, as they were saved.

  Raises:
    DamagedCheckpoint: a file, or an array, is not what was written.
    UserError: the checkpoint does not fit the target. No array was read.
    ValueError: the target has frozen parameters without a fingerprint.
  """
  if flatten(abstract_state.frozen_params) and frozen_fingerprint is None:
    raise ValueError('frozen parameters need their frozen_fingerprint')
  with raising_together(step_dir):
    if jax.process_index() == 0:
      verify(step_dir)
  with raising_together(step_dir), telling_damage_apart(step_dir):
    cursor = _read_json_item(step_dir, 'cursor')
    metadata = read_metadata(step_dir)
    trees = {
        item: getattr(abstract_state, field)
        for item, field in ARRAY_ITEMS.items()
    }
    described = {
        path: entry
        for path, entry in metadata['arrays'].items()
        if trees.get(path.partition('/')[0], ()) is not None
    }
    items = {
        item: abstract_leaves(tree)
        for item, tree in trees.items()
        if tree is not None
    }
    new = _items_to_begin(described, items)
    saved = {item: x for item, x in items.items() if item not in new}
    if cursor.get('step', metadata['step']) != metadata['step']:
      raise DamagedCheckpoint(
          step_dir, f'cursor/{_JSON_FILE} is that of step {cursor["step"]}'
      )
    _require_frozen(step_dir, metadata, frozen_fingerprint)
    require_same_leaves(
        described, describe_items(saved), f'checkpoint {step_dir}'
    )
    arrays = {
        item: _read_arrays(step_dir, item, targets)
        for item, targets in saved.items()
    }
  for item in new:
    _logger.info('%s holds no %s yet, which begins anew.', step_dir, item)
    arrays[item] = {path: _zeros(leaf) for path, leaf in items[item].items()}
  # Computations over the whole mesh come after all processes have their part.
  fields = {
      ARRAY_ITEMS[item]: stack_leaves(arrays[item], trees[item])
      for item in items
  }
  fields['step'] = _scalar_like(metadata['step'], abstract_state.step)
  state = dataclasses.replace(abstract_state, **fields)
  _require_same_content(step_dir, described, state)
  return state, cursor, metadata


def abstract_leaves(tree: Tree) -> Leaves:
  """Returns {path: shape, dtype and sharding}, per layer, of a target."""
  leaves = {path: _abstract(path, x) for path, x in flatten(tree).items()}
  return unstack_leaves(leaves)


def array_leaves(state: Any) -> Leaves:
  """Returns {item/path: array} of a TrainState, stacked where it is."""
  return {
      f'{item}/{path}': leaf
      for item, field in ARRAY_ITEMS.items()
      for path, leaf in flatten(getattr(state, field)).items()
  }


def describe_items(items: dict[str, Leaves]) -> Description:
  """Returns shapes and dtypes by `item/path`."""
  return describe_leaves({
      f'{item}/{path}': leaf
      for item, leaves in items.items()
      for path, leaf in leaves.items()
  })


def list_arrays(step_dir: Path) -> Description:
  """Returns shapes and dtypes by `item/path`, as Orbax says it wrote them."""
  with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
    return describe_items({
        item: flatten(handler.metadata(step_dir / item).tree)
        for item in ARRAY_ITEMS
        if (step_dir / item).is_dir()  # Of an empty tree there is none.
    })


def find_fault(step_dir: Path, arrays: Description) -> str | None:
  """Reads the arrays of a step again, and says what is not as it was saved.

  One after the other, on this process alone, without a device.

  Args:
    step_dir: folder of the step, committed or not.
    arrays: by `item/path`: shape, dtype and `sums`.

  Returns:
    The first fault, None if there is none.
  """
  listed = list_arrays(step_dir)
  for path in sorted(listed.keys() | arrays.keys()):
    expected = dict(arrays.get(path, {}))
    sums = expected.pop('sums', None)
    if listed.get(path, {}) != expected:
      return (
          f'for {path} Orbax wrote {listed.get(path, "nothing")} instead of '
          f'{expected or "nothing"}'
      )
    item, _, name = path.partition('/')
    array = _read_array(step_dir / item, name)
    if fault := describe_difference(sum_array(array), sums):
      return f'{path} {fault}'
  return None


def _read_array(folder: Path, path: str) -> np.ndarray:
  """Reads one array of an item, past Orbax."""
  import tensorstore

  store = {
      'driver': 'zarr',
      'kvstore': {
          'driver': 'ocdbt',
          'base': f'file://{folder}/',
          'path': path.replace('/', '.'),
      },
  }
  return tensorstore.open(store, read=True).result().read().result()


def is_listed_by_orbax(step_dir: Path) -> bool:
  """Whether Orbax can read its own record of a step, or does without one."""
  if not step_dir.is_dir():
    return False
  if not (step_dir / '_CHECKPOINT_METADATA').exists():
    return True
  try:
    ocp.metadata.get_step_metadata(step_dir)
  except Exception:  # Of many kinds, by what is wrong with the file.
    return False
  return True


def read_leaves(folder: Path, targets: Leaves) -> Leaves:
  """Reads an item's arrays into the shardings of {path: target}.

  The shapes must have been compared before: Orbax would pad or cut.
  """
  if not targets:
    return {}
  # A checkpointer would wait for all processes at the end, and for ever where
  # one of them cannot read its part.
  with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
    arguments = ocp.args.StandardRestore(nest(targets))
    return flatten(handler.restore(folder, args=arguments))


def _read_arrays(step_dir: Path, item: str, targets: Leaves) -> Leaves:
  """Reads an item; files that Orbax cannot make arrays of are damage."""
  try:
    return read_leaves(step_dir / item, targets)
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise  # Of this machine.
  except Exception as error:
    if isinstance(error, OSError) and not is_damage(error):
      raise
    words = ' '.join(f'{type(error).__name__}: {error}'.split())[:_WORDS]
    if _OF_THE_MACHINE.search(str(error)):
      raise UserError(
          f'cannot read {item} of checkpoint {step_dir} ({words}); mend that, '
          f'and try again'
      ) from error
    raise DamagedCheckpoint(
        step_dir, f'{item} cannot be read ({words})'
    ) from error


def _read_json_item(step_dir: Path, item: str) -> dict[str, Any]:
  path = step_dir / item / _JSON_FILE
  if not path.is_file():
    raise DamagedCheckpoint(step_dir, f'{item}/{_JSON_FILE} is missing')
  try:
    content = read_json(path)
  except UnreadableFile as error:
    raise DamagedCheckpoint(
        step_dir, f'{item}/{_JSON_FILE} is unreadable'
    ) from error
  if missing := _KEYS[item] - content.keys():
    raise DamagedCheckpoint(
        step_dir, f'{item}/{_JSON_FILE} lacks {", ".join(sorted(missing))}'
    )
  return content


def _require_frozen(
    step_dir: Path, metadata: dict[str, Any], frozen_fingerprint: str | None
) -> None:
  """A step is that of its folder, trained beside these frozen parameters."""
  if str(metadata['step']) != step_dir.name:
    raise DamagedCheckpoint(
        step_dir, f'metadata/{_JSON_FILE} is that of step {metadata["step"]}'
    )
  found = metadata.get('frozen_fingerprint')
  if found != frozen_fingerprint:
    raise UserError(
        f'expected in {step_dir} the frozen parameters with fingerprint '
        f'{frozen_fingerprint or "none"}, found {found or "none"}; give the '
        f'frozen source it was trained with, or another checkpoint'
    )


def _require_same_content(
    step_dir: Path, saved: Description, state: Any
) -> None:
  """Compares the sums of arrays with those of the arrays that were saved."""
  if not any('sums' in entry for entry in saved.values()):
    return  # Of an earlier version.
  leaves = array_leaves(state)
  copies = {
      path: count_copies(leaves[stack])
      for stack, layers in plan_layers(leaves).items()
      for path in layers or (stack,)
  }
  # Every process has read its own.
  found = collect_sums(dispatch_sums(leaves, every_copy=True))
  for path, entry in saved.items():
    if fault := describe_difference(found[path], entry['sums'], copies[path]):
      raise DamagedCheckpoint(step_dir, f'{path} {fault}')


def _abstract(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    if jax.process_count() > 1:
      raise ValueError(f'expected a sharding for {path}, found none')
    sharding = SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _items_to_begin(saved: Description, items: dict[str, Leaves]) -> list[str]:
  """Items that a former version did not save, and this target has."""
  there = {path.partition('/')[0] for path in saved}
  return [
      item for item in _LATER_ITEMS if items.get(item) and item not in there
  ]


def _zeros(target: jax.ShapeDtypeStruct) -> jax.Array:
  array = np.zeros(target.shape, target.dtype)
  return jax.make_array_from_callback(
      target.shape, target.sharding, lambda index: array[index]
  )


def _scalar_like(value: int, target: Any) -> jax.Array:
  target = _abstract('step', target)
  array = np.asarray(value, target.dtype)
  return jax.make_array_from_callback((), target.sharding, lambda _: array)
