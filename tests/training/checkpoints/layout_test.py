import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from codet5p_jax.training.checkpoints.layout import (
    flatten,
    stack_layers,
    unstack_layers,
)


def test_stacked_leaves_are_stored_per_layer():
  tree = unstack_layers({
      'decoder': {
          'layers': {'norm': {'scale': jnp.arange(6.0).reshape(2, 3)}},
          'norm': {'scale': jnp.ones(5)},
      }
  })
  assert sorted(tree['decoder']) == ['layers_0', 'layers_1', 'norm']
  np.testing.assert_array_equal(
      tree['decoder']['layers_1']['norm']['scale'], [3.0, 4.0, 5.0]
  )


def test_optimizer_state_becomes_plain_dictionaries(states):
  tree = unstack_layers(states.make().opt_state)
  adam = tree['1']['0']
  assert sorted(adam) == ['count', 'mu', 'nu']
  assert adam['mu']['encoder']['layers_2']['norm']['scale'].shape == (8,)

  def types(branch):
    if not isinstance(branch, dict):
      return set()
    return {dict}.union(*map(types, branch.values()))

  assert types(tree) == {dict}


def test_unstacked_scanned_state_equals_unstacked_unrolled_state(states):
  states.assert_identical(
      unstack_layers(states.make()), unstack_layers(states.make(scanned=False))
  )


@pytest.mark.parametrize('scanned', [True, False])
def test_stacking_inverts_unstacking(states, scanned):
  state = states.make(scanned=scanned)
  states.assert_identical(stack_layers(unstack_layers(state), state), state)


def test_layers_keep_the_sharding_of_their_stack(states):
  params = states.make().params
  stack = params['encoder']['layers']['attention']['kernel']
  layers = unstack_layers(params)['encoder']
  layer = layers['layers_1']['attention']['kernel']
  assert stack.sharding.spec == PartitionSpec(None, 'data', 'model', None)
  assert layer.sharding.spec == PartitionSpec('data', 'model', None)
  assert layer.sharding.mesh == stack.sharding.mesh
  assert {shard.data.shape for shard in layer.addressable_shards} == {(2, 2, 5)}


def test_stacks_take_the_sharding_of_the_target(states):
  state = states.make()
  target = states.abstract(mesh_shape=(1, 8, 1))
  moved = states.place(unstack_layers(state.params), (1, 8, 1))
  restored = stack_layers(moved, target.params)
  kernel = restored['encoder']['layers']['attention']['kernel']
  assert {shard.data.shape for shard in kernel.addressable_shards} == {
      (3, 1, 4, 5)
  }


def test_shapes_are_unstacked_like_arrays(states):
  arrays = flatten(unstack_layers(states.make()))
  shapes = flatten(unstack_layers(states.abstract()))
  assert list(arrays) == list(shapes)
  for path, array in arrays.items():
    assert array.shape == shapes[path].shape, path
    assert array.dtype == shapes[path].dtype, path
    assert array.sharding == shapes[path].sharding, path


def test_numpy_stacks_stay_numpy():
  tree = {'layers': {'scale': np.arange(6).reshape(2, 3)}}
  unstacked = unstack_layers(tree)
  assert type(unstacked['layers_0']['scale']) is np.ndarray
  restored = stack_layers(unstacked, tree)
  np.testing.assert_array_equal(
      restored['layers']['scale'], tree['layers']['scale']
  )


def test_state_of_a_factored_optimizer_survives(states):
  optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=2)
  state = optimizer.init(states.make().params)
  states.assert_identical(stack_layers(unstack_layers(state), state), state)


def test_layouts_are_cut_inside_a_mesh_context(states):
  state = states.make()
  mesh = state.step.sharding.mesh
  with jax.set_mesh(mesh):
    unstacked = unstack_layers(state)
    restored = stack_layers(unstacked, state)
  states.assert_identical(restored, state)


def test_leaves_that_do_not_belong_together_are_refused():
  like = {'layers': {'scale': np.ones((2, 3))}}
  with pytest.raises(ValueError, match='layers_1/scale, found none'):
    stack_layers({'layers_0': {'scale': np.ones(3)}}, like)
  with pytest.raises(ValueError, match='unexpected leaf bias'):
    stack_layers({**unstack_layers(like), 'bias': np.ones(4)}, like)


def test_ambiguous_paths_are_refused():
  with pytest.raises(ValueError, match='both a stack and unrolled'):
    unstack_layers({
        'layers': {'scale': np.ones((2, 3))},
        'layers_0': {'scale': np.ones(3)},
    })
  with pytest.raises(ValueError, match='keys without'):
    unstack_layers({'a/b': np.ones(3)})
  with pytest.raises(ValueError, match='share the path'):
    unstack_layers({'a': _Twice()})


class _Twice:
  """A pytree node with the same key twice."""


jax.tree_util.register_pytree_with_keys(
    _Twice,
    lambda node: (
        [(jax.tree_util.DictKey('x'), np.ones(2))] * 2,
        None,
    ),
    lambda _, children: _Twice(),
)


def test_leaves_without_shape_are_refused():
  with pytest.raises(ValueError, match='expected an array at a/b'):
    unstack_layers({'a': {'b': 3}})
