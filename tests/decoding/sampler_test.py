import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.decoding.prefill import Prompts
from codet5p_jax.decoding.sampler import Sampler, row_keys
from codet5p_jax.decoding.sampling import Sampling
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.t5 import T5Config

MODEL = T5Config(
    vocab_size=131,
    emb_dim=12,
    num_heads=5,
    head_dim=7,
    mlp_dim=29,
    num_encoder_layers=1,
    num_decoder_layers=2,
).make_model(Computation(dtype='float32', scan_layers=False))
NUMBERS = np.random.default_rng(0)
PLACES, NEVER = 9, 999
PROMPTS = Prompts(
    NUMBERS.integers(1, 131, (3, 5)).astype(np.int32),
    NUMBERS.integers(1, 131, (3, 4)).astype(np.int32),
    np.array([2, 4, 1], np.int32),
)
LIMITS = np.array([PLACES, PLACES, PLACES])


@pytest.fixture(scope='module')
def params(random_parameters):
  params = random_parameters(MODEL)
  table = params['token_embedder']['embedding'] / 10
  return params | {'token_embedder': {'embedding': table}}


@pytest.fixture(scope='module')
def hot():
  return Sampler(MODEL, Sampling(1.0, 0, 1.0), NEVER)


def draw(sampler, params, prompts, keys, limits=LIMITS, chunk=PLACES):
  samples = sampler.begin(
      *sampler.read(params, prompts), keys, limits, max_new_tokens=PLACES
  )
  for until in range(chunk, PLACES + chunk, chunk):
    samples = sampler.go_on(params, samples, min(until, PLACES))
  return samples


def keys_of(numbers, first=0, count=2, seed=0):
  return row_keys(jax.random.key(seed), jnp.array(numbers), first, count)


def test_samples_do_not_depend_on_what_is_beside_them(params, hot):
  together = draw(hot, params, PROMPTS, keys_of([7, 8, 9], count=4)).tokens
  [alone] = [
      draw(
          hot,
          params,
          jax.tree.map(lambda x: x[[2, 0]], PROMPTS),
          keys_of([9, 7], first=1),
          LIMITS[:2],
      ).tokens
  ]
  expected = together[jnp.array([9, 10, 1, 2])]
  np.testing.assert_array_equal(alone, expected)
  assert len({tuple(row) for row in together.tolist()}) == len(together)


def test_another_seed_draws_others(params, hot):
  first, second = (
      draw(hot, params, PROMPTS, keys_of([7, 8, 9], seed=seed)).tokens
      for seed in (0, 1)
  )
  assert not (first == second).all(axis=1).any()


def test_tokens_are_the_same_however_often_one_looks(params, hot):
  keys = keys_of([7, 8, 9])
  at_once = draw(hot, params, PROMPTS, keys)
  in_parts = draw(hot, params, PROMPTS, keys, chunk=2)
  np.testing.assert_array_equal(at_once.tokens, in_parts.tokens)
  assert (np.asarray(at_once.tokens) >= 0).all()


def test_log_probabilities_are_those_of_the_model(params, hot):
  samples = draw(hot, params, PROMPTS, keys_of([7, 8, 9], count=1))
  variables = {'params': params}
  head = MODEL.apply(variables, method='output_head')
  whole = jax.jit(lambda *rows: head.logits(MODEL.apply(variables, *rows)))
  targets = np.zeros((3, 4 + PLACES), np.int32)
  for row, length in enumerate(PROMPTS.lengths):
    targets[row, :length] = PROMPTS.decoder_input_tokens[row, :length]
    targets[row, length : length + PLACES] = samples.tokens[row]
  logits = whole(
      jnp.asarray(PROMPTS.encoder_input_tokens), jnp.asarray(targets)
  )
  log_probs = jax.nn.log_softmax(logits)
  for row, length in enumerate(PROMPTS.lengths):
    places = length - 1 + np.arange(PLACES)
    np.testing.assert_allclose(
        samples.log_probabilities[row],
        log_probs[row, places, samples.tokens[row]],
        rtol=1e-4,
    )


def test_rows_end_with_their_end_token_or_their_limit(params, hot):
  keys = keys_of([7, 8, 9], count=1)
  free = np.asarray(draw(hot, params, PROMPTS, keys).tokens)
  eos_id = int(free[0, 4])
  assert eos_id not in free[0, :4] and eos_id not in free[1:]
  sampler = Sampler(MODEL, Sampling(1.0, 0, 1.0), eos_id)
  samples = draw(sampler, params, PROMPTS, keys, np.array([PLACES, 6, 1]))
  expected = free.copy()
  for row, length in enumerate([5, 6, 1]):
    expected[row, length:] = -1
  np.testing.assert_array_equal(samples.tokens, expected)
  assert samples.is_done.all() and samples.step == 6
  is_none = expected < 0
  assert not np.asarray(samples.log_probabilities)[is_none].any()
