"""Tests that CodeGen equals that of transformers, from the bottom up.

The reference is `CodeGenForCausalLM` in float32 on the CPU, with parameters of
ours: rotary positions, attention, feed-forward layer, a layer, the stack, the
head, and the whole model with its loss and its gradients.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.layers import masks
from codet5p_jax.layers.normalization import LayerNorm
from codet5p_jax.layers.positions import apply_rotary
from codet5p_jax.models import codegen
from codet5p_jax.models.computation import Computation
from tests.models.properties import cross_entropy
from tests.parity import transformers_codegen
from tests.parity.transformers_t5 import (
    added_to_logits,
    loss_and_gradients,
    run_reference,
)

# All sizes differ, those of the batch too. The reference cuts heads in four
# groups, here of two, and has heads as wide together as the model.
CONFIG = codegen.CodeGenConfig(
    vocab_size=131,
    emb_dim=48,
    num_layers=3,
    num_heads=8,
    head_dim=6,
    rotary_dim=4,
    mlp_dim=29,
    layer_norm_epsilon=0.03,
)
COMPUTATION = Computation(dtype='float32')
SUB_LAYERS = codegen.SubLayers(CONFIG, COMPUTATION, True)
BATCH, LENGTH = 5, 41
LENGTHS = np.array([LENGTH, 40, 20, 2, 1])
IGNORED = -100  # transformers' label of a position without loss.


def run(module, params, *inputs):
  """Returns the output of a module of ours, compiled."""
  return jax.jit(module.apply)({'params': params}, *inputs)


def assert_close(found, expected, tolerance):
  np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope='module')
def small(random_parameters):
  """Both models, and random inputs of order one for their parts."""
  model = CONFIG.make_model(COMPUTATION)
  params = random_parameters(model, seed=1)
  numbers = np.random.default_rng(2)
  states = numbers.normal(size=(BATCH, LENGTH, CONFIG.emb_dim))
  return types.SimpleNamespace(
      model=model,
      params=params,
      layer=jax.tree.map(lambda leaf: leaf[0], params['decoder']['layers']),
      reference=transformers_codegen.make_reference(CONFIG, params),
      states=jnp.asarray(states, jnp.float32),
      positions=jnp.arange(LENGTH)[None],
      mask=masks.decoder_mask(LENGTH, None),
      tokens=jnp.asarray(
          numbers.integers(0, CONFIG.vocab_size, (BATCH, LENGTH)), jnp.int32
      ),
      is_token=np.arange(LENGTH) < LENGTHS[:, None],
  )


def test_rotary_positions_equal_those_of_transformers():
  numbers = np.random.default_rng(3)
  x = numbers.normal(size=(2, 100, 3, 10)).astype(np.float32)
  positions = np.stack([np.arange(100), numbers.integers(0, 128, 100)])
  found = jax.jit(apply_rotary, static_argnums=2)(
      jnp.asarray(x), jnp.asarray(positions), 6
  )
  expected = transformers_codegen.rotate(x[..., :6], positions, 6)
  assert_close(found[..., :6], expected, 1e-5)
  np.testing.assert_array_equal(found[..., 6:], x[..., 6:])


def test_the_norm_equals_that_of_transformers(small):
  # Rows near zero too, where epsilon rules, and rows far from zero.
  x = small.states * jnp.array([1, 10, 0.1, 0.01, 1])[:, None, None]
  x = x + jnp.array([0, 0, 0, 0, 7])[:, None, None]
  norm = LayerNorm(CONFIG.layer_norm_epsilon, 'float32')
  found = run(norm, small.layer['layer_norm'], x)
  reference = small.reference.transformer.h[0].ln_1
  assert_close(found, run_reference(reference, x), 1e-5)


def test_attention_equals_that_of_transformers(small):
  def attend(module, states):
    return module(
        states, states, None, small.mask, True, small.positions,
        small.positions,
    )  # fmt: skip

  attention = SUB_LAYERS.attention('self_attention')
  found = jax.jit(functools.partial(attention.apply, method=attend))(
      {'params': small.layer['self_attention']}, small.states
  )
  expected = run_reference(
      small.reference.transformer.h[0].attn,
      small.states,
      attention_mask=added_to_logits(small.mask),
      position_ids=small.positions,
  )
  assert_close(found, expected, 1e-5)


def test_the_feed_forward_layer_equals_that_of_transformers(small):
  found = run(
      codegen.FeedForward(CONFIG, COMPUTATION), small.layer['mlp'], small.states
  )
  reference = small.reference.transformer.h[0].mlp
  assert_close(found, run_reference(reference, small.states), 1e-5)


def test_a_layer_equals_that_of_transformers(small):
  layer = codegen.Layer(CONFIG, COMPUTATION)
  found, _ = jax.jit(layer.apply, static_argnums=4)(
      {'params': small.layer}, small.states, small.positions, small.mask, True
  )
  expected = run_reference(
      small.reference.transformer.h[0],
      small.states,
      attention_mask=added_to_logits(small.mask),
      position_ids=small.positions,
  )
  assert_close(found, expected, 1e-5)


def test_the_stack_equals_that_of_transformers(small):
  found = run(small.model, small.params, small.tokens[:, :1], small.tokens)
  expected = run_reference(
      small.reference.transformer,
      input_ids=small.tokens,
      attention_mask=small.is_token,
  )
  assert_close(found[small.is_token], expected[small.is_token], 1e-5)


def test_the_output_head_equals_that_of_transformers(small):
  head = small.model.apply({'params': small.params}, method='output_head')
  found = head.logits(small.states)[..., : CONFIG.vocab_size]
  expected = run_reference(small.reference.lm_head, small.states)
  assert_close(found, expected, 1e-5)


@pytest.fixture(scope='module')
def whole(small):
  """Logits, loss and gradients of padded rows, ours and the reference's."""
  # transformers shifts labels, so the first token is no target of its own. Our
  # loss leaves out targets of id 0.
  tokens = jnp.where(small.is_token, jnp.maximum(small.tokens, 1), 0)
  source = tokens[:, :1]

  @jax.jit
  def run_ours(params):
    states = small.model.apply({'params': params}, source, tokens)
    head = small.model.apply({'params': params}, method='output_head')
    loss = functools.partial(cross_entropy, small.model)
    return head.logits(states)[..., : CONFIG.vocab_size], jax.value_and_grad(
        loss
    )(params, source, tokens)

  logits, (loss, gradients) = run_ours(small.params)
  reference = transformers_codegen.make_reference(CONFIG, small.params)
  expected = loss_and_gradients(
      reference,
      tokens,
      small.is_token,
      np.where(small.is_token, tokens, IGNORED),
  )
  return types.SimpleNamespace(
      logits=logits, loss=loss, gradients=gradients, expected=expected
  )


def test_logits_equal_those_of_transformers(small, whole):
  expected, _, _ = whole.expected
  assert np.std(expected) > 0.5
  is_token = small.is_token
  assert_close(whole.logits[is_token], expected[is_token], 1e-4)


def test_the_loss_equals_that_of_transformers(whole):
  assert whole.loss == pytest.approx(whole.expected[1], rel=1e-5)


def test_gradients_of_all_parameters_equal_those_of_transformers(whole):
  found = transformers_codegen.as_in_torch(CONFIG, whole.gradients['decoder'])
  _, _, expected = whole.expected
  assert found.keys() == expected.keys()
  for name, gradient in expected.items():
    scale = np.max(np.abs(gradient))
    assert_close(found[name] / scale, gradient / scale, 1e-4)
