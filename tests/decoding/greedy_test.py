import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.decoding.greedy import greedy_decode
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
).make_model(Computation(dtype='float32'))
LENGTH, NEVER = 9, 999
NUMBERS = np.random.default_rng(0)
SOURCES = NUMBERS.integers(1, 131, (4, 5)).astype(np.int32)
SOURCES[1, 3:] = 0
# Prompts of 1, 4, 2 and 9 tokens; the last row is full.
PROMPTS = NUMBERS.integers(1, 131, (4, LENGTH)).astype(np.int32)
PROMPTS[:, 0] = 0
PROMPTS[np.arange(LENGTH) >= np.array([[1], [4], [2], [9]])] = -1


@pytest.fixture(scope='module')
def params(random_parameters):
  params = random_parameters(MODEL)
  # Small, lest the residual stream repeat the token that came in.
  table = params['token_embedder']['embedding'] / 10
  # Rows that only pad the table would win, were they not masked.
  table = jnp.where(jnp.arange(len(table))[:, None] < 131, table, 100 * table)
  return params | {'token_embedder': {'embedding': table}}


@pytest.fixture(scope='module')
def decode(params):
  """Decodes all four rows, by a program compiled once per end token."""

  def run(sources, prompts, eos_id=NEVER):
    found = greedy_decode(
        MODEL, params, jnp.asarray(sources), jnp.asarray(prompts), eos_id
    )
    return np.asarray(found)

  return run


@pytest.fixture(scope='module')
def generated(decode):
  return decode(SOURCES, PROMPTS)


@pytest.fixture(scope='module')
def next_tokens(params):
  """Returns the likeliest token after each position, recomputing all."""

  @jax.jit
  def run(rows):
    variables = {'params': params}
    states = MODEL.apply(variables, jnp.asarray(SOURCES), rows)
    head = MODEL.apply(variables, method='output_head')
    return jnp.argmax(states @ head.kernel[:131].T, axis=-1)

  return lambda rows: np.asarray(run(rows))


def python_loop(next_tokens, prompts, eos_id):
  rows = prompts.copy()
  for row in range(len(rows)):
    for position in range(1, LENGTH):
      if rows[row, position] >= 0:
        continue
      # Later places hold anything: the decoder must not see them.
      inputs = np.where(rows >= 0, rows, NUMBERS.integers(1, 131, rows.shape))
      rows[row, position] = next_tokens(inputs)[row, position - 1]
      if rows[row, position] == eos_id:
        break
  return rows


def test_greedy_decoding_equals_a_plain_loop(generated, next_tokens):
  expected = python_loop(next_tokens, PROMPTS, NEVER)
  np.testing.assert_array_equal(generated, expected)
  assert np.all((generated >= 0) & (generated < 131))
  assert len(set(generated[1])) == LENGTH  # Not one token again and again.


def test_each_row_is_generated_as_if_it_were_alone(decode, generated):
  for row in range(len(PROMPTS)):
    alone = decode(
        np.tile(SOURCES[row], (4, 1)), np.tile(PROMPTS[row], (4, 1))
    )
    np.testing.assert_array_equal(alone, np.tile(generated[row], (4, 1)))


def test_a_row_ends_with_its_end_token_unless_it_was_given(
    decode, generated, next_tokens
):
  eos_id = int(generated[1, 6])
  prompts = PROMPTS.copy()
  prompts[3, 2] = eos_id
  prompts[3, 5:] = -1
  ended = decode(SOURCES, prompts, eos_id)
  np.testing.assert_array_equal(ended[1, :7], generated[1, :7])
  np.testing.assert_array_equal(ended[1, 7:], -1)
  assert ended[3, 5] >= 0
  np.testing.assert_array_equal(
      ended, python_loop(next_tokens, prompts, eos_id)
  )
