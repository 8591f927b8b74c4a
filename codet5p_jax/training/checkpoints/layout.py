"""Per-layer arrays: how a tree is laid out in a checkpoint.

In memory a stack of layers is scanned, one array per weight with a leading
axis of layers under the key `layers`, or unrolled, one array per layer under
`layers_0`, `layers_1`, ... A checkpoint always holds the unrolled form, so
that one folder serves both, and the target of a restore chooses.

    encoder/layers/mlp/wi/kernel [layers, embed, mlp]
      -> encoder/layers_0/mlp/wi/kernel [embed, mlp], ...

Trees are flattened to {path: leaf} with `/` between keys, field names and
positions. No class of flax or optax is part of a checkpoint.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from codet5p_jax.array_typing import Tree

# The key of a scanned stack.
LAYERS = 'layers'

# Arrays or their shapes, by path.
Leaves = dict[str, Any]


def flatten(tree: Tree) -> Leaves:
  """Returns {path: leaf} of any pytree, in the order of its leaves.

  Raises:
    ValueError: a leaf has no shape and dtype, a key holds a `/`, two leaves
      share a path, or the tree is a single leaf without a name.
  """
  leaves = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    names = [
        jax.tree_util.keystr((key,), simple=True, separator='/')
        for key in keys
    ]
    path = '/'.join(names)
    if not names or any('/' in name or not name for name in names):
      raise ValueError(f'expected keys without "/", found {names}')
    if path in leaves:
      raise ValueError(f'two leaves share the path {path}')
    if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
      raise ValueError(f'expected an array at {path}, found {type(leaf)}')
    leaves[path] = leaf
  return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested dictionaries of {path: leaf}."""
  tree = {}
  for path, leaf in leaves.items():
    *folders, name = path.split('/')
    branch = tree
    for folder in folders:
      branch = branch.setdefault(folder, {})
    branch[name] = leaf
  return tree


def unstack_layers(tree: Tree) -> dict[str, Any]:
  """Returns the tree as it lies in a checkpoint.

  Stacked arrays are cut by jitted code where they lie: a layer keeps the
  sharding of its stack without the first entry. The result needs as much
  device memory again as the stacked arrays of the tree.

  Args:
    tree: any pytree of arrays, or of `jax.ShapeDtypeStruct`.

  Returns:
    Nested dictionaries; leaves outside stacks are the same objects.
  """
  return nest(unstack_leaves(flatten(tree)))


def stack_layers(tree: Tree, like: Tree) -> Tree:
  """Returns the leaves of `unstack_layers` in the structure of `like`.

  Args:
    tree: nested dictionaries of arrays, one per layer.
    like: the target, scanned or unrolled; its leaves give the shardings.

  Raises:
    ValueError: the two trees do not hold the same leaves.
  """
  return stack_leaves(flatten(tree), like)


def unstack_leaves(leaves: Leaves) -> Leaves:
  """As `unstack_layers`, on {path: leaf}."""
  unstacked = {}
  for path, layer_paths in plan_layers(leaves).items():
    if layer_paths is None:
      parts = {path: leaves[path]}
    else:
      parts = dict(zip(layer_paths, _split(leaves[path]), strict=True))
    if unstacked.keys() & parts.keys():
      raise ValueError(f'{path} is both a stack and unrolled')
    unstacked |= parts
  return unstacked


def stack_leaves(leaves: Leaves, like: Tree) -> Tree:
  """As `stack_layers`, on {path: leaf}; empties `leaves` as it goes.

  Taking each layer out before the next stack is built keeps the peak of
  memory at the whole tree and one stack.
  """
  targets = flatten(like)
  restored = []
  for path, layer_paths in plan_layers(targets).items():
    paths = (path,) if layer_paths is None else layer_paths
    missing = [name for name in paths if name not in leaves]
    if missing:
      raise ValueError(f'expected a leaf {missing[0]}, found none')
    parts = [leaves.pop(name) for name in paths]
    restored.append(
        parts[0] if layer_paths is None else _stack(parts, targets[path])
    )
  if leaves:
    raise ValueError(f'unexpected leaf {next(iter(leaves))}')
  return jax.tree.unflatten(jax.tree.structure(like), restored)


def iterate_layers(tree: Tree) -> Iterator[tuple[str, Any]]:
  """Yields (path, array) as in a checkpoint, one array at a time."""
  leaves = flatten(tree)
  for path, layer_paths in plan_layers(leaves).items():
    if layer_paths is None:
      yield path, leaves[path]
      continue
    for index, name in enumerate(layer_paths):
      if isinstance(leaves[path], jax.Array):
        yield name, _layer(leaves[path], index)
      else:
        yield name, leaves[path][index]


def plan_layers(leaves: Leaves) -> dict[str, tuple[str, ...] | None]:
  """Returns the paths of each leaf's layers, None where it is no stack.

  The leaves under one `layers` key are a stack if they share their leading
  size. Otherwise they are none: a factored optimizer keeps placeholders of
  shape [1] there. Those are stored as they are, and can then be restored
  only into the form they came from.
  """
  sizes = {}
  for path, leaf in leaves.items():
    if (prefix := _stack_prefix(path)) is not None:
      sizes.setdefault(prefix, set()).add(leaf.shape[0] if leaf.shape else 0)
  plan = {}
  for path in leaves:
    prefix = _stack_prefix(path)
    if prefix is None or len(sizes[prefix]) > 1 or sizes[prefix] == {0}:
      plan[path] = None
      continue
    (num_layers,) = sizes[prefix]
    rest = path[len(prefix) :]
    plan[path] = tuple(
        f'{prefix}_{index}{rest}' for index in range(num_layers)
    )
  return plan


def _stack_prefix(path: str) -> str | None:
  """Returns the path up to and with its first key `layers`, if inside one."""
  names = path.split('/')
  if LAYERS not in names[:-1]:
    return None
  return '/'.join(names[: names.index(LAYERS) + 1])


def _split(leaf: Any) -> list[Any]:
  """Cuts a stacked array, or its shape, into one per layer."""
  sharding = _layer_sharding(getattr(leaf, 'sharding', None))
  if isinstance(leaf, jax.ShapeDtypeStruct):
    layer = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)
    return [layer] * leaf.shape[0]
  if isinstance(leaf, jax.Array):
    return _splitter(leaf.shape[0], sharding)(leaf)
  return list(np.asarray(leaf))


def _stack(layers: list[Any], target: Any) -> Any:
  """Stacks one array per layer into the sharding of the target."""
  if isinstance(layers[0], jax.Array):
    return _stacker(getattr(target, 'sharding', None))(layers)
  return np.stack(layers)


def _layer_sharding(sharding: Sharding | None) -> Sharding | None:
  """Returns the sharding of one layer, given that of its stack."""
  if isinstance(sharding, NamedSharding):
    return NamedSharding(
        sharding.mesh,
        PartitionSpec(*sharding.spec[1:]),
        memory_kind=sharding.memory_kind,
    )
  return sharding


# The caches keep one function per sharding, and with it what jit compiled:
# making the function anew at each save would compile anew at each save.
@functools.lru_cache(maxsize=256)
def _splitter(num_layers: int, sharding: Sharding | None):
  def split(stacked):
    return [
        jax.lax.index_in_dim(stacked, index, keepdims=False)
        for index in range(num_layers)
    ]

  return jax.jit(split, out_shardings=sharding)


@functools.lru_cache(maxsize=256)
def _stacker(sharding: Sharding | None):
  return jax.jit(jnp.stack, out_shardings=sharding)


@jax.jit
def _layer(stacked, index):
  return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)
