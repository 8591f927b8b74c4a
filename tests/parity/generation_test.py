"""Greedy decoding and beam search equal `generate` of transformers.

Token for token, on a tiny T5 with parameters of ours, whose end token comes
early in some rows, late in others and in some never.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.decoding.beam_search import BeamSearch, BeamSearcher
from codet5p_jax.decoding.prefill import Prompts
from codet5p_jax.decoding.sampler import Sampler, row_keys
from codet5p_jax.decoding.sampling import Sampling
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.t5 import T5Config
from tests.models.properties import unroll
from tests.parity.transformers_t5 import make_reference, to_torch, torch

CONFIG = T5Config(
    vocab_size=61,
    emb_dim=12,
    num_heads=5,
    head_dim=7,
    mlp_dim=29,
    num_encoder_layers=2,
    num_decoder_layers=3,
    relative_attention_num_buckets=16,
    relative_attention_max_distance=20,
    pad_id=8,
    eos_id=45,
    decoder_start_id=9,
)
COMPUTATION = Computation(dtype='float32')
MAX_NEW_TOKENS = 17
SOURCE_LENGTHS = [13, 6, 1, 9, 11]


@pytest.fixture(scope='module')
def params(random_parameters):
  params = random_parameters(CONFIG.make_model(COMPUTATION), seed=5)
  # Small, lest the residual stream repeat the token that came in. With these
  # the end token comes after 7, 1, 15, never and 2 others.
  table = params['token_embedder']['embedding'] / 8
  return params | {'token_embedder': {'embedding': table}}


@pytest.fixture(scope='module')
def reference(params):
  return make_reference(CONFIG, params)


@pytest.fixture(scope='module')
def sources():
  numbers = np.random.default_rng(5)
  rows = numbers.integers(12, 61, (len(SOURCE_LENGTHS), max(SOURCE_LENGTHS)))
  for row, length in zip(rows, SOURCE_LENGTHS, strict=True):
    row[length:] = CONFIG.pad_id
  return rows.astype(np.int32)


@pytest.fixture(scope='module')
def prompts(sources):
  starts = np.full((len(sources), 1), CONFIG.decoder_start_id, np.int32)
  return Prompts(sources, starts, np.ones(len(sources), np.int32))


@pytest.fixture(scope='module')
def model():
  return CONFIG.make_model(dataclasses.replace(COMPUTATION, scan_layers=False))


def generate(reference, sources, **options):
  """What transformers generates, cut at the end token, and the scores."""
  with torch.no_grad():
    output = reference.generate(
        input_ids=to_torch(sources),
        attention_mask=to_torch(sources != CONFIG.pad_id),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=CONFIG.eos_id,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
  rows = [cut(row[1:].tolist()) for row in output.sequences.numpy()]
  return rows, getattr(output, 'sequences_scores', None)


def cut(row):
  """The tokens up to the end token."""
  if CONFIG.eos_id in row:
    return row[: row.index(CONFIG.eos_id) + 1]
  return row[:MAX_NEW_TOKENS]


def test_greedy_decoding_is_that_of_transformers(
    params, reference, sources, prompts, model
):
  sampler = Sampler(model, Sampling(temperature=0.0), CONFIG.eos_id)
  keys = row_keys(jax.random.key(0), jnp.arange(len(sources)), 0, 1)
  limits = np.full(len(sources), MAX_NEW_TOKENS)
  weights = unroll(params)
  samples = sampler.begin(
      *sampler.read(weights, prompts),
      keys,
      limits,
      max_new_tokens=MAX_NEW_TOKENS,
  )
  samples = sampler.go_on(weights, samples, MAX_NEW_TOKENS)
  found = [[t for t in row if t >= 0] for row in samples.tokens.tolist()]
  expected, _ = generate(reference, sources, num_beams=1)
  lengths = {len(row) for row in expected}
  assert MAX_NEW_TOKENS in lengths and len(lengths) > 1
  assert found == expected


@pytest.mark.parametrize(
    ('num_beams', 'num_best', 'length_penalty', 'early_stopping'),
    [
        (3, 3, 0.0, False),
        (5, 2, 2.0, False),
        (4, 4, 1.0, True),
        (7, 5, -0.5, False),
    ],
)
def test_beam_search_is_that_of_transformers(
    params, reference, sources, prompts, model, num_beams, num_best,
    length_penalty, early_stopping,
):  # fmt: skip
  search = BeamSearch(num_beams, length_penalty, early_stopping)
  tokens, scores = BeamSearcher(model, search, CONFIG.eos_id).find(
      unroll(params),
      prompts,
      np.full(len(sources), MAX_NEW_TOKENS),
      max_new_tokens=MAX_NEW_TOKENS,
  )
  expected, expected_scores = generate(
      reference,
      sources,
      num_beams=num_beams,
      num_return_sequences=num_best,
      length_penalty=length_penalty,
      early_stopping=early_stopping,
  )
  found = [
      [t for t in row if t >= 0]
      for rows in tokens[:, :num_best].tolist()
      for row in rows
  ]
  assert found == expected
  assert any(row[-1] == CONFIG.eos_id for row in found)
  np.testing.assert_allclose(
      scores[:, :num_best].reshape(-1), expected_scores, rtol=1e-4, atol=1e-5
  )
