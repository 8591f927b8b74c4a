"""Tests that the T5 stack equals that of transformers, from the bottom up.

The reference is `T5ForConditionalGeneration` in float32 on the CPU, with
parameters of ours. Where it computes something, so do we: buckets, norm,
attention, feed-forward layer, one layer of each stack, the stacks, the head,
the whole model, its loss and its gradients.
"""

import dataclasses
import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.layers import masks
from codet5p_jax.layers.attention import Attention
from codet5p_jax.layers.dense import MLP
from codet5p_jax.layers.normalization import RMSNorm
from codet5p_jax.layers.positions import (
    RelativePositionBias,
    relative_position_bucket,
)
from codet5p_jax.models import t5
from codet5p_jax.models.computation import Computation
from codet5p_jax.training import teacher_forcing
from tests.parity.transformers_t5 import (
    added_to_logits,
    as_in_torch,
    loss_and_gradients,
    make_reference,
    position_buckets,
    run_reference,
)

# All sizes differ, those of the batches below too. The ids and epsilon are
# unlike any default, so that none is taken for granted.
CONFIG = t5.T5Config(
    vocab_size=131,
    emb_dim=12,
    num_heads=5,
    head_dim=7,
    mlp_dim=29,
    num_encoder_layers=2,
    num_decoder_layers=3,
    relative_attention_num_buckets=16,
    relative_attention_max_distance=20,
    layer_norm_epsilon=0.03,
    pad_id=8,
    decoder_start_id=9,
)
RELEASED = dataclasses.replace(
    CONFIG,
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    layer_norm_epsilon=1e-6,
    pad_id=0,
    decoder_start_id=0,
)
COMPUTATION = Computation(dtype='float32')
ATTENTION = Attention(
    num_heads=CONFIG.num_heads,
    head_dim=CONFIG.head_dim,
    logits_scale=1.0,
    rotary_dim=0,
    query_stddev=1.0,
    key_value_stddev=1.0,
    out_stddev=1.0,
    dropout_rate=0.0,
    dtype='float32',
)
BATCH, SOURCE_LENGTH, TARGET_LENGTH = 4, 37, 41
IGNORED = -100  # transformers' label of a position without loss.


class Results(NamedTuple):
  logits: Any
  loss: Any
  gradients: Any


def run(module, params, *inputs, **options):
  """Returns the output of a module of ours, compiled."""
  apply = jax.jit(functools.partial(module.apply, **options))
  return apply({'params': params}, *inputs)


def assert_close(found, expected, tolerance):
  np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope='module')
def small(random_parameters):
  """Both models, and random inputs of order one for their parts."""
  params = random_parameters(CONFIG.make_model(COMPUTATION), seed=1)
  numbers = np.random.default_rng(2)

  def states(length):
    size = (BATCH, length, CONFIG.emb_dim)
    return jnp.asarray(numbers.normal(size=size), jnp.float32)

  def lengths(longest):
    return np.array([longest, longest - 1, longest // 2, 1])[:, None]

  is_token = jnp.asarray(np.arange(SOURCE_LENGTH) < lengths(SOURCE_LENGTH))
  index = jnp.arange(TARGET_LENGTH)[None]
  return types.SimpleNamespace(
      params=params,
      layers={
          stack: jax.tree.map(lambda leaf: leaf[0], params[stack]['layers'])
          for stack in ('encoder', 'decoder')
      },
      reference=make_reference(CONFIG, params),
      source=states(SOURCE_LENGTH),
      target=states(TARGET_LENGTH),
      is_token=is_token,
      source_mask=masks.padding_mask(is_token),
      target_mask=masks.causal_mask(index, index),
  )


def position_bias(small, stack, length):
  index = jnp.arange(length)[None]
  bias = RelativePositionBias(
      CONFIG.num_heads,
      CONFIG.relative_attention_num_buckets,
      CONFIG.relative_attention_max_distance,
      bidirectional=stack == 'encoder',
      init_stddev=1.0,
  )
  params = small.params[stack]['relative_position_bias']
  return run(bias, params, index, index)


@pytest.mark.parametrize('bidirectional', [True, False])
@pytest.mark.parametrize(
    ('num_buckets', 'max_distance'),
    [(32, 128), (16, 20), (10, 37), (21, 90), (64, 1000), (128, 4096)],
)
def test_position_buckets_equal_those_of_transformers(
    bidirectional, num_buckets, max_distance
):
  relative = np.arange(-2000, 2001)
  options = bidirectional, num_buckets, max_distance
  found = jax.jit(relative_position_bucket, static_argnums=(1, 2, 3))(
      jnp.asarray(relative), *options
  )
  np.testing.assert_array_equal(found, position_buckets(relative, *options))


def test_the_norm_equals_that_of_transformers(small):
  # Rows near zero too, where epsilon rules.
  x = small.source * jnp.array([1, 10, 0.1, 0.01])[:, None, None]
  found = run(
      RMSNorm(CONFIG.layer_norm_epsilon, 'float32'),
      small.layers['encoder']['pre_attention_layer_norm'],
      x,
  )
  reference = small.reference.encoder.block[0].layer[0].layer_norm
  assert_close(found, run_reference(reference, x), 1e-5)


@pytest.mark.parametrize('stack', ['encoder', 'decoder'])
def test_self_attention_equals_that_of_transformers(small, stack):
  x = {'encoder': small.source, 'decoder': small.target}[stack]
  mask = {'encoder': small.source_mask, 'decoder': small.target_mask}[stack]
  found = run(
      ATTENTION,
      small.layers[stack]['self_attention'],
      x,
      x,
      position_bias(small, stack, x.shape[1]),
      mask,
      deterministic=True,
  )
  reference = getattr(small.reference, stack).block[0].layer[0].SelfAttention
  expected = run_reference(reference, x, mask=added_to_logits(mask))
  assert_close(found, expected, 1e-5)


def test_cross_attention_equals_that_of_transformers(small):
  found = run(
      ATTENTION,
      small.layers['decoder']['cross_attention'],
      small.target,
      small.source,
      None,
      small.source_mask,
      deterministic=True,
  )
  expected = run_reference(
      small.reference.decoder.block[0].layer[1].EncDecAttention,
      small.target,
      mask=added_to_logits(small.source_mask),
      key_value_states=small.source,
  )
  assert_close(found, expected, 1e-5)


def test_the_feed_forward_layer_equals_that_of_transformers(small):
  found = run(
      MLP(CONFIG.mlp_dim, 0.0, 'float32'),
      small.layers['encoder']['mlp'],
      small.source,
      deterministic=True,
  )
  reference = small.reference.encoder.block[0].layer[1].DenseReluDense
  assert_close(found, run_reference(reference, small.source), 1e-5)


def test_an_encoder_layer_equals_that_of_transformers(small):
  found, _ = run(
      t5.EncoderLayer(CONFIG, COMPUTATION),
      small.layers['encoder'],
      small.source,
      position_bias(small, 'encoder', SOURCE_LENGTH),
      small.source_mask,
      deterministic=True,
  )
  expected = run_reference(
      small.reference.encoder.block[0],
      small.source,
      attention_mask=added_to_logits(small.source_mask),
  )
  assert_close(found, expected, 1e-5)


def test_a_decoder_layer_equals_that_of_transformers(small):
  found, _ = run(
      t5.DecoderLayer(CONFIG, COMPUTATION),
      small.layers['decoder'],
      small.target,
      small.source,
      position_bias(small, 'decoder', TARGET_LENGTH),
      small.target_mask,
      small.source_mask,
      deterministic=True,
  )
  expected = run_reference(
      small.reference.decoder.block[0],
      small.target,
      attention_mask=added_to_logits(small.target_mask),
      encoder_hidden_states=small.source,
      encoder_attention_mask=added_to_logits(small.source_mask),
  )
  assert_close(found, expected, 1e-5)


def test_the_encoder_equals_that_of_transformers(small):
  found = run(
      t5.Encoder(CONFIG, COMPUTATION),
      small.params['encoder'],
      small.source,
      jnp.arange(SOURCE_LENGTH)[None],
      small.source_mask,
      deterministic=True,
  )
  expected = run_reference(
      small.reference.encoder,
      inputs_embeds=small.source,
      attention_mask=small.is_token,
  )
  assert_close(found, expected, 1e-5)


def test_the_decoder_equals_that_of_transformers(small):
  found = run(
      t5.Decoder(CONFIG, COMPUTATION),
      small.params['decoder'],
      small.target,
      jnp.arange(TARGET_LENGTH)[None],
      small.source,
      small.target_mask,
      small.source_mask,
      deterministic=True,
  )
  expected = run_reference(
      small.reference.decoder,
      inputs_embeds=small.target,
      encoder_hidden_states=small.source,
      encoder_attention_mask=small.is_token,
  )
  assert_close(found, expected, 1e-5)


def head_logits(model, params, hidden):
  """Returns the logits of tokens, without those of padding."""
  head = model.apply({'params': params}, method='output_head')
  return head.logits(jnp.asarray(hidden))[..., : head.vocab_size]


def test_the_output_head_equals_that_of_transformers(small):
  reference = small.reference
  encoded = run_reference(reference.encoder, inputs_embeds=small.source)
  hidden = run_reference(
      reference.decoder,
      inputs_embeds=small.target,
      encoder_hidden_states=encoded,
  )
  logits = run_reference(
      reference,
      inputs_embeds=small.source,
      decoder_inputs_embeds=small.target,
  )
  model = CONFIG.make_model(COMPUTATION)
  assert_close(head_logits(model, small.params, hidden), logits, 1e-5)


def draw_tokens(numbers, config, *shape):
  """Returns random tokens, none of them padding."""
  return numbers.integers(config.pad_id + 1, config.vocab_size, shape)


def draw_rows(numbers, config, lengths):
  """Returns rows of random tokens, padded to the longest of them."""
  used = np.arange(max(lengths)) < np.array(lengths)[:, None]
  tokens = draw_tokens(numbers, config, *used.shape)
  return jnp.asarray(np.where(used, tokens, config.pad_id), jnp.int32)


@pytest.fixture(
    scope='module',
    params=[
        (CONFIG, [SOURCE_LENGTH, 30, 17, 1], [22, TARGET_LENGTH, 1, 33]),
        (RELEASED, [3, 171, 150, 98], [163, 2, 151, 70]),
    ],
    ids=['20_tokens_to_the_last_bucket', 'released_buckets'],
)
def whole(request, random_parameters):
  """Logits, loss and gradients of padded rows, ours and the reference's."""
  config, source_lengths, target_lengths = request.param
  model = config.make_model(COMPUTATION)
  params = random_parameters(model, seed=3)
  numbers = np.random.default_rng(4)
  sources = draw_rows(numbers, config, source_lengths)
  targets = draw_rows(numbers, config, target_lengths)
  is_target = targets != config.pad_id
  batch = {
      'encoder_input_tokens': sources,
      'decoder_target_tokens': targets,
      'decoder_loss_weights': is_target.astype(jnp.float32),
  }

  def mean_loss(params):
    # The tile divides neither of the lengths.
    loss_sum, output = teacher_forcing.loss(
        model, params, {}, batch, None, tile_length=16
    )
    return loss_sum / output.weight

  @jax.jit
  def run_ours(params):
    inputs = teacher_forcing.shift_right(targets, config.decoder_start_id)
    hidden = model.apply({'params': params}, sources, inputs)
    loss, gradients = jax.value_and_grad(mean_loss)(params)
    return Results(head_logits(model, params, hidden), loss, gradients)

  expected = loss_and_gradients(
      make_reference(config, params),
      sources,
      sources != config.pad_id,
      np.where(is_target, targets, IGNORED),
  )
  return types.SimpleNamespace(
      config=config,
      ours=run_ours(params),
      expected=Results(*expected),
  )


def test_logits_equal_those_of_transformers(whole):
  assert np.std(whole.expected.logits) > 0.5
  assert_close(whole.ours.logits, whole.expected.logits, 1e-4)


def test_the_loss_equals_that_of_transformers(whole):
  assert whole.ours.loss == pytest.approx(whole.expected.loss, rel=1e-5)


def test_gradients_of_all_parameters_equal_those_of_transformers(whole):
  found = as_in_torch(whole.config, whole.ours.gradients)
  assert found.keys() == whole.expected.gradients.keys()
  for name, expected in whole.expected.gradients.items():
    scale = np.max(np.abs(expected))
    assert_close(found[name] / scale, expected / scale, 1e-4)
  # transformers has no such rows.
  table = whole.ours.gradients['token_embedder']['embedding']
  assert not np.any(table[whole.config.vocab_size :])


@pytest.mark.parametrize('stack', ['encoder', 'decoder'])
def test_the_rows_compared_reach_every_bucket(whole, stack):
  """All but one: no key after a query stands at distance zero from it."""
  name = f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  is_reached = np.any(whole.expected.gradients[name], axis=1)
  num_buckets = whole.config.relative_attention_num_buckets
  never = {num_buckets // 2} if stack == 'encoder' else set()
  assert set(np.flatnonzero(~is_reached)) == never


def pack(numbers, rows, length):
  """Packs rows of examples; random tokens fill what is left.

  Returns tokens and segment ids, both [rows, length].
  """
  tokens = numbers.integers(0, CONFIG.vocab_size, (len(rows), length))
  segment_ids = np.zeros_like(tokens)
  for row, examples in enumerate(rows):
    start = 0
    for segment, example in enumerate(examples, start=1):
      here = row, slice(start, start + len(example))
      tokens[here], segment_ids[here] = example, segment
      start += len(example)
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(segment_ids, jnp.int32)


def test_packed_examples_equal_those_alone_in_transformers(small):
  numbers = np.random.default_rng(5)

  def draw(rows):
    return [[draw_tokens(numbers, CONFIG, n) for n in row] for row in rows]

  sources = draw([[5, 31, 1], [27, 14]])
  targets = draw([[34, 1, 8], [6, 29]])
  packed_sources, source_segments = pack(numbers, sources, SOURCE_LENGTH + 6)
  packed_targets, target_segments = pack(numbers, targets, TARGET_LENGTH + 6)
  model = CONFIG.make_model(COMPUTATION)
  hidden = run(
      model,
      small.params,
      packed_sources,
      packed_targets,
      source_segments,
      target_segments,
  )
  logits = head_logits(model, small.params, hidden)
  for row, pairs in enumerate(map(zip, sources, targets)):
    for segment, (source, target) in enumerate(pairs, start=1):
      (alone,) = run_reference(
          small.reference,
          input_ids=source[None],
          decoder_input_ids=target[None],
      )
      found = logits[row][target_segments[row] == segment]
      assert_close(found, alone, 1e-4)
