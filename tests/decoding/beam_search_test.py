"""Of beam search, what the comparison with transformers does not show."""

import numpy as np
import pytest

from codet5p_jax.decoding.beam_search import BeamSearch, BeamSearcher
from codet5p_jax.decoding.prefill import Prompts
from codet5p_jax.errors import UserError
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.t5 import T5Config

MODEL = T5Config(
    vocab_size=61,
    emb_dim=12,
    num_heads=5,
    head_dim=7,
    mlp_dim=29,
    num_encoder_layers=1,
    num_decoder_layers=2,
).make_model(Computation(dtype='float32', scan_layers=False))
NEVER, PLACES = 999, 8
NUMBERS = np.random.default_rng(6)
PROMPTS = Prompts(
    NUMBERS.integers(1, 61, (3, 5)).astype(np.int32),
    NUMBERS.integers(1, 61, (3, 4)).astype(np.int32),
    np.array([2, 4, 1], np.int32),
)


@pytest.fixture(scope='module')
def params(random_parameters):
  params = random_parameters(MODEL, seed=4)
  table = params['token_embedder']['embedding'] / 8
  return params | {'token_embedder': {'embedding': table}}


def test_prompts_of_other_lengths_and_limits_do_not_disturb_each_other(params):
  search = BeamSearcher(MODEL, BeamSearch(3, 0.8), NEVER)
  limits = np.array([PLACES, 3, 5])
  tokens, scores = search.find(params, PROMPTS, limits, max_new_tokens=PLACES)
  assert (np.sum(tokens >= 0, axis=-1) == limits[:, None]).all()
  for row, length in enumerate(PROMPTS.lengths):
    alone = Prompts(
        PROMPTS.encoder_input_tokens[row : row + 1],
        PROMPTS.decoder_input_tokens[row : row + 1, :length],
        np.array([length], np.int32),
    )
    expected, expected_scores = search.find(
        params, alone, limits[row : row + 1], max_new_tokens=int(limits[row])
    )
    np.testing.assert_array_equal(tokens[row, :, : limits[row]], expected[0])
    np.testing.assert_allclose(scores[row], expected_scores[0], rtol=1e-5)


def test_a_whole_number_is_a_penalty_like_any_other():
  assert type(BeamSearch(2, -1).length_penalty) is float
  assert BeamSearch(2, 4) == BeamSearch(2, 4.0)


@pytest.mark.parametrize(
    ('values', 'told'),
    [((0,), 'one beam or more'), ((2, float('nan')), 'a finite length pen')],
)
def test_values_that_make_no_sense_are_told(values, told):
  with pytest.raises(UserError, match=told):
    BeamSearch(*values)
