"""Tests that the composite equals its twin in NumPy, written from the spec.

The twin computes with the tensors of the released layout, so that the table of
conversion is tested with it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.conversion import reference
from codet5p_jax.conversion.codegen import CODEGEN, COMPOSITE
from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.shallow_encoder_deep_decoder import (
    ShallowEncoderDeepDecoderConfig,
)
from codet5p_jax.training.checkpoints.layout import flatten, unstack_leaves

COMPUTATION = Computation(dtype='float32')
ENCODER = CodeGenConfig(
    vocab_size=131, emb_dim=24, num_layers=2, num_heads=4, head_dim=6,
    rotary_dim=4, mlp_dim=31, layer_norm_epsilon=0.02,
)  # fmt: skip
DECODER = dataclasses.replace(
    ENCODER, emb_dim=80, num_layers=3, num_heads=8, head_dim=10, rotary_dim=6,
    mlp_dim=53, layer_norm_epsilon=0.05,
)  # fmt: skip
CONFIG = ShallowEncoderDeepDecoderConfig(ENCODER, DECODER, 130, 130, 130)


def as_theirs(family, config, params):
  """Returns our parameters as {their name: array}."""
  leaves = unstack_leaves(flatten(params))
  tensors = {}
  for row in family.rows(config):
    parts = []
    for path in row.paths:
      leaf = np.asarray(leaves.pop(path))
      is_table = 'token_embedder' in path or 'output_head' in path
      parts.append(leaf[: config.vocab_size] if is_table else leaf)
    tensors[row.theirs] = row.layout.to_theirs(parts)
  assert not leaves
  return tensors


@pytest.fixture(scope='module')
def tokens():
  numbers = np.random.default_rng(0)
  source = numbers.integers(0, 130, (3, 11))
  is_token = np.arange(11) < np.array([[11], [7], [1]])
  target = numbers.integers(0, 131, (3, 13))
  return np.where(is_token, source, 130), is_token, target


def test_the_composite_equals_its_twin(random_parameters, tokens):
  model = CONFIG.make_model(COMPUTATION)
  params = random_parameters(model, seed=1)
  source, is_token, target = tokens

  @jax.jit
  def run(params):
    variables = {'params': params}
    hidden = model.apply(variables, jnp.asarray(source), jnp.asarray(target))
    return model.apply(variables, method='output_head').logits(hidden)

  expected = reference.composite_logits(
      as_theirs(COMPOSITE, CONFIG, params).__getitem__,
      COMPOSITE.write_config(CONFIG),
      source,
      is_token,
      target,
  )
  found = run(params)[..., : CONFIG.vocab_size]
  scale = np.max(np.abs(expected))
  assert scale > 1
  np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


def test_codegen_equals_its_twin(random_parameters, tokens):
  model = DECODER.make_model(COMPUTATION)
  params = random_parameters(model, seed=2)
  _, _, target = tokens

  @jax.jit
  def run(params):
    variables = {'params': params}
    clm = jnp.ones((len(target), 1), jnp.int32)
    hidden = model.apply(variables, clm, jnp.asarray(target))
    return model.apply(variables, method='output_head').logits(hidden)

  expected = reference.codegen_logits(
      as_theirs(CODEGEN, DECODER, params).__getitem__,
      CODEGEN.write_config(DECODER),
      target,
  )
  found = run(params)[..., : DECODER.vocab_size]
  scale = np.max(np.abs(expected))
  np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)
