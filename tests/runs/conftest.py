"""Whole runs, several of them of one configuration."""

import pytest

from tests.compiled import compiling_once


@pytest.fixture(scope='session')
def make_model(small_corpus):
  """Makes a T5 for the small corpus's vocabulary, all of its sizes different.

  The function takes the number of decoder layers.
  """
  from codet5p_jax.data.vocabularies import load_vocabulary
  from codet5p_jax.models.t5 import T5Config

  vocabulary = load_vocabulary(small_corpus / 'vocabulary')

  def make(num_decoder_layers):
    return T5Config(
        vocab_size=vocabulary.vocab_size,
        emb_dim=16,
        num_heads=2,
        head_dim=5,
        mlp_dim=18,
        num_encoder_layers=1,
        num_decoder_layers=num_decoder_layers,
    )

  return make


@pytest.fixture(scope='session', autouse=True)
def _compile_once():
  from codet5p_jax import trained_model
  from codet5p_jax.runs import replay, train

  with compiling_once(train, trained_model, replay):
    yield
