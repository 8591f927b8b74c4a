"""The device mesh, and the rules from logical axis names to mesh axes.

A mesh has three axes: `replica` (whole copies, across slices), `data` (rows of
the batch, and parameters sharded in the same direction) and `model` (heads,
feed-forward width and vocabulary). Parameters and activations name their axes
by meaning; one tuple of rules maps a name to mesh axes. Names of parameters
and of activations differ (`embed`, `act_embed`), so sharding parameters over
`data` never shards an activation by accident.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codet5p_jax.array_typing import Tree
from codet5p_jax.errors import UserError

MESH_AXES = ('replica', 'data', 'model')

# Mesh axes over which the rows of a batch are spread.
BATCH_AXES = ('replica', 'data')

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

DEFAULT_RULES: Rules = (
    # Parameters.
    ('embed', 'data'),
    ('heads', 'model'),
    ('kv', None),
    ('mlp', 'model'),
    ('vocab', 'model'),
    ('layers', None),
    ('buckets', None),
    ('norm', None),
    # The width of the decoder, where that of the encoder stands beside it.
    ('decoder_embed', 'model'),
    ('projection', 'model'),
    ('classes', None),
    # Scales of int8 parameters.
    ('scale_embed', None),
    ('scale_decoder_embed', None),
    ('scale_heads', 'model'),
    ('scale_kv', None),
    ('scale_mlp', 'model'),
    ('scale_vocab', 'model'),
    # Activations.
    ('batch', BATCH_AXES),
    ('act_length', None),
    ('act_kv_length', None),
    ('act_embed', None),
    ('act_heads', 'model'),
    ('act_kv', None),
    ('act_mlp', 'model'),
    ('act_vocab', 'model'),
)

# To generate with: parameters are used with every token, for few rows. Cut over
# `data`, they would have to be gathered each time.
DECODING_RULES: Rules = tuple(
    (name, None) if name == 'embed' else (name, axes)
    for name, axes in DEFAULT_RULES
)


def make_mesh(
    mesh_shape: Sequence[int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Arranges devices as a (replica, data, model) mesh.

  Args:
    mesh_shape: sizes of the three axes; one of them may be -1 and takes what
      the others leave.
    devices: the devices, by default all that JAX sees.

  Raises:
    UserError: the shape does not multiply to the number of devices, or its
      replica axis cannot hold the slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = list(mesh_shape)
  if len(shape) != 3 or shape.count(-1) > 1 or 0 in shape or min(shape) < -1:
    raise UserError(
        f'expected a mesh shape (replica, data, model) of positive sizes, at '
        f'most one of them -1; found {tuple(mesh_shape)}; set MESH_SHAPE, '
        f'for instance (1, -1, 1)'
    )
  if -1 in shape:
    fixed = -math.prod(shape)
    shape[shape.index(-1)] = max(len(devices) // fixed, 1)
  if math.prod(shape) != len(devices):
    raise UserError(
        f'mesh shape {tuple(mesh_shape)} (replica, data, model) needs '
        f'{abs(math.prod(shape))} devices or a divisor of their number, but '
        f'there are {len(devices)}; set MESH_SHAPE so that its product is '
        f'{len(devices)}'
    )
  if devices[0].platform == 'tpu':
    grid = _arrange_on_torus(shape, devices)
  else:
    grid = np.asarray(devices).reshape(shape)
  return Mesh(grid, MESH_AXES)


def _arrange_on_torus(
    shape: Sequence[int], devices: Sequence[jax.Device]
) -> np.ndarray:
  """Orders TPU chips so that neighbours in the mesh are neighbours in space.

  Several slices are joined by the data centre's network, which is slow: along
  the replica axis, where only the sums of gradients travel.
  """
  from jax.experimental import mesh_utils

  num_slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if num_slices == 1:
    return mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True
    )
  replica, *within = shape
  if replica % num_slices:
    raise UserError(
        f'expected the replica axis to be a multiple of the {num_slices} '
        f'slices, since parameters are sharded within a slice, found mesh '
        f'shape {tuple(shape)} (replica, data, model); set MESH_SHAPE='
        f'({num_slices}, -1, {shape[2]})'
    )
  return mesh_utils.create_hybrid_device_mesh(
      [replica // num_slices, *within],
      [num_slices, 1, 1],
      devices,
      allow_split_physical_axes=True,
  )


def partition_spec(
    names: Sequence[str | None], rules: Rules
) -> PartitionSpec:
  """Translates logical axis names; an unknown name is an error, not a copy."""
  table = dict(rules)
  unknown = [name for name in names if name is not None and name not in table]
  if unknown:
    raise ValueError(
        f'logical axes {unknown} are in no sharding rule; known: '
        f'{sorted(table)}'
    )
  return PartitionSpec(*(None if n is None else table[n] for n in names))


def tree_shardings(names: Tree, mesh: Mesh, rules: Rules) -> Tree:
  """Maps a tree of logical axis tuples to a tree of NamedSharding."""
  return jax.tree.map(
      lambda axes: NamedSharding(mesh, partition_spec(axes, rules)),
      names,
      is_leaf=lambda x: isinstance(x, tuple),
  )


def batch_axes_size(mesh: Mesh) -> int:
  """The number of shards into which the rows of a batch are cut."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = (
    contextvars.ContextVar('codet5p_jax_mesh_and_rules', default=None)
)


@contextlib.contextmanager
def activation_sharding(mesh: Mesh, rules: Rules) -> Iterator[None]:
  """Within this context, `constrain` pins activations to the mesh."""
  token = _active.set((mesh, rules))
  try:
    yield
  finally:
    _active.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Pins an activation's sharding by logical axis names, one per dimension.

  Outside `activation_sharding` this checks nothing and returns `x`, so modules
  run unsharded in notebooks and tests without ceremony.
  """
  if (active := _active.get()) is None:
    return x
  mesh, rules = active
  sharding = NamedSharding(mesh, partition_spec(names, rules))
  return jax.lax.with_sharding_constraint(x, sharding)


def sharding_activations(
    mesh: Mesh | None, rules: Rules, function: Callable
) -> Callable:
  """The function, to be traced within `activation_sharding` of a mesh if any.

  For programs that are kept: what `jax.jit` keeps does not depend on contexts.
  """
  if mesh is None:
    return function

  @functools.wraps(function)
  def sharded(*args, **kwargs):
    with activation_sharding(mesh, rules):
      return function(*args, **kwargs)

  return sharded
