import copy

import jax
import ml_dtypes
import numpy as np
import pytest

from codet5p_jax.training.checkpoints.fingerprint import (
    digest_array,
    fingerprint_tree,
)


def test_layout_and_sharding_do_not_change_the_fingerprint(states):
  fingerprints = {
      fingerprint_tree(states.make(scanned=scanned, mesh_shape=shape).params)
      for scanned in (True, False)
      for shape in ((1, 4, 2), (1, 1, 1))
  }
  host = jax.tree.map(np.asarray, states.make().params)
  assert fingerprints == {fingerprint_tree(host)}


def test_order_of_keys_does_not_change_the_fingerprint():
  x, y = np.arange(3), np.ones((2, 5))
  assert fingerprint_tree({'a': x, 'b': y}) == fingerprint_tree(
      {'b': y, 'a': x}
  )


def test_anything_else_changes_the_fingerprint():
  tree = {'a': {'b': np.arange(6, dtype=np.float32).reshape(2, 3)}}
  trees = [tree, {'a': {'c': tree['a']['b']}}]
  for change in (
      lambda x: x.reshape(3, 2),
      lambda x: x.astype(np.int32),
      lambda x: x.view(np.int32),
      lambda x: x.astype(ml_dtypes.bfloat16),
      lambda x: np.where(x == 4, np.nextafter(x, np.float32(9)), x),
      lambda x: np.where(x == 0, np.float32(-0.0), x),
  ):
    trees.append(copy.deepcopy(tree))
    trees[-1]['a']['b'] = change(tree['a']['b'])
  assert len({fingerprint_tree(tree) for tree in trees}) == len(trees)


def test_views_give_the_fingerprint_of_their_copy():
  array = np.arange(24).reshape(2, 3, 4)
  assert fingerprint_tree({'a': array.T}) == fingerprint_tree(
      {'a': array.T.copy()}
  )


def test_an_array_that_other_processes_have_a_part_of_has_no_digest(
    monkeypatch,
):
  array = jax.numpy.ones(3)
  monkeypatch.setattr(
      type(array), 'is_fully_addressable', property(lambda self: False)
  )
  with pytest.raises(ValueError, match='a has parts on other processes'):
    digest_array('a', array)
