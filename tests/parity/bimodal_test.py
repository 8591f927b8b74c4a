"""Tests of the heads against plain arithmetic over transformers' T5.

Sections 3.1 and 3.2 of the released system's specification, in numpy, over the
states of `T5ForConditionalGeneration` in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.models.bimodal import MATCH, BimodalConfig, EmbeddingConfig
from codet5p_jax.models.computation import Computation
from tests.parity.transformers_t5 import make_reference, run_reference

# All sizes differ; the ids are unlike any default.
SIZES = {
    'vocab_size': 131,
    'emb_dim': 12,
    'num_heads': 5,
    'head_dim': 7,
    'mlp_dim': 29,
    'num_encoder_layers': 2,
    'relative_attention_num_buckets': 16,
    'relative_attention_max_distance': 20,
    'layer_norm_epsilon': 0.03,
    'pad_id': 8,
    'eos_id': 9,
    'decoder_start_id': 7,
    'projection_dim': 17,
}
CONFIG = BimodalConfig(num_decoder_layers=3, **SIZES)
COMPUTATION = Computation(dtype='float32')
BEGIN, END, MATCH_TOKEN = 6, 9, 130
TEXT_LENGTHS, CODE_LENGTHS = [37, 23, 12, 3], [41, 2, 29, 33]
LENGTHS = {'text': TEXT_LENGTHS, 'code': CODE_LENGTHS}


def draw_rows(lengths, seed):
  """Returns rows of `<s> tokens </s>` and padding."""
  numbers = np.random.default_rng(seed)
  rows = numbers.integers(10, MATCH_TOKEN, (len(lengths), max(lengths)))
  for row, length in zip(rows, lengths, strict=True):
    row[0], row[length - 1], row[length:] = BEGIN, END, CONFIG.pad_id
  return rows


@pytest.fixture(scope='module')
def params(random_parameters):
  return random_parameters(CONFIG.make_model(COMPUTATION), seed=1)


@pytest.fixture(scope='module')
def reference(params):
  stack = {
      name: leaf
      for name, leaf in params.items()
      if name not in ('projection', 'matching_head')
  }
  return make_reference(CONFIG, stack)


def encode(reference, rows):
  return run_reference(
      reference.encoder, input_ids=rows, attention_mask=rows != CONFIG.pad_id
  )


def embed(reference, params, rows):
  projection = params['projection']
  first = encode(reference, rows)[:, 0].astype(np.float64)
  projected = first @ projection['kernel'] + projection['bias']
  return projected / np.linalg.norm(projected, axis=1, keepdims=True)


def assert_close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('which', ['text', 'code'])
def test_embeddings_are_the_projected_first_state(params, reference, which):
  rows = draw_rows(LENGTHS[which], seed=2)
  model = CONFIG.make_model(COMPUTATION)
  found = jax.jit(model.apply, static_argnames='method')(
      {'params': params}, jnp.asarray(rows), method='embed'
  )
  assert_close(found, embed(reference, params, rows))


def test_the_encoder_only_model_embeds_likewise(params, reference):
  rows = draw_rows(TEXT_LENGTHS, seed=3)
  model = EmbeddingConfig(**SIZES).make_model(COMPUTATION)
  names = ('token_embedder', 'encoder', 'projection')
  found = jax.jit(model.apply, static_argnames='method')(
      {'params': {name: params[name] for name in names}},
      jnp.asarray(rows),
      method='embed',
  )
  assert_close(found, embed(reference, params, rows))


def test_matches_and_their_scores_are_read_at_the_end_of_the_code(
    params, reference
):
  texts = draw_rows(TEXT_LENGTHS, seed=4)
  codes = draw_rows(CODE_LENGTHS, seed=5)
  pairs = codes.copy()
  pairs[:, 0] = MATCH_TOKEN  # Overwrites <s>; nothing is shifted.
  model = CONFIG.make_model(COMPUTATION)

  @jax.jit
  def run(params, texts, codes, pairs):
    def of(method, *inputs):
      return model.apply({'params': params}, *inputs, method=method)

    logits = of('match', of('encode', texts), texts, pairs)
    cosine = jnp.sum(of('embed', texts) * of('embed', codes), axis=1)
    return logits, logits[:, MATCH] + cosine

  logits, scores = run(params, *map(jnp.asarray, (texts, codes, pairs)))
  hidden = run_reference(
      reference.decoder,
      input_ids=pairs,
      attention_mask=pairs != CONFIG.pad_id,
      encoder_hidden_states=encode(reference, texts),
      encoder_attention_mask=texts != CONFIG.pad_id,
  )
  vectors = hidden[np.arange(4), np.array(CODE_LENGTHS) - 1]
  head = params['matching_head']
  expected = vectors @ np.asarray(head['kernel']) + np.asarray(head['bias'])
  assert_close(logits, expected)
  similarity = np.sum(
      embed(reference, params, texts) * embed(reference, params, codes), axis=1
  )
  assert_close(scores, expected[:, 1] + similarity)
