"""Hand-computed values; objectives/bimodal_test.py has whole steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax.sharding import NamedSharding

from codet5p_jax import contrast
from codet5p_jax.planning.hlo import collective_bytes
from codet5p_jax.sharding import (
    DEFAULT_RULES,
    constrain,
    make_mesh,
    partition_spec,
    sharding_activations,
)


def test_a_queue_is_full_after_as_many_batches_as_it_has_slots():
  weights = jnp.array([1.0, 1.0, 0.0])
  found = [
      contrast.are_there(weights, 4, jnp.int32(n)).tolist() for n in (0, 2, 9)
  ]
  own, full, empty = [True, True, False], [True] * 3, [False] * 3
  assert found == [
      [own, empty, empty, empty], [own, full, full, empty], [own, *[full] * 3]
  ]  # fmt: skip


def test_a_batch_takes_the_place_of_the_oldest():
  queue = {'x': jnp.zeros((3, 2, 5), jnp.uint16)}
  for number in range(5):
    batch = {'x': jnp.full((2, 5), number + 1, jnp.int32)}
    queue = contrast.enqueue(queue, batch, jnp.int32(number))
  assert queue['x'].dtype == jnp.uint16
  assert queue['x'][:, :, 0].tolist() == [[4, 4], [5, 5], [3, 3]]


def test_candidates_begin_with_the_batch():
  queue = {'x': jnp.zeros((3, 2, 5), jnp.uint16)}
  found = contrast.with_queue({'x': jnp.ones((2, 5), jnp.int32)}, queue)['x']
  assert (found.shape, found.dtype) == ((4, 2, 5), jnp.uint16)
  assert found[:, 0, 0].tolist() == [1, 0, 0, 0]
  alone = contrast.with_queue({'x': jnp.ones((2, 5), jnp.int32)}, {})['x']
  assert alone.shape == (1, 2, 5)


def test_pairs_are_known_by_either_side():
  texts = jnp.array([[1, 1], [2, 2]], jnp.uint32)
  codes = jnp.array([[5, 5], [6, 6]], jnp.uint32)
  found = contrast.true_pairs(
      texts,
      codes,
      jnp.array([[[1, 1], [2, 9], [7, 7]]], jnp.uint32),
      jnp.array([[[8, 8], [9, 9], [6, 6]]], jnp.uint32),
  )
  # One word of two is not the same.
  assert found.tolist() == [[[True, False, False]], [[False, False, True]]]
  is_there = jnp.array([[True, True, False]])
  targets = contrast.one_hot_targets(found, is_there)
  assert targets.tolist() == [[[1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]]


def test_the_loss_is_the_cross_entropy_over_what_is_there():
  logits = jnp.log(jnp.array([[[0.5, 2.0], [1.5, 100.0]]]))
  is_there = jnp.array([[True, True], [True, False]])
  targets = jnp.array([[[0.5, 0.0], [0.5, 0.0]]])
  losses, is_found = contrast.contrastive_losses(
      logits, targets, targets > 0, is_there
  )
  expected = -0.5 * np.log(0.5 / 4) - 0.5 * np.log(1.5 / 4)
  assert losses.tolist() == pytest.approx([expected])
  assert is_found.tolist() == [0.0]
  soft = contrast.softened(targets, logits, is_there, 0.25)
  np.testing.assert_allclose(
      soft[0],
      0.75 * targets[0] + 0.25 * np.array([[0.125, 0.5], [0.375, 0]]),
      rtol=1e-6,
  )


def test_a_model_to_which_all_is_the_same_finds_nothing():
  is_true = jnp.array([[[True, False, False]]])
  is_there = jnp.array([[True, True, False]])
  for logit, expected in ((1.0, 0.0), (1.1, 1.0), (0.9, 0.0)):
    logits = jnp.array([[[logit, 1.0, 9.0]]])
    _, is_found = contrast.contrastive_losses(
        logits, is_true.astype(jnp.float32), is_true, is_there
    )
    assert is_found.tolist() == [expected]


@pytest.mark.parametrize('mesh_shape', [(2, 4, 1), (1, 4, 2)])
def test_what_devices_exchange_does_not_grow_with_the_queue(mesh_shape):
  mesh = make_mesh(mesh_shape)

  def spec(dtype, shape, *axes):
    sharding = NamedSharding(mesh, partition_spec(axes, DEFAULT_RULES))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def compare(queries, embeddings, tokens, key):
    logits = contrast.similarities(queries, embeddings)
    slots, columns, _ = contrast.draw_negatives(key, logits, logits > 0.1)
    drawn = constrain(tokens[slots, columns], 'batch', 'act_length')
    queue = contrast.enqueue({'t': tokens}, {'t': drawn}, slots[0])
    return jnp.sum(logits**2), drawn, queue

  def exchanged(num_slots):
    compiled = jax.jit(
        sharding_activations(mesh, DEFAULT_RULES, jax.grad(
            lambda *given: compare(*given)[0])),
    ).lower(
        spec(jnp.float32, (8, 6), 'batch', 'projection'),
        spec(jnp.float32, (num_slots, 8, 6), None, 'batch', None),
        spec(jnp.uint16, (num_slots, 8, 21), None, 'batch', None),
        jax.eval_shape(lambda: jax.random.key(0)),
    ).compile()  # fmt: skip
    whole = jax.jit(
        sharding_activations(mesh, DEFAULT_RULES, compare)
    ).lower(
        spec(jnp.float32, (8, 6), 'batch', 'projection'),
        spec(jnp.float32, (num_slots, 8, 6), None, 'batch', None),
        spec(jnp.uint16, (num_slots, 8, 21), None, 'batch', None),
        jax.eval_shape(lambda: jax.random.key(0)),
    ).compile()
    return [collective_bytes(each.as_text()) for each in (compiled, whole)]

  assert exchanged(3) == exchanged(30)


def test_negatives_are_drawn_in_proportion_and_only_where_allowed():
  weights = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]])
  is_allowed = jnp.array([[True, True, True], [True, False, False]])
  rows = 20_000
  logits = jnp.broadcast_to(jnp.log(jnp.float32(weights)), (rows, 2, 3))
  slots, columns, exist = contrast.draw_negatives(
      jax.random.key(0), logits, jnp.broadcast_to(is_allowed, (rows, 2, 3))
  )
  assert bool(jnp.all(exist))
  counts = np.zeros((2, 3))
  np.add.at(counts, (np.asarray(slots), np.asarray(columns)), 1)
  expected = np.where(is_allowed, weights, 0)
  expected *= rows / expected.sum()
  assert not counts[~np.asarray(is_allowed)].any()
  allowed = expected > 0
  chi_square = np.sum((counts - expected)[allowed] ** 2 / expected[allowed])
  assert chi_square < 16.3  # Three degrees of freedom: one in a thousand.
  _, _, exist = contrast.draw_negatives(
      jax.random.key(0), logits[:2], jnp.zeros((2, 2, 3), bool)
  )
  assert exist.tolist() == [False, False]


def test_an_average_moves_in_float32_and_leaves_int8_alone():
  average = {
      'a': jnp.float32([1.0]), 'b': jnp.int8([3]), 'c': jnp.bfloat16([2.0])
  }
  params = {
      'a': jnp.float32([2.0]), 'b': jnp.int8([5]), 'c': jnp.bfloat16([2.0])
  }
  found = contrast.moving_average(average, params, 0.9)
  assert found['a'].tolist() == pytest.approx([1.1])
  assert (found['b'].tolist(), found['b'].dtype) == ([5], jnp.int8)
  assert (found['c'].tolist(), found['c'].dtype) == ([2.0], jnp.bfloat16)
