"""Properties of the heads; parity/bimodal_test.py compares their numbers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.models.bimodal import MATCH, BimodalConfig, EmbeddingConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.t5 import T5Config
from tests.models.properties import draw_tokens

# All sizes differ.
SIZES = {
    'vocab_size': 131,
    'emb_dim': 12,
    'num_heads': 5,
    'head_dim': 7,
    'mlp_dim': 29,
    'num_encoder_layers': 2,
    'relative_attention_num_buckets': 8,
    'relative_attention_max_distance': 20,
    'eos_id': 9,
}
BIMODAL = BimodalConfig(num_decoder_layers=3, projection_dim=17, **SIZES)
EMBEDDING = EmbeddingConfig(projection_dim=17, **SIZES)
COMPUTATION = Computation(dtype='float32', dropout_rate=0.2)
EOS, MATCH_TOKEN = 9, 130

apply = jax.jit(
    BIMODAL.make_model(COMPUTATION).apply,
    static_argnames=('method', 'deterministic'),
)


@pytest.fixture(scope='module')
def params(random_parameters):
  return random_parameters(BIMODAL.make_model(COMPUTATION))


def test_embeddings_have_norm_one(params):
  found = apply({'params': params}, draw_tokens(3, 6), method='embed')
  assert found.shape == (3, 17)
  np.testing.assert_allclose(jnp.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_embeddings_are_float32_of_norm_one_under_bfloat16(params):
  model = BIMODAL.make_model(Computation(dtype='bfloat16'))
  found = jax.jit(model.apply, static_argnames='method')(
      {'params': params}, draw_tokens(3, 6), method='embed'
  )
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(jnp.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_a_state_without_length_has_an_embedding_and_a_gradient(params):
  """All zeros stay zeros: nothing becomes NaN."""
  zeros = jax.tree.map(jnp.zeros_like, params['projection'])
  model = BIMODAL.make_model(COMPUTATION)
  tokens = jnp.asarray(draw_tokens(2, 4))

  @jax.jit
  @jax.value_and_grad
  def total(params):
    return jnp.sum(model.apply({'params': params}, tokens, method='embed'))

  found, gradient = total(params | {'projection': zeros})
  assert found == 0
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_the_encoder_alone_embeds_as_the_whole_model(params, random_parameters):
  model = EMBEDDING.make_model(COMPUTATION)
  names = {'token_embedder', 'encoder', 'projection'}
  assert set(random_parameters(model)) == names
  tokens = draw_tokens(3, 6)
  np.testing.assert_array_equal(
      jax.jit(model.apply, static_argnames='method')(
          {'params': {name: params[name] for name in names}},
          tokens,
          method='embed',
      ),
      apply({'params': params}, tokens, method='embed'),
  )


def match(params, text, code, **options):
  variables = {'params': params}
  encoded = apply(variables, text, method='encode')
  return apply(variables, encoded, text, code, method='match', **options)


def test_pairs_are_matched_at_the_last_end_of_the_code(params):
  text = draw_tokens(2, 5, seed=1)
  code = np.array([
      [MATCH_TOKEN, 20, EOS, 21, EOS, 0, 0],
      [MATCH_TOKEN, 22, 23, EOS, 24, 25, EOS],
  ])
  expected = match(params, text, code)
  assert expected.shape == (2, 2) and MATCH == 1
  alone = [
      match(params, text[:1], code[:1, :5]), match(params, text[1:], code[1:])
  ]
  np.testing.assert_allclose(
      expected, np.concatenate(alone), rtol=1e-5, atol=1e-5
  )
  # What follows the last end is not seen; what stands before it is.
  code[0, 5:] = 30
  np.testing.assert_array_equal(match(params, text, code)[0], expected[0])
  code[0, 3] = 31
  assert np.all(match(params, text, code)[0] != expected[0])


def test_a_match_depends_on_the_text(params):
  text = draw_tokens(2, 5, seed=1)
  code = np.array([[MATCH_TOKEN, 20, 21, EOS]] * 2)
  one, other = match(params, text, code)
  assert np.all(np.abs(one - other) > 1e-4)


def test_dropout_follows_its_switch(params):
  text, code = draw_tokens(1, 5), np.array([[MATCH_TOKEN, 20, 21, EOS]])
  options = {
      'deterministic': False, 'rngs': {'dropout': jax.random.key(0)}
  }
  dropped = match(params, text, code, **options)
  assert not np.allclose(dropped, match(params, text, code))
  embedded = apply({'params': params}, text, method='embed', **options)
  expected = apply({'params': params}, text, method='embed')
  assert not np.allclose(embedded, expected)


def test_the_stack_begins_as_that_of_t5_and_heads_with_their_deviation():
  sizes = {field.name for field in dataclasses.fields(T5Config)}
  stack = T5Config(**{name: getattr(BIMODAL, name) for name in sizes})
  one, other = (
      nn.unbox(jax.jit(config.make_model().init_params)(jax.random.key(0)))
      for config in (stack, dataclasses.replace(BIMODAL, projection_dim=400))
  )
  heads = {name: other.pop(name) for name in ('projection', 'matching_head')}
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert heads['matching_head']['kernel'].shape == (12, 2)
  assert heads['matching_head']['bias'].shape == (2,)
  # Of 4,800 values: five standard errors.
  assert np.std(heads['projection']['kernel']) == pytest.approx(
      12**-0.5, rel=0.055
  )
  assert not np.any(heads['projection']['bias'])


def test_a_width_of_nothing_is_refused():
  with pytest.raises(UserError, match='projection_dim to be at least 1'):
    dataclasses.replace(BIMODAL, projection_dim=0)


def test_a_configuration_says_what_goes_with_it():
  assert BIMODAL.head_counts() == {'encoder': 5, 'decoder': 5}
  assert EMBEDDING.head_counts() == {'encoder': 5}
  assert EMBEDDING.num_decoder_layers == 0
  for config in (BIMODAL, EMBEDDING):
    assert not config.prompt_to_decoder and not config.indent_with_tabs
    assert config.vocabulary_kinds[0] == 'codet5_bimodal'


@pytest.mark.parametrize(('value', 'down', 'up'), [
    (0.02, 1, -1), (0.7, 1, 0), (-3.0, 0, -1),
])  # fmt: skip
def test_a_temperature_is_kept_between_its_bounds_and_can_come_back(
    value, down, up
):
  """Gradients of 1 and -1, which descent follows down and up."""
  model = dataclasses.replace(
      BIMODAL, initial_temperature=0.07
  ).make_model(COMPUTATION)
  shapes = nn.unbox(jax.eval_shape(model.init_params, jax.random.key(0)))
  assert shapes['temperature']['value'].shape == ()

  def of(value):
    params = {'temperature': {'value': value}}
    return model.apply({'params': params}, method='similarity_temperature')

  found, backward = jax.vjp(of, jnp.float32(value))
  assert found == pytest.approx(np.clip(value, 0.001, 0.5), rel=1e-6)
  assert [backward(jnp.float32(sign))[0] for sign in (1, -1)] == [down, up]


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 0.0, 0.6, -1.0])
def test_a_temperature_that_makes_no_sense_is_refused(value):
  with pytest.raises(UserError, match='temperature of 0.001 to 0.5, found'):
    dataclasses.replace(BIMODAL, initial_temperature=value)


def test_only_a_model_that_is_asked_for_one_has_a_temperature(params):
  assert 'temperature' not in params
