"""A model of text and code, and batches, so small that steps are quick."""

import types

import jax
import numpy as np

from codet5p_jax.models.bimodal import BimodalConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.training.optimizers import SGD
from codet5p_jax.training.train_step import StepConfig

# All sizes differ; heads and batch divide by 8.
MODEL = BimodalConfig(
    vocab_size=131,
    emb_dim=24,
    num_heads=8,
    head_dim=4,
    mlp_dim=40,
    num_encoder_layers=2,
    num_decoder_layers=3,
    projection_dim=20,
    match_id=101,
    text_decoder_id=102,
    code_decoder_id=103,
    initial_temperature=0.07,
)
SLOTS, ROWS = 3, 16
OBJECTIVE = Bimodal(
    text_length=7,
    code_length=11,
    queue_size=SLOTS * ROWS,
    momentum=0.9,
    loss_tile_length=4,
)
VOCABULARY = types.SimpleNamespace(
    task_tokens=types.SimpleNamespace(pad=0, bos=1, eos=2)
)


def config(objective=OBJECTIVE, **changes):
  fields = {
      'model': MODEL,
      'objectives': (objective,),
      'optimizer': SGD(0.01),
      'batch_size': ROWS,
      'computation': Computation(dtype='float32'),
      'seed': 5,
      **changes,
  }
  return StepConfig(**fields)


def pool(seed, number, of=40):
  """Examples of random pairs, of which some share a side or are repeated."""
  rng = np.random.default_rng(seed)
  texts = [rng.integers(3, 100, rng.integers(1, 9)) for _ in range(of)]
  codes = [rng.integers(3, 100, rng.integers(2, 14)) for _ in range(of)]
  chosen = rng.integers(0, of, number)
  # The first ten share texts by twos, the next ten codes.
  shared = [i - i % 2 for i in range(20)]
  by_text = [*shared[:10], *range(10, of)]
  by_code = [*range(10), *shared[10:], *range(20, of)]
  return [
      OBJECTIVE.example(
          {'text': texts[by_text[i]], 'code': codes[by_code[i]]},
          rng,
          VOCABULARY,
      )
      for i in chosen.tolist()
  ]


def batch(seed, of=40):
  rows = pool(seed, ROWS, of)
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def steps(step, state, batches):
  """Yields each step's metrics as means, and the state that comes of it."""
  for each in batches:
    given = jax.tree.map(lambda x: x[None], {'bimodal': each})
    given = jax.device_put(given, step.batch_sharding)
    state, metrics = step.step(state, given)
    yield (
        {
            name.removeprefix('bimodal/'): float(total / weight)
            for name, (total, weight) in metrics.items()
            if weight
        },
        state,
    )


def key_of(step_config, step):
  """The key that the step of that number gives to its only objective."""
  key = jax.random.fold_in(jax.random.key(step_config.seed), step)
  return jax.random.fold_in(jax.random.fold_in(key, 0), 0)


def to_numpy(tree):
  return jax.tree.map(np.array, tree)
