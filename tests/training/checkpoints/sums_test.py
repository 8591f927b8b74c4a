import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codet5p_jax.training.checkpoints import sums as sums_module
from codet5p_jax.training.checkpoints.layout import flatten
from codet5p_jax.training.checkpoints.sums import (
    collect_sums,
    count_copies,
    describe_difference,
    dispatch_sums,
    sum_array,
)


def sums(tree):
  return collect_sums(dispatch_sums(flatten(tree)))


def numpy_sums(array):
  """The same in NumPy, one element after the other in the order of C."""
  array = np.ascontiguousarray(array).reshape(-1)
  width = min(array.dtype.itemsize, 4)
  words = array.view(f'u{width}').astype(np.uint32)
  scrambled = words ^ (np.arange(words.size, dtype=np.uint32) * 0x9E3779B9)
  scrambled = (scrambled ^ (scrambled >> 16)) * np.uint32(0x85EBCA6B)
  scrambled = (scrambled ^ (scrambled >> 13)) * np.uint32(0xC2B2AE35)
  scrambled ^= scrambled >> 16
  return [int(x.sum(dtype=np.uint64)) % 2**32 for x in (words, scrambled)]


def test_bits_are_added_and_wrap_around():
  # 1.0 is 0x3F800000, -0.0 is 0x80000000, 2.0 is 0x40000000.
  found = sums({
      'two': np.float32([1.0, -0.0]),
      'three': np.float32([-0.0, -0.0, 2.0]),
      'bytes': np.int8([-1, 2]),
      'truth': np.array([True, False, True]),
  })
  assert {path: pair[0] for path, pair in found.items()} == {
      'two': 0xBF800000, 'three': 0x40000000, 'bytes': 257, 'truth': 2
  }


@pytest.mark.parametrize(
    'dtype', [
        np.float32, np.int32, np.uint32, np.int8, np.uint8, np.float16,
        np.int16, bool, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
    ],
)
@pytest.mark.parametrize('shape', [(), (7,), (3, 5), (2, 3, 4, 5), (0, 3)])
def test_sums_equal_their_numpy_twin(dtype, shape):
  numbers = np.random.default_rng(1)
  array = np.asarray(numbers.standard_normal(shape) * 50).astype(dtype)
  assert sums({'a': array}) == {'a': numpy_sums(array)}
  assert sum_array(array) == numpy_sums(array)
  assert sums({'a': jnp.asarray(array)}) == {'a': numpy_sums(array)}


def test_eight_bytes_are_two_words():
  with jax.enable_x64(True):
    array = np.random.default_rng(2).standard_normal((3, 5))
    assert sums({'a': jnp.asarray(array)}) == {'a': numpy_sums(array)}
  assert sum_array(array) == numpy_sums(array)


def test_long_arrays_are_summed_part_by_part(monkeypatch):
  array = np.random.default_rng(3).integers(0, 2**32, 1000, np.uint32)
  monkeypatch.setattr(sums_module, '_WORDS_AT_ONCE', 96)
  assert sum_array(array.reshape(8, 125)) == numpy_sums(array)


def test_layers_have_their_own_sums_scanned_or_not(states):
  scanned, unrolled = states.make(), states.make(scanned=False)
  assert sums(scanned.params) == sums(unrolled.params)
  assert sums(scanned.opt_state) == sums(unrolled.opt_state)
  found = sums(scanned.params)
  layers = scanned.params['encoder']['layers']
  kernel = np.asarray(layers['attention']['kernel'])
  for layer in range(3):
    path = f'encoder/layers_{layer}/attention/kernel'
    assert found[path] == numpy_sums(kernel[layer])


@pytest.mark.parametrize('mesh_shape', [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_mesh_and_sharding_change_nothing(states, mesh_shape):
  moved = sums(states.make(mesh_shape=mesh_shape).params)
  assert moved == sums(states.make().params)
  host = jax.tree.map(np.asarray, states.make().params)
  assert moved == sums(host)


def test_a_part_that_no_device_cuts_is_counted_once():
  """Cut over one axis and copied over the others, or not cut at all."""
  array = np.arange(48, dtype=np.float32).reshape(8, 6)
  devices = np.array(jax.devices()).reshape(2, 2, 2)
  mesh = Mesh(devices, ('replica', 'data', 'model'))
  for spec, copies in (
      (PartitionSpec(), 8),
      (PartitionSpec(None, 'model'), 4),
      (PartitionSpec('data'), 4),
      (PartitionSpec(('data', 'model'), None), 2),
      (PartitionSpec(('model', 'replica', 'data')), 1),
      (PartitionSpec('model', 'replica'), 2),
  ):
    placed = jax.device_put(array, NamedSharding(mesh, spec))
    assert sums({'a': placed}) == {'a': numpy_sums(array)}, spec
    # Unless all copies are to be counted.
    assert count_copies(placed) == copies
    [found] = collect_sums(dispatch_sums({'a': placed}, True)).values()
    assert describe_difference(found, numpy_sums(array), copies) is None
    if copies > 1:
      assert describe_difference(found, numpy_sums(array)) is not None


def test_nothing_has_no_sums():
  assert sums({}) == {}


def test_sums_are_taken_inside_a_mesh_context(states):
  state = states.make()
  with jax.set_mesh(state.step.sharding.mesh):
    inside = sums(state.params)
  assert inside == sums(state.params)


@pytest.mark.parametrize(
    'change',
    [
        lambda x: x.reshape(-1)[::-1].reshape(x.shape),
        lambda x: np.roll(x, 2**16),
        lambda x: np.concatenate([x[2**17 :], x[: 2**17]]),
        lambda x: np.where(np.arange(x.size) == 9, -x, x),
        lambda x: np.where(np.arange(x.size) == 9, np.nextafter(x, 9), x),
        lambda x: np.where(np.arange(x.size) < x.size // 2, x, 0),
        lambda x: x + 0.5,
    ],
)
def test_any_change_changes_the_sums(change):
  # As bfloat16 has them: the low half of each pattern is empty, so a product
  # of value and position would lose what moves by a multiple of 2**16.
  rounded = np.random.default_rng(3).standard_normal(2**18)
  array = rounded.astype(ml_dtypes.bfloat16).astype(np.float32)
  assert sums({'a': change(array)})['a'][1] != sums({'a': array})['a'][1]


def test_places_alone_tell_that_numbers_moved():
  array = np.arange(6, dtype=np.float32)
  [here], [there] = (sums({'a': x}).values() for x in (array, array[::-1]))
  assert here[0] == there[0] and here[1] != there[1]
  assert describe_difference(here, here) is None
  assert 'other places' in describe_difference(here, there)
  assert 'other numbers' in describe_difference(here, [here[0] + 1, here[1]])
