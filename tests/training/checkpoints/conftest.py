"""A tiny train state, scanned or unrolled, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codet5p_jax.training.train_step import TrainState

# All sizes differ. Embed and heads can be cut over meshes of up to 8 and 4.
LAYERS, EMBED, HEADS, KV, VOCAB, BUCKETS = 3, 8, 4, 5, 16, 6
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
SPECS = {
    'kernel': PartitionSpec('data', 'model', None),
    'scale': PartitionSpec('data'),
    'embedding': PartitionSpec('model', None),
}


class States:
  """Makes states of the same numbers in every layout."""

  def make(
      self,
      *,
      scanned=True,
      mesh_shape=(1, 4, 2),
      step=7,
      layers=LAYERS,
      frozen=True,
      objective_state=True,
  ):
    """Returns a state of arrays with shardings."""
    numbers = np.random.default_rng(step)

    def draw(*shape):
      return numbers.standard_normal(shape, np.float32)

    params = {
        'token_embedder': {'embedding': draw(VOCAB, EMBED)},
        'encoder': {
            'layers': {
                'attention': {'kernel': draw(layers, EMBED, HEADS, KV)},
                'norm': {'scale': draw(layers, EMBED)},
            },
            'final_norm': {'scale': draw(EMBED)},
        },
    }
    # Bits that arithmetic would not keep.
    params['encoder']['final_norm']['scale'][:3] = [np.nan, -0.0, 1e-45]
    opt_state = jax.tree.map(
        lambda x: (
            jnp.int32(step)
            if x.dtype == jnp.int32
            else draw(*x.shape).astype(x.dtype)
        ),
        OPTIMIZER.init(params),
    )
    queue = {'queue': draw(7, 9).astype(jnp.bfloat16), 'next': np.int32(4)}
    state = TrainState(
        step=np.int32(step),
        params=params,
        frozen_params={'head': {'kernel': draw(2, 3)}} if frozen else {},
        opt_state=opt_state,
        objective_state={'contrastive': queue} if objective_state else {},
    )
    state = state if scanned else self.unroll(state)
    return self.place(state, mesh_shape)

  def abstract(self, **layout):
    """Returns the shapes and shardings of `make`."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        self.make(**layout),
    )

  def place(self, state, mesh_shape):
    """Puts every leaf on a mesh, by the name of its weight."""
    devices = np.array(jax.devices()[: np.prod(mesh_shape)])
    mesh = Mesh(devices.reshape(mesh_shape), ('replica', 'data', 'model'))

    def place_leaf(path, leaf):
      names = [getattr(key, 'key', None) for key in path]
      spec = SPECS.get(names[-1] if names else None, PartitionSpec())
      if 'layers' in names:
        spec = PartitionSpec(None, *spec)
      if 'head' in names:
        spec = PartitionSpec()
      return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place_leaf, state)

  def unroll(self, tree):
    """Returns a tree with `layers` cut in one dictionary per layer."""

    def unroll_dictionary(tree):
      if not isinstance(tree, dict):
        return tree
      result = {}
      for key, branch in tree.items():
        if key == 'layers':
          for index in range(jax.tree.leaves(branch)[0].shape[0]):
            result[f'layers_{index}'] = jax.tree.map(
                lambda x, index=index: x[index], branch
            )
        else:
          result[key] = unroll_dictionary(branch)
      return result

    return jax.tree.map(
        unroll_dictionary, tree, is_leaf=lambda x: isinstance(x, dict)
    )

  def assert_identical(self, found, expected):
    """Compares structure, shapes, dtypes and every bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(found)[0],
        jax.tree.leaves(expected),
        strict=True,
    ):
      x, y = np.asarray(x), np.asarray(y)
      assert (x.shape, x.dtype) == (y.shape, y.dtype), path
      assert x.tobytes() == y.tobytes(), path


@pytest.fixture(scope='session')
def states():
  return States()
