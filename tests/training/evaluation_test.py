import collections
import functools
import math

import grain
import jax
import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.evaluation import evaluate_objectives
from codet5p_jax.training.optimizers import SGD
from codet5p_jax.training.partition import merge_params, partition_params
from codet5p_jax.training.train_step import make_train_step
from tests.training import small

# Three batches of 8, the last one of 5 rows.
ROWS = 21
CONFIG = small.step_config(
    SGD(1.0),
    objectives=(small.PAIRS, small.ROWS),
    batch_size=16,
    num_microbatches=2,
    trainable=('encoder/.*', 'token_embedder/.*'),
)


@pytest.fixture(scope='module')
def train_step():
  return make_train_step(CONFIG, make_mesh((1, 4, 2)))


@pytest.fixture(scope='module')
def params(train_step, random_parameters):
  values = random_parameters(train_step.model)
  state = train_step.abstract_state
  parts = partition_params(values, CONFIG.trainable)
  return [
      jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), part, like)
      for part, like in zip(parts, (state.params, state.frozen_params))
  ]


@functools.cache
def examples(name):
  """Rows of different lengths: {feature: [ROWS, ...]}."""
  [objective] = [o for o in CONFIG.objectives if o.name == name]
  config = small.step_config(SGD(1.0), batch_size=ROWS)
  batch = small.batch(config, seed=len(name), objective=objective)
  return {feature: array[0] for feature, array in batch.items()}


def datasets():
  return {
      o.name: grain.MapDataset.source(range(ROWS)).map(
          lambda index, name=o.name: {
              feature: array[index]
              for feature, array in examples(name).items()
          }
      )
      for o in CONFIG.objectives
  }


def numpy_means(model, params, batch):
  """Loss, accuracy and number of target tokens, over all rows at once."""
  targets = batch['decoder_target_tokens']
  inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  hidden = jax.jit(model.apply)(
      {'params': params}, batch['encoder_input_tokens'], inputs
  )
  head = model.apply({'params': params}, method='output_head')
  kernel = np.asarray(head.kernel, np.float64)[: head.vocab_size]
  logits = np.asarray(hidden, np.float64) @ kernel.T * float(head.scale)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  is_target = batch['decoder_loss_weights'] > 0
  counts = collections.Counter(targets[is_target].tolist())
  shares = [count / counts.total() for count in counts.values()]
  picked = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  return {
      'loss': -picked[is_target].mean(),
      'perplexity': np.exp(-picked[is_target].mean()),
      'accuracy': (log_p.argmax(-1) == targets)[is_target].mean(),
      'tokens': is_target.sum(),
      'unigram_entropy': -sum(share * math.log(share) for share in shares),
  }


@pytest.mark.parametrize(
    ('num_batches', 'rows'), [(None, ROWS), (2, 16)]
)
def test_an_evaluation_is_the_mean_over_all_target_tokens(
    train_step, params, num_batches, rows
):
  values = evaluate_objectives(
      train_step, *params, datasets(), num_batches
  )
  everything = jax.device_put(merge_params(*params), jax.devices()[0])
  expected = {
      f'{o.name}/{metric}': value
      for o in CONFIG.objectives
      for metric, value in numpy_means(
          train_step.model,
          everything,
          {
              name: array[[row * ROWS // rows for row in range(rows)]]
              for name, array in examples(o.name).items()
          },
      ).items()
  }
  assert values == pytest.approx(expected, rel=1e-5)
  assert all(type(value) is float for value in values.values())


@pytest.mark.parametrize('num_batches', [0, -1])
def test_an_evaluation_of_no_batches_is_one_clear_line(
    train_step, params, num_batches
):
  with pytest.raises(UserError, match=f'found {num_batches}') as error:
    evaluate_objectives(
        train_step, *params, datasets(), num_batches
    )
  assert '\n' not in str(error.value)


def test_whoever_ends_an_evaluation_has_the_devices_for_itself(
    train_step, params, monkeypatch
):
  """A save that comes next exchanges something, and may lock up."""
  awaited, ready = [], jax.block_until_ready

  def wait(tree):
    awaited.append(jax.tree.leaves(tree))
    return ready(tree)

  def be_told():
    monkeypatch.setattr(jax, 'block_until_ready', wait)
    raise InterruptedError

  with pytest.raises(InterruptedError):
    evaluate_objectives(
        train_step, *params, datasets(), None, be_told
    )
  [arrays] = awaited
  assert all(isinstance(array, jax.Array) for array in arrays)
  # Sums, and how often each token is a target.
  assert (train_step.config.model.vocab_size,) in {x.shape for x in arrays}
  assert len(arrays) > 2
