"""The first weights of a run: drawn, or those of other models.

conversion/init_from.py says which are which; here they are read, cast or
quantised, and placed on the devices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from codet5p_jax.array_typing import Tree
from codet5p_jax.conversion.init_from import Initialisation, listed
from codet5p_jax.errors import UserError
from codet5p_jax.layers.quantization import store
from codet5p_jax.training.checkpoints.fingerprint import digest_array
from codet5p_jax.training.checkpoints.layout import (
    flatten,
    nest,
    stack_leaves,
    unstack_leaves,
)


def check_frozen(initialisation: Initialisation, abstract_frozen: Tree) -> None:
  """Checks that nothing is frozen in the state in which it was drawn.

  Raises:
    UserError: a frozen parameter has no source, although others have.
  """
  if not initialisation.origins:
    return
  frozen = [
      path
      for path in _parameters(unstack_leaves(flatten(abstract_frozen)))
      if path not in initialisation.origins
  ]
  if frozen:
    raise UserError(
        f'expected every frozen parameter to have a source, found that '
        f'INIT_FROM lets {listed(frozen)} be drawn; give a source, or make '
        f'them TRAINABLE'
    )


def load_given(
    initialisation: Initialisation,
    abstract: Tree,
    axis_names: Mapping[str, Sequence[str | None]],
) -> tuple[dict[str, jax.Array], dict[str, str]]:
  """Reads the given parameters of a tree, one at a time, onto the devices.

  Args:
    initialisation: where they come from.
    abstract: `jax.ShapeDtypeStruct` with shardings: parameters of a TrainState,
      or a part of them, scanned or unrolled. An int8 leaf is quantised here,
      before it reaches a device.
    axis_names: of the parameters, by their path in `abstract`.

  Returns:
    {path in `abstract`: array} of those that have a source, and {path in a
    checkpoint: `digest_array` of what was read}, before any cast.

  Raises:
    UserError: a source is damaged, or holds NaN or an infinite number.
  """
  targets = flatten(abstract)
  stacks = _stacks(targets)
  arrays: dict[str, jax.Array] = {}
  digests: dict[str, str] = {}
  for paths in stacks:
    layers = unstack_leaves({path: targets[path] for path in paths})
    names = _parameters(layers)
    given = [name for name in names if name in initialisation.origins]
    if not given:
      continue
    if len(given) < len(names):
      raise UserError(
          f'expected a source for every layer of a stack, found none for '
          f'{listed([name for name in names if name not in given])}; give '
          f'them one, or set SCAN_LAYERS=False'
      )
    placed = {}
    for name in given:
      origin = initialisation.origins[name]
      array = origin.read()
      digests[name] = digest_array(name, array)
      origin.source.require_finite(origin.path, array)
      array = _with_all_tokens(array, initialisation.shapes[name])
      array = _with_padding(array, layers[name].shape)
      if layers[name].dtype == np.int8:
        # A layer's own axes are the last of its stack's.
        axes = axis_names[paths[0]][-array.ndim :]
        parts = store(name, array, axes, 'int8')
      else:
        parts = {name: array.astype(layers[name].dtype)}
      for path, part in parts.items():
        placed[path] = _place(part, layers[path])
    like = nest({path: targets[path] for path in paths})
    arrays |= flatten(stack_leaves(placed, like))
  return arrays, digests


def parts_table(
    initialisation: Initialisation, params: Tree, frozen_params: Tree
) -> list[dict[str, Any]]:
  """What a model is made of, one row per part, origin and treatment.

  Args:
    initialisation: of the model.
    params: the trainable parameters, arrays or their shapes.
    frozen_params: the others, likewise.

  Returns:
    Rows with `part` (the longest path that the parameters share), `parameters`
    (their number, padding left out), `trainable`, `dtype`, `bytes` in memory,
    and `source`.
  """
  rows: dict[tuple, dict[str, Any]] = {}
  for is_trainable, tree in ((True, params), (False, frozen_params)):
    leaves = unstack_leaves(flatten(tree))
    for path in leaves:
      name = path.removesuffix('_scale')
      name = name if name in initialisation.shapes else path
      origin = initialisation.origins.get(name)
      source = 'drawn' if origin is None else origin.source.name
      row = rows.setdefault(
          (path.split('/')[0], is_trainable, source),
          {'paths': [], 'parameters': 0, 'dtypes': {}, 'bytes': 0},
      )
      row['paths'].append(name)
      if path == name:
        row['parameters'] += int(np.prod(initialisation.shapes[name]))
      size = leaves[path].size * leaves[path].dtype.itemsize
      dtype = str(leaves[path].dtype)
      row['dtypes'][dtype] = row['dtypes'].get(dtype, 0) + size
      row['bytes'] += size
  return [
      {
          'part': _common_path(row['paths']),
          'parameters': row['parameters'],
          'trainable': is_trainable,
          # The one that most of its bytes have: norms of an int8 part are not.
          'dtype': max(row['dtypes'], key=row['dtypes'].__getitem__),
          'bytes': row['bytes'],
          'source': source,
      }
      for (_, is_trainable, source), row in rows.items()
  ]


def format_parts(rows: Sequence[Mapping[str, Any]]) -> str:
  """The rows of `parts_table` as lines of text."""
  lines = [
      f'{"part":36}{"parameters":>16}  {"":9}  {"dtype":8}  {"memory":>9}  from'
  ]
  for row in rows:
    treatment = 'trainable' if row['trainable'] else 'frozen'
    lines.append(
        f'{row["part"]:36}{row["parameters"]:16,}  {treatment:9}  '
        f'{row["dtype"]:8}  {row["bytes"] / 1e9:6.3f} GB  {row["source"]}'
    )
  return '\n'.join(lines)


def _parameters(layers: Mapping[str, Any]) -> list[str]:
  """Paths of the parameters among leaves: an int8 kernel's scale is none."""
  return [
      path
      for path in layers
      if not (path.endswith('_scale') and path.removesuffix('_scale') in layers)
  ]


def _stacks(targets: Mapping[str, Any]) -> list[list[str]]:
  """Paths that are read together: a kernel and its scale."""
  return [
      [path, *([f'{path}_scale'] if f'{path}_scale' in targets else [])]
      for path in _parameters(targets)
  ]


def _with_all_tokens(
    array: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  """Draws the rows of the tokens that a source's table does not have.

  Rows of zeros would not do: a norm multiplies their gradients by a thousand.
  """
  missing = shape[0] - array.shape[0] if shape else 0
  if not missing:
    return array
  rows = np.random.default_rng(0).normal(
      0.0, array.std(dtype=np.float32), (missing, *shape[1:])
  )
  return np.concatenate([array, rows.astype(array.dtype)])


def _with_padding(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  padding = shape[0] - array.shape[0] if shape else 0
  if not padding:
    return array
  return np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))


def _place(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
  if array.shape != target.shape:
    raise ValueError(f'expected {target.shape}, found {array.shape}')
  # Every process has the whole array and hands out the parts it needs.
  return jax.make_array_from_callback(
      array.shape, target.sharding, lambda index: array[index]
  )


def _common_path(paths: Sequence[str]) -> str:
  """The longest whole path above all of these.

  >>> _common_path(['decoder/last/query', 'decoder/last/key'])
  'decoder/last'
  """
  common = paths[0].split('/')
  for path in paths[1:]:
    words = path.split('/')
    length = next(
        (i for i, pair in enumerate(zip(common, words)) if pair[0] != pair[1]),
        min(len(common), len(words)),
    )
    common = common[:length]
  return '/'.join(common)
