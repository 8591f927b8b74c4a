import collections
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import types

import grain
import jax
import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.batches import (
    TrainBatches,
    evaluation_batches,
    evaluation_examples,
    training_examples,
    training_row_numbers,
    unpadded_example,
)
from codet5p_jax.training.optimizers import SGD
from codet5p_jax.training.train_step import microbatch_counts
from tests.compiled import cached_train_step
from tests.objectives.causal_lm_test import FRAMED, UNFRAMED, Bytes
from tests.training import small

ROWS = 40  # No multiple of the batch size, 16.
CONFIG = small.step_config(SGD(1.0))
NAME = small.PAIRS.name
VOCABULARY = 'a vocabulary'


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


class Numbers:
  """An objective whose examples are those of `dataset`, by their numbers."""

  name, rate, first_step, batch_scale = 'numbers', 1.0, 0, 1
  reads, accumulates = 'texts', True
  # Not asked for here.
  batch_spec = check_model = passes = init_state = state_axes = loss = len

  def __init__(self, source):
    self._source = source

  def rows(self, data_dir, split, vocabulary):
    assert (data_dir, split, vocabulary) == ('a folder', 'train', VOCABULARY)
    return self._source

  def example(self, row, generator, vocabulary):
    assert vocabulary is VOCABULARY
    return {**row, 'random': generator.integers(2**40, size=(1,))}


def endless(source, config):
  source = dataset() if source is None else source
  return training_examples(
      Numbers(source), 'a folder', VOCABULARY, config.seed
  )


def make_batches(config=CONFIG, mesh=None, source=None):
  train_step = cached_train_step(config, mesh or make_mesh((1, 4, 2)))
  return TrainBatches(config, train_step, {NAME: endless(source, config)})


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


def test_it_is_known_of_which_row_an_example_is_made():
  row_of = training_row_numbers(ROWS, CONFIG.seed)
  # An example of row 0 says 1; the second pass begins after 40.
  assert [row_of[n] + 1 for n in range(80)] == stream(make_batches(), 5)


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
  others = endless(None, config).map(
      lambda example: {'other': example['number'] + 1000}
  )
  datasets = {NAME: endless(None, config), small.ROWS.name: others}
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
        # 16 of them, spread evenly.
        (21, 2, [1, 2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16, 18, 19, 20]),
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


def test_what_is_random_follows_from_the_seed_and_the_place_in_the_stream():
  examples = endless(None, CONFIG)
  first = [int(examples[index]['random'][0]) for index in range(3 * ROWS)]
  # Another pass over the same rows draws other numbers.
  assert len(set(first)) == 3 * ROWS
  assert [int(endless(None, CONFIG)[i]['random'][0]) for i in (7, 90)] == [
      first[7], first[90],
  ]  # fmt: skip
  other = dataclasses.replace(CONFIG, seed=CONFIG.seed + 1)
  assert int(endless(None, other)[7]['random'][0]) != first[7]


class Hidden(Numbers):
  """As `Numbers`, with targets some of which are sentinels."""

  def rows(self, data_dir, split, vocabulary):
    assert (data_dir, split) == ('a folder', 'test')
    return self._source

  def example(self, row, generator, vocabulary):
    return {
        'decoder_target_tokens': np.array([1, row, 98, row, 1, 0], np.int32),
        'decoder_loss_weights': np.array([1, 1, 1, 1, 1, 0], np.float32),
        'random': generator.integers(2**40, size=(1,)),
    }


def test_an_evaluation_draws_the_same_each_time_and_weighs_no_marker():
  vocabulary = types.SimpleNamespace(
      task_tokens=types.SimpleNamespace(sentinels=(99, 98, 97), bos=1)
  )

  def evaluated():
    examples = evaluation_examples(
        Hidden(range(10, 15)), 'a folder', 'test', vocabulary
    )
    assert len(examples) == 5
    return [examples[index] for index in range(5)]

  first, again = evaluated(), evaluated()
  for index, (example, same) in enumerate(zip(first, again, strict=True)):
    assert example['decoder_target_tokens'][1] == 10 + index
    assert example['decoder_loss_weights'].tolist() == [0, 1, 0, 1, 1, 0]
    assert example['random'] == same['random']
  assert len({int(example['random'][0]) for example in first}) == 5


def test_examples_without_padding_keep_an_end_that_is_the_padding_too():
  row = {
      'tokens': np.array([7, 2, 8], np.int32),
      'word_starts': np.array([True, True, False]),
  }
  for task_tokens, expected in (
      (FRAMED, [1, 7, 2, 8, 2]), (UNFRAMED, [7, 2, 8, 50])
  ):  # fmt: skip
    example = unpadded_example(
        CausalLM(target_length=9), row, np.random.default_rng(0),
        Bytes(task_tokens),
    )  # fmt: skip
    assert {name: ids.tolist() for name, ids in example.items()} == {
        'encoder_input': [task_tokens.clm], 'decoder_target': expected
    }  # fmt: skip


def test_an_objective_may_have_larger_batches():
  large = dataclasses.replace(small.PAIRS, batch_scale=2)
  config = small.step_config(
      SGD(1.0), objectives=(large, small.ROWS), num_microbatches=2
  )
  train_step = cached_train_step(config, make_mesh((1, 4, 2)))
  datasets = {
      name: endless(None, config) for name in (NAME, small.ROWS.name)
  }
  batch = TrainBatches(config, train_step, datasets).at(5)
  assert batch[NAME]['number'].shape == (1, 16, 1)
  assert batch[small.ROWS.name]['number'].shape == (1, 8, 1)
  # Step s starts where step s - 1 would have ended.
  first = 5 * 2 * config.batch_size
  assert numbers(batch) == [
      int(datasets[NAME][first + index]['number'][0]) for index in range(16)
  ]


def test_an_objective_waits_for_its_first_step():
  config = small.step_config(
      SGD(1.0),
      objectives=(small.PAIRS, dataclasses.replace(small.ROWS, first_step=50)),
  )
  before = [microbatch_counts(config, step) for step in range(50)]
  assert before == [{NAME: 1}] * 50
  after = collections.Counter(
      name
      for step in range(50, 450)
      for name in microbatch_counts(config, step)
  )
  assert after.total() == 400
  assert 160 < after[NAME] < 240


def test_some_objective_must_begin_at_once():
  late = dataclasses.replace(small.PAIRS, first_step=1)
  with pytest.raises(UserError, match='trained from step 0 on') as error:
    small.step_config(SGD(1.0), objectives=(late,))
  assert '\n' not in str(error.value)


READER = """
import json, sys
import jax
port, hosts, host = sys.argv[1:]
jax.config.update('jax_num_cpu_devices', 8 // int(hosts))
jax.distributed.initialize(f'localhost:{port}', int(hosts), int(host))
import numpy as np
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.objectives.span_denoising import SpanDenoising
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.batches import TrainBatches, training_examples
from codet5p_jax.training.optimizers import SGD
from codet5p_jax.training.train_step import StepConfig
import types
corpus = sys.stdin.read()
vocabulary = load_vocabulary(f'{corpus}/vocabulary')
objective = SpanDenoising(source_length=40, target_length=30)
model = types.SimpleNamespace(head_counts=lambda: {'encoder': 1, 'decoder': 1})
config = StepConfig(
    model, [objective], SGD(1.0), batch_size=16, num_microbatches=2, seed=5)
mesh = make_mesh((1, 8, 1))
spec = jax.sharding.PartitionSpec(None, ('replica', 'data'))
step = types.SimpleNamespace(
    batch_sharding=jax.sharding.NamedSharding(mesh, spec))
examples = training_examples(objective, corpus, vocabulary, config.seed)
batches = TrainBatches(config, step, {objective.name: examples})
for number in (0, 7):
  for name, array in batches.at(number)[objective.name].items():
    for shard in array.addressable_shards:
      first = shard.index[1].start or 0
      print(json.dumps([number, name, first, np.asarray(shard.data).tolist()]))
"""


def rows_read_by(hosts, corpus):
  """What each of several hosts reads, put together."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  environment = {**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
  readers = [
      subprocess.Popen(
          [sys.executable, '-c', READER, str(port), str(hosts), str(host)],
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          text=True,
          env=environment,
      )
      for host in range(hosts)
  ]
  for reader in readers:
    reader.stdin.write(str(corpus))
    reader.stdin.close()
  found = {}
  for reader in readers:
    lines = reader.stdout.read().splitlines()
    assert reader.wait(60) == 0
    assert len(lines) == 2 * 3 * 8 // hosts
    for number, name, first, rows in map(json.loads, lines):
      found[number, name, first] = rows
  return found


def test_any_number_of_hosts_reads_the_same_batches(small_corpus):
  alone = rows_read_by(1, small_corpus)
  assert len(alone) == 2 * 3 * 8
  assert rows_read_by(2, small_corpus) == alone
  assert rows_read_by(4, small_corpus) == alone
