import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.shard_digests import (
    Difference,
    by_process,
    digest_shards,
    find_difference,
    number_shards,
)

# What eight devices hold of three leaves: a copy each; halves; eighths.
SHARDS = np.array([[0, device // 4 * 4, device] for device in range(8)])
TIMES, WORDS = 3, 4


@pytest.fixture
def tables():
  """Digests that are the same each time and for every copy."""
  words = np.random.default_rng(0).integers(0, 2**32, (8, WORDS), np.uint32)
  digests = words[SHARDS] + np.arange(3, dtype=np.uint32)[:, None]
  return np.repeat(digests[None], TIMES, axis=0)


@pytest.fixture
def leaves():
  """The same three leaves on a real mesh."""
  mesh = make_mesh((1, 4, 2))
  numbers = np.random.default_rng(1)
  specs = {
      'copy': PartitionSpec(),
      'halves': PartitionSpec('model', None),
      'eighths': PartitionSpec(None, ('data', 'model')),
  }
  return {
      name: jax.device_put(
          numbers.standard_normal((2, 24, 3), np.float32),
          NamedSharding(mesh, spec),
      )
      for name, spec in specs.items()
  }


def test_equal_digests_have_no_difference(tables):
  assert find_difference(tables, SHARDS) is None


def test_who_differs_from_the_first_time_is_named_with_the_first_leaf(tables):
  tables[2, 5, 2, 3] += 1
  tables[2, 6, 1, 0] += 1
  found = find_difference(tables, SHARDS)
  assert found == Difference(time=2, leaf=1, devices=(5, 6), is_copy=False)
  tables[1, 7, 2, 0] ^= 1 << 31
  found = find_difference(tables, SHARDS)
  assert found == Difference(time=1, leaf=2, devices=(7,), is_copy=False)


def test_of_copies_those_that_fewer_hold_are_named(tables):
  tables[:, 6, 1] += 1  # Wrong each time: no repetition tells.
  found = find_difference(tables, SHARDS)
  assert found == Difference(time=0, leaf=1, devices=(6,), is_copy=True)
  tables[:, 7, 1] += 1  # Two against two.
  found = find_difference(tables, SHARDS)
  assert found == Difference(0, 1, devices=(4, 5, 6, 7), is_copy=True)


def test_parts_that_are_no_copies_may_differ(tables):
  tables[:, 3, 2] += 1
  assert find_difference(tables, SHARDS) is None


def test_one_bit_of_one_device_changes_its_digest_alone(leaves):
  devices = jax.devices()
  before = digest_shards(leaves, devices)
  assert before.shape == (8, 3, WORDS) and before.dtype == np.uint32
  np.testing.assert_array_equal(digest_shards(leaves, devices), before)
  leaf = leaves['copy']
  parts = [np.array(shard.data) for shard in leaf.addressable_shards]
  parts[3].view(np.uint32)[1, 5, 2] ^= 1
  changed = leaves | {
      'copy': jax.make_array_from_single_device_arrays(
          leaf.shape,
          leaf.sharding,
          [
              jax.device_put(part, shard.device)
              for part, shard in zip(parts, leaf.addressable_shards)
          ],
      )
  }
  after = digest_shards(changed, devices)
  device = devices.index(leaf.addressable_shards[3].device)
  assert np.argwhere(np.any(after != before, axis=-1)).tolist() == [[device, 0]]
  shards = number_shards(changed, devices)
  assert find_difference(after[None], shards) == Difference(
      time=0, leaf=0, devices=(device,), is_copy=True
  )


def test_shards_have_one_number_where_they_are_copies(leaves):
  devices = jax.devices()
  shards = number_shards(leaves, devices)
  assert [len(set(column)) for column in shards.T] == [1, 2, 8]
  # Copies have one digest each, and other parts others.
  digests = digest_shards(leaves, devices)
  for leaf in range(3):
    pairs = {
        (int(shards[device, leaf]), digests[device, leaf].tobytes())
        for device in range(8)
    }
    assert len(pairs) == len(set(shards[:, leaf]))


def test_devices_are_counted_by_process():
  class Device:
    def __init__(self, number, process_index):
      self.id, self.process_index = number, process_index

  devices = [Device(n, p) for n, p in ((0, 1), (1, 0), (2, 1), (3, 0))]
  assert [d.id for d in by_process(devices)] == [1, 3, 0, 2]
