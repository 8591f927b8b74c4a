"""Two sums over the bits of every array, whatever its mesh and sharding.

Checksums of files tell whether files are those that were written. These tell
whether arrays are those that were trained: a restore that read only a part or
put it elsewhere, and a save that was wrong from the start, give other sums.

Both wrap around at 2**32, so the order of adding plays no part:

- `bits`: over the bit patterns, read as unsigned integers.
- `places`: over the same, each scrambled with its position first. A product
  with the position would miss what is swapped over a distance of 2**16 where
  the low half of the bits is empty, as in float32 that was once bfloat16.

Metadata hold them as `sums`; another recipe would need another name there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from codet5p_jax.training.checkpoints.layout import Leaves, plan_layers

# Odd, and near 2**32 / golden ratio: neighbours get unlike patterns.
_STRIDE = np.uint32(0x9E3779B9)

# Of the last step of MurmurHash3: every bit of the input reaches every other.
_MIX = ((16, np.uint32(0x85EBCA6B)), (13, np.uint32(0xC2B2AE35)))

# Enough for NumPy to be fast, and little memory.
_WORDS_AT_ONCE = 2**20

# Sums on their way: those of a leaf, by device, and the paths of its layers.
PendingSums = list[tuple[tuple[str, ...], jax.Array]]


def dispatch_sums(leaves: Leaves, every_copy: bool = False) -> PendingSums:
  """Starts the sums of arrays where they lie, in one pass over each.

  Every device sums its own part. Nothing is exchanged: on CPU, programs that
  wait for each other's devices and are under way together can lock up.

  Args:
    leaves: {path: array}, scanned or unrolled. Layers are not cut over a mesh.
    every_copy: add up all copies of what several devices hold, rather than take
      one of them.

  Returns:
    What `collect_sums` takes.
  """
  return [
      (
          (path,) if layers is None else layers,
          _summer(
              getattr(leaves[path], 'sharding', None),
              layers is not None,
              every_copy,
          )(leaves[path]),
      )
      for path, layers in plan_layers(leaves).items()
  ]


def collect_sums(pending: PendingSums) -> dict[str, list[int]]:
  """Waits for sums; returns [bits, places] of each array of a checkpoint.

  Every process calls it and gets those of whole arrays.
  """
  if not pending:
    return {}
  parts = jax.device_get([
      [shard.data for shard in sums.addressable_shards] for _, sums in pending
  ])
  table = np.concatenate([
      np.sum(part, axis=(0, 1), dtype=np.uint32).reshape(-1, 2)
      for part in parts
  ])
  if jax.process_count() > 1:
    table = np.sum(
        multihost_utils.process_allgather(table), axis=0, dtype=np.uint32
    )
  paths = [path for paths, _ in pending for path in paths]
  return dict(zip(paths, table.tolist(), strict=True))


def sum_array(array: np.ndarray) -> list[int]:
  """Returns [bits, places] of an array in this process's memory."""
  words = np.ascontiguousarray(array).reshape(-1)
  words = words.view(f'u{min(words.dtype.itemsize, 4)}')
  totals = np.zeros(2, np.uint64)
  for first in range(0, words.size, _WORDS_AT_ONCE):
    part = words[first : first + _WORDS_AT_ONCE].astype(np.uint32)
    position = np.arange(first, first + part.size).astype(np.uint32)
    scrambled = _scramble(part, position)
    totals += [x.sum(dtype=np.uint64) for x in (part, scrambled)]
  return [int(total) % 2**32 for total in totals]


def count_copies(array: jax.Array) -> int:
  """On how many devices each part of an array lies."""
  places = array.sharding.devices_indices_map(array.shape)
  return len(places) // len({str(place) for place in places.values()})


def describe_difference(
    found: list[int], expected: list[int], copies: int = 1
) -> str | None:
  """Says how an array differs from the one that was saved; None: it does not.

  >>> describe_difference([14, 2], [7, 2], copies=2)
  'has its numbers in other places than were saved'

  Args:
    found: [bits, places], of all copies together.
    expected: of one.
    copies: how many there are.
  """
  expected = [(copies * part) % 2**32 for part in expected]
  if found == expected:
    return None
  if found[0] == expected[0]:
    return 'has its numbers in other places than were saved'
  return 'has other numbers than were saved'


# As in layout.py: a function made anew would compile anew.
@functools.lru_cache(maxsize=256)
def _summer(sharding: Sharding | None, is_stack: bool, every_copy: bool):
  """Returns a function of an array to [devices, 2], or [devices, layers, 2]."""
  if not isinstance(sharding, NamedSharding):
    mesh, spec = None, PartitionSpec()
    return jax.jit(lambda array: _sum_part(array, mesh, spec, is_stack, True))
  mesh, spec = sharding.mesh, sharding.spec
  return jax.jit(
      jax.shard_map(
          lambda part: _sum_part(part, mesh, spec, is_stack, every_copy),
          mesh=mesh,
          in_specs=spec,
          out_specs=PartitionSpec(mesh.axis_names),
          check_vma=False,
      )
  )


def _sum_part(
    part: jax.Array,
    mesh: Mesh | None,
    spec: PartitionSpec,
    is_stack: bool,
    every_copy: bool,
) -> jax.Array:
  """Returns the sums over what one device has, with its place in the whole."""
  words = _as_words(part)
  axes = tuple(range(int(is_stack), words.ndim))
  position = jnp.zeros_like(words)
  stride, used = 1, set()
  for axis in reversed(axes):
    names = spec[axis] if axis < len(spec) else None
    names = (names,) if isinstance(names, str) else names or ()
    size = words.shape[axis]
    index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    if names:
      used |= set(names)
      index += jax.lax.axis_index(names).astype(jnp.uint32) * np.uint32(size)
    position += index * np.uint32(stride % 2**32)
    stride *= size * int(np.prod([mesh.shape[name] for name in names]))
  scrambled = _scramble(words, position)
  sums = jnp.stack(
      [x.sum(axes, dtype=jnp.uint32) for x in (words, scrambled)], axis=-1
  )
  names = () if every_copy else mesh.axis_names
  if copies := tuple(name for name in names if name not in used):
    # All but one of them count for nothing.
    sums = jnp.where(jax.lax.axis_index(copies) == 0, sums, 0)
  return sums[None]


def _scramble(words, position):
  """Of JAX or NumPy, uint32 both."""
  scrambled = words ^ (position * _STRIDE)
  for shift, factor in _MIX:
    scrambled = (scrambled ^ (scrambled >> shift)) * factor
  return scrambled ^ (scrambled >> 16)


def _as_words(array: jax.Array) -> jax.Array:
  """Returns the bit patterns as uint32; of 8 bytes, two on a last axis."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  size = array.dtype.itemsize
  if size >= 4:
    return jax.lax.bitcast_convert_type(array, jnp.uint32)
  narrow = {1: jnp.uint8, 2: jnp.uint16}[size]
  return jax.lax.bitcast_convert_type(array, narrow).astype(jnp.uint32)
