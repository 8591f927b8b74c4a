import collections
import dataclasses
import functools
import itertools
import time

import grain
import jax
import numpy as np
import pytest

from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.batches import TrainBatches, evaluation_batches
from codet5p_jax.training.optimizers import SGD
from codet5p_jax.training.train_step import make_train_step, microbatch_counts
from tests.training import small

ROWS = 40  # No multiple of the batch size, 16.
CONFIG = small.step_config(SGD(1.0))
NAME = small.PAIRS.name

cached_train_step = functools.cache(make_train_step)


def dataset(rows=ROWS, seen=None):
  """Examples that tell their own number, from 1, and another shape."""

  def example(index):
    if seen is not None:
      seen[index] += 1
    return {
        'number': np.array([index + 1], np.int32),
        'grid': np.full((2, 3), index + 1, np.float32),
    }

  return grain.MapDataset.source(range(rows)).map(example)


def make_batches(config=CONFIG, mesh=None, source=None):
  train_step = cached_train_step(config, mesh or make_mesh((1, 4, 2)))
  source = dataset() if source is None else source
  return TrainBatches(config, train_step, {NAME: source})


def numbers(batch):
  """The examples of a step, in the order of its rows."""
  return np.asarray(batch[NAME]['number']).ravel().tolist()


def stream(batches, steps):
  return [n for step in range(steps) for n in numbers(batches.at(step))]


def test_a_batch_depends_on_seed_and_step_alone():
  batches = make_batches()
  in_order = [numbers(batches.at(step)) for step in range(8)]
  for step in (5, 0, 7, 3, 3):
    assert numbers(batches.at(step)) == in_order[step]
    assert numbers(make_batches().at(step)) == in_order[step]
  assert len({tuple(batch) for batch in in_order}) == 8


def test_a_batch_holds_every_feature_of_its_examples():
  batch = make_batches().at(1)[NAME]
  assert batch['grid'].shape == (1, 16, 2, 3)
  assert batch['grid'].dtype == np.float32
  np.testing.assert_array_equal(
      batch['grid'],
      np.broadcast_to(batch['number'][..., None], (1, 16, 2, 3)),
  )


def test_every_pass_sees_each_example_once_in_an_order_of_its_own():
  seen = stream(make_batches(), 8)
  passes = [seen[:ROWS], seen[ROWS : 2 * ROWS], seen[2 * ROWS : 3 * ROWS]]
  for order in passes:
    assert sorted(order) == list(range(1, ROWS + 1))
  orders = [*passes, list(range(1, ROWS + 1))]
  for one, other in itertools.combinations(orders, 2):
    assert one != other


def test_another_seed_gives_another_order():
  other = dataclasses.replace(CONFIG, seed=CONFIG.seed + 1)
  assert stream(make_batches(other), 2) != stream(make_batches(), 2)


def test_microbatches_hold_the_rows_of_the_whole_batch():
  config = dataclasses.replace(CONFIG, num_microbatches=4)
  whole, parts = make_batches(), make_batches(config)
  for step in (0, 2, 5):
    assert parts.at(step)[NAME]['number'].shape == (4, 4, 1)
    assert numbers(parts.at(step)) == numbers(whole.at(step))


@pytest.mark.parametrize('mesh_shape', [(1, 8, 1), (2, 2, 2), (1, 1, 1)])
def test_a_batch_is_the_same_on_every_mesh(mesh_shape):
  devices = jax.devices()[: int(np.prod(mesh_shape))]
  mesh = make_mesh(mesh_shape, devices)
  batch = make_batches(mesh=mesh).at(3)
  assert numbers(batch) == numbers(make_batches().at(3))
  sharding = cached_train_step(CONFIG, mesh).batch_sharding
  assert batch[NAME]['number'].sharding == sharding


def test_each_row_is_read_once_though_devices_share_it():
  seen = collections.Counter()
  make_batches(source=dataset(seen=seen)).at(0)
  # Two devices along the model axis hold each row.
  assert len(seen) == 16
  assert set(seen.values()) == {1}


def test_objectives_get_their_own_examples_at_their_own_times():
  config = small.step_config(
      SGD(1.0), objectives=(small.PAIRS, small.ROWS), num_microbatches=2
  )
  one_each = cached_train_step(config, make_mesh((1, 4, 2)))
  others = dataset().map(lambda example: {'other': example['number'] + 1000})
  datasets = {NAME: dataset(), small.ROWS.name: others}
  batches = TrainBatches(config, one_each, datasets)
  for step in (4, 1):
    batch = batches.at(step)
    assert microbatch_counts(config, step) == {NAME: 1, small.ROWS.name: 1}
    assert batch.keys() == {NAME, small.ROWS.name}
    assert batch[NAME]['number'].shape == (1, 8, 1)
    assert batch[NAME]['number'].max() <= ROWS
    assert batch[small.ROWS.name].keys() == {'other'}
    assert batch[small.ROWS.name]['other'].min() > 1000


@pytest.mark.parametrize(('first', 'last'), [(0, 5), (3, 5), (6, 7), (2, 2)])
def test_reading_ahead_gives_the_batches_of_the_steps(first, last):
  batches = make_batches()
  found = [numbers(batch) for batch in batches.read(first, last)]
  assert found == [numbers(batches.at(step)) for step in range(first, last)]


def slow_once(index, seconds):
  """Delays the first example that is asked for."""
  if seconds:
    time.sleep(seconds.pop())
  return {'number': np.array([index + 1], np.int32)}


def test_the_time_that_the_caller_waited_is_counted():
  seconds = [0.3]
  source = grain.MapDataset.source(range(ROWS)).map(
      lambda index: slow_once(index, seconds)
  )
  batches = make_batches(source=source)
  assert batches.seconds_waiting == 0
  assert len(list(batches.read(0, 3))) == 3
  assert 0.2 < batches.seconds_waiting < 30


def test_what_fails_while_reading_ahead_reaches_the_caller():
  def fail(index):
    raise ZeroDivisionError(f'example {index}')

  source = grain.MapDataset.source(range(ROWS)).map(fail)
  with pytest.raises(ZeroDivisionError):
    next(make_batches(source=source).read(0, 3))


def evaluation_rows(rows, batch_size, num_batches):
  train_step = cached_train_step(CONFIG, make_mesh((1, 4, 2)))
  batches = evaluation_batches(
      dataset(rows), batch_size, num_batches, train_step
  )
  return [
      (np.asarray(batch['number']), np.asarray(batch['grid']))
      for batch in batches
  ]


@pytest.mark.parametrize(
    ('rows', 'num_batches', 'expected'),
    [
        (21, None, [*range(1, 22), 0, 0, 0]),
        (21, 9, [*range(1, 22), 0, 0, 0]),
        (21, 2, list(range(1, 17))),
        (16, None, list(range(1, 17))),
        (3, None, [1, 2, 3, 0, 0, 0, 0, 0]),
    ],
    ids=['all', 'more than there are', 'some', 'no rest', 'a single one'],
)
def test_an_evaluation_sees_each_example_once_in_order_then_nothing(
    rows, num_batches, expected
):
  found = evaluation_rows(rows, 8, num_batches)
  assert len(found) == len(expected) // 8
  assert {number.shape for number, _ in found} == {(8, 1)}
  assert [n for number, _ in found for n in number.ravel().tolist()] == expected
  for number, grid in found:
    # Rows that fill the last batch are zeros, and so have weight 0.
    np.testing.assert_array_equal(
        grid, np.broadcast_to(number[..., None], (8, 2, 3))
    )
