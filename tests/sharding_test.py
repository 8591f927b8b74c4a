import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec

from codet5p_jax import sharding
from codet5p_jax.errors import UserError
from codet5p_jax.losses import cross_entropy
from codet5p_jax.models.bimodal import BimodalConfig
from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.shallow_encoder_deep_decoder import (
    ShallowEncoderDeepDecoderConfig,
)
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.planning.topology import topology_devices
from codet5p_jax.sharding import DEFAULT_RULES

CODEGEN_350M = CodeGenConfig(51200, 1024, 20, 16, 64, 32, 4096)
CODEGEN_16B = CodeGenConfig(51200, 6144, 34, 24, 256, 64, 24576)
MODELS = {
    '220m': (T5Config(32100, 768, 12, 64, 3072, 12, 12), Computation()),
    '770m': (T5Config(32100, 1024, 16, 64, 4096, 24, 24), Computation()),
    'unrolled': (
        T5Config(32100, 768, 12, 64, 3072, 12, 2),
        Computation(scan_layers=False),
    ),
    'bimodal': (
        BimodalConfig(32103, 768, 12, 64, 3072, 12, 12), Computation()
    ),
    'codegen': (CODEGEN_350M, Computation()),
    'deep_16b': (
        ShallowEncoderDeepDecoderConfig(CODEGEN_350M, CODEGEN_16B),
        Computation(),
    ),
}


def eight_devices():
  return jax.devices()[:8]


@pytest.mark.parametrize(
    ('shape', 'expected'),
    [
        ((1, 4, 2), (1, 4, 2)),
        ((1, -1, 2), (1, 4, 2)),
        ([-1, 2, 1], (4, 2, 1)),
        ((2, 4, -1), (2, 4, 1)),
    ],
)
def test_meshes_hold_each_device_once_in_order(shape, expected):
  mesh = sharding.make_mesh(shape, eight_devices())
  assert dict(mesh.shape) == dict(
      zip(('replica', 'data', 'model'), expected, strict=True)
  )
  assert mesh.devices.ravel().tolist() == eight_devices()
  assert sharding.batch_axes_size(mesh) == expected[0] * expected[1]


@pytest.mark.parametrize(
    'shape', [(8,), (1, 2, 2, 2), (-1, -1, 2), (0, 4, 2), (1, -2, -4), ()]
)
def test_shapes_that_are_no_mesh_are_refused(shape):
  with pytest.raises(UserError) as error:
    sharding.make_mesh(shape, eight_devices())
  message = str(error.value)
  assert 'expected a mesh shape (replica, data, model)' in message
  assert f'found {shape}; set MESH_SHAPE' in message
  assert '\n' not in message


@pytest.mark.parametrize(
    'shape', [(1, 4, 1), (2, 4, 2), (1, -1, 3), (3, 3, -1)]
)
def test_shapes_that_do_not_use_every_device_once_are_refused(shape):
  with pytest.raises(UserError) as error:
    sharding.make_mesh(shape, eight_devices())
  message = str(error.value)
  assert f'mesh shape {shape} (replica, data, model) needs' in message
  assert 'there are 8; set MESH_SHAPE so that its product is 8' in message
  assert '\n' not in message


@pytest.fixture(scope='module')
def two_slices():
  """Two slices of four chips each, as the compiler knows them."""
  topology_devices('v5e:1x1')  # Starts it with what it asks for.
  topology = topologies.get_topology_desc('v5e:2x2', 'tpu', num_slices=2)
  return topology.devices


@pytest.mark.parametrize('shape', [(2, 4, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1)])
def test_only_the_replica_axis_goes_from_slice_to_slice(two_slices, shape):
  mesh = sharding.make_mesh(shape, two_slices[::-1])
  assert mesh.devices.shape == shape
  assert set(mesh.devices.flat) == set(two_slices)
  slices = [
      {device.slice_index for device in replica.flat}
      for replica in mesh.devices
  ]
  half = shape[0] // 2
  assert slices == [{0}] * half + [{1}] * half


def test_one_slice_is_cut_as_it_likes(two_slices):
  mesh = sharding.make_mesh((1, -1, 1), two_slices[:4])
  assert set(mesh.devices.flat) == set(two_slices[:4])


@pytest.mark.parametrize('shape', [(1, 8, 1), (1, 4, 2)])
def test_nothing_is_sharded_from_slice_to_slice(two_slices, shape):
  with pytest.raises(UserError) as error:
    sharding.make_mesh(shape, two_slices)
  assert str(error.value) == (
      f'expected the replica axis to be a multiple of the 2 slices, since '
      f'parameters are sharded within a slice, found mesh shape {shape} '
      f'(replica, data, model); set MESH_SHAPE=(2, -1, {shape[2]})'
  )


def test_an_unknown_logical_axis_is_an_error_and_not_a_copy():
  with pytest.raises(ValueError, match=r"\['wings'\] are in no sharding rule"):
    sharding.partition_spec(('embed', 'wings'), DEFAULT_RULES)
  assert sharding.partition_spec(
      ('batch', None, 'act_heads'), DEFAULT_RULES
  ) == PartitionSpec(('replica', 'data'), None, 'model')


def test_activations_are_pinned_only_inside_the_context():
  x = jnp.zeros((8, 6))
  mesh = sharding.make_mesh((1, 4, 2), eight_devices())

  @jax.jit
  def pinned():
    return sharding.constrain(jnp.ones((8, 6)), 'batch', 'act_mlp')

  assert sharding.constrain(x, 'no', 'names') is x
  with sharding.activation_sharding(mesh, DEFAULT_RULES):
    with pytest.raises(ValueError, match='no sharding rule'):
      sharding.constrain(x, 'batch', 'wings')
    found = pinned()
  assert sharding.constrain(x, 'no', 'names') is x
  assert found.sharding.shard_shape(found.shape) == (2, 3)


def abstract_parameters(model):
  return jax.eval_shape(model.init_params, jax.random.key(0))


@pytest.mark.parametrize('name', MODELS)
def test_rules_cut_every_parameter_over_a_mesh(name):
  """Each axis has a name, each name a rule, and no axis is cut unevenly."""
  config, computation = MODELS[name]
  boxed = abstract_parameters(config.make_model(computation))
  names = jax.tree.map(tuple, nn.get_partition_spec(boxed))
  mesh = sharding.make_mesh((1, 4, 2), eight_devices())
  shardings = sharding.tree_shardings(names, mesh, DEFAULT_RULES)
  leaves = zip(
      jax.tree.leaves(nn.unbox(boxed)),
      jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple)),
      jax.tree.leaves(shardings),
      strict=True,
  )
  for leaf, axes, leaf_sharding in leaves:
    assert None not in axes and len(axes) == leaf.ndim
    rules = dict(DEFAULT_RULES)
    sizes = [mesh.shape.get(rules[axis], 1) for axis in axes]
    cut = leaf_sharding.shard_shape(leaf.shape)
    assert cut == tuple(np.divide(leaf.shape, sizes))
    # Whatever is large lies on all devices, and on none of them twice.
    layer = [s for s, axis in zip(leaf.shape, axes) if axis != 'layers']
    assert np.prod(sizes) == mesh.size or np.prod(layer) < 100_000


@pytest.mark.parametrize('name', MODELS)
def test_every_pinned_activation_has_rules(name, monkeypatch):
  """Traces model and loss on a mesh, where a name without rule raises."""
  config, computation = MODELS[name]
  computation = dataclasses.replace(computation, remat_policy='dots')
  model = config.make_model(computation)
  params = nn.unbox(abstract_parameters(model))
  mesh = sharding.make_mesh((2, 2, 2), eight_devices())
  # One token, so that a decoder alone takes it too.
  source, target = jnp.ones((4, 1), jnp.int32), jnp.ones((4, 5), jnp.int32)
  seen = []
  constraint = jax.lax.with_sharding_constraint
  monkeypatch.setattr(
      jax.lax,
      'with_sharding_constraint',
      lambda x, s: seen.append((x.ndim, s.spec)) or constraint(x, s),
  )

  def loss(params):
    hidden = model.apply({'params': params}, source, target)
    head = model.apply({'params': params}, method='output_head')
    weights = jnp.ones(target.shape)
    return cross_entropy(
        hidden, head, target, weights, 3, computation.dtype
    )[0]

  with sharding.activation_sharding(mesh, DEFAULT_RULES):
    jax.eval_shape(jax.grad(loss), params)
  # Rows over the batch axes; heads, feed-forward width, vocabulary over model.
  batch = ('replica', 'data')
  assert {
      (4, PartitionSpec(batch, None, 'model', None)),
      (3, PartitionSpec(batch, None, 'model')),
      (3, PartitionSpec(batch, None, None)),
      (2, PartitionSpec(batch, 'model')),
      (2, PartitionSpec('model', None)),  # The table that is looked up.
  } == set(seen)
