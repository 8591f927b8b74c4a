"""Decoding with a cache gives what the whole prefix would, at every step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from codet5p_jax.decoding.prefill import (
    Prompts,
    decoding_params,
    make_rows,
    next_logits,
    read_prompts,
    select_rows,
)
from codet5p_jax.errors import UserError
from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.shallow_encoder_deep_decoder import (
    ShallowEncoderDeepDecoderConfig,
)
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.sharding import DECODING_RULES, sharding_activations

STEPS, SAMPLES = 5, 3
# In one batch; the longest leaves two places of its row empty.
PROMPT_LENGTHS, SLOTS = np.array([1, 6, 3, 4]), 8
SOURCE_LENGTHS, SOURCE_SLOTS = [7, 2, 9, 5], 11
VOCABULARY = 131
COMPUTATION = Computation(dtype='float32', scan_layers=False)

DEEP = CodeGenConfig(
    vocab_size=VOCABULARY,
    emb_dim=20,
    num_layers=3,
    num_heads=4,
    head_dim=6,
    rotary_dim=4,
    mlp_dim=37,
    pad_id=0,
    eos_id=0,
    decoder_start_id=0,
)
SHALLOW = dataclasses.replace(
    DEEP, emb_dim=14, num_layers=2, head_dim=10, rotary_dim=8, mlp_dim=29
)
CONFIGS = {
    't5': T5Config(
        vocab_size=VOCABULARY,
        emb_dim=12,
        num_heads=4,
        head_dim=7,
        mlp_dim=29,
        num_encoder_layers=1,
        num_decoder_layers=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=9,
    ),
    'composite': ShallowEncoderDeepDecoderConfig(
        SHALLOW, DEEP, pad_id=0, eos_id=0, decoder_start_id=0
    ),
    'codegen': DEEP,
}


@pytest.fixture(scope='module', params=CONFIGS)
def config(request):
  return CONFIGS[request.param]


@pytest.fixture(scope='module')
def model(config):
  return config.make_model(COMPUTATION)


@pytest.fixture(scope='module')
def params(model, random_parameters):
  return random_parameters(model, seed=7)


@pytest.fixture(scope='module')
def prompts(config):
  numbers = np.random.default_rng(1)
  sources = numbers.integers(1, VOCABULARY, (4, SOURCE_SLOTS))
  sources *= np.arange(SOURCE_SLOTS) < np.array(SOURCE_LENGTHS)[:, None]
  if 'encoder' not in config.head_counts():
    sources = sources[:, :1]
  # Places after a prompt hold anything: they must not be seen.
  targets = numbers.integers(1, VOCABULARY, (4, SLOTS))
  return Prompts(
      jnp.asarray(sources, jnp.int32),
      jnp.asarray(targets, jnp.int32),
      jnp.asarray(PROMPT_LENGTHS),
  )


@pytest.fixture(scope='module')
def generated():
  """Other tokens for every sample."""
  numbers = np.random.default_rng(2)
  return numbers.integers(1, VOCABULARY, (4 * SAMPLES, STEPS))


def make_programs(model, mesh=None):
  """Compiled, what reads prompts, and what takes a token more."""

  def start(params, prompts):
    return make_rows(*read_prompts(model, params, prompts), SAMPLES, STEPS)

  def go_on(params, rows, tokens, step):
    return next_logits(model, params, rows, tokens, step, STEPS)

  return [
      jax.jit(sharding_activations(mesh, DECODING_RULES, function))
      for function in (start, go_on)
  ]


@pytest.fixture(scope='module')
def programs(model):
  return make_programs(model)


@pytest.fixture(scope='module')
def cached(programs, params, prompts, generated):
  """Logits [row, step, vocab] of the token after each given one."""
  return run_cached(programs, params, prompts, generated)


def run_cached(programs, params, prompts, generated):
  start, go_on = programs
  rows, logits = start(params, prompts)
  found = [logits]
  for step in range(STEPS - 1):
    rows, logits = go_on(
        params, rows, jnp.asarray(generated[:, step]), jnp.int32(step)
    )
    found.append(np.asarray(logits))
  return np.stack(found, axis=1)


def test_cached_logits_are_those_of_the_whole_prefix(
    model, params, prompts, generated, cached
):
  variables = {'params': params}
  head = model.apply(variables, method='output_head')

  @jax.jit
  def whole(sources, targets):
    return head.logits(model.apply(variables, sources, targets))

  for row, tokens in enumerate(generated):
    prompt = row // SAMPLES
    given = prompts.decoder_input_tokens[prompt, : PROMPT_LENGTHS[prompt]]
    target = np.zeros(SLOTS + STEPS, np.int32)
    target[: len(given) + STEPS] = [*given, *tokens]
    source = prompts.encoder_input_tokens[prompt][None]
    expected = whole(source, jnp.asarray(target)[None])[0]
    first = len(given) - 1
    np.testing.assert_allclose(
        cached[row, :, :VOCABULARY],
        expected[first : first + STEPS, :VOCABULARY],
        rtol=1e-5,
        atol=1e-5,
    )


def test_logits_on_a_mesh_are_those_of_one_device(
    model, params, prompts, generated, cached
):
  mesh = Mesh(
      np.array(jax.devices()).reshape(1, 2, 4), ('replica', 'data', 'model')
  )
  found = run_cached(make_programs(model, mesh), params, prompts, generated)
  np.testing.assert_allclose(found, cached, rtol=1e-5, atol=1e-5)


def test_a_row_goes_on_from_the_row_that_it_is_given(
    programs, params, prompts, generated
):
  """As beams do: tokens and cache of another row of the same prompt."""
  start, go_on = programs
  rows, _ = start(params, prompts)
  rows, _ = go_on(params, rows, jnp.asarray(generated[:, 0]), jnp.int32(0))
  origin = jnp.arange(4 * SAMPLES) // SAMPLES * SAMPLES + 1
  moved = rows.replace(cache=select_rows(rows.cache, origin))
  token = jnp.asarray(generated[:, 1])[origin]
  _, expected = go_on(params, rows, token, jnp.int32(1))
  _, found = go_on(params, moved, token, jnp.int32(1))
  np.testing.assert_allclose(found, expected[origin], rtol=1e-5, atol=1e-5)


def test_kernels_are_cast_once_and_what_float32_needs_is_not(model, params):
  cast = decoding_params(params, 'bfloat16')
  dtypes = {
      '/'.join(key.key for key in path): leaf.dtype
      for path, leaf in jax.tree_util.tree_leaves_with_path(cast)
  }
  for path, dtype in dtypes.items():
    is_kernel = path.endswith(('kernel', 'token_embedder/embedding'))
    assert dtype == ('bfloat16' if is_kernel else 'float32'), path


def test_casting_first_changes_no_logit(config, params, prompts, generated):
  model = config.make_model(dataclasses.replace(COMPUTATION, dtype='bfloat16'))
  programs = make_programs(model)
  cast = decoding_params(params, 'bfloat16')
  np.testing.assert_array_equal(
      run_cached(programs, cast, prompts, generated),
      run_cached(programs, params, prompts, generated),
  )


def test_a_model_that_scans_its_layers_is_refused(config, params, prompts):
  model = config.make_model(dataclasses.replace(COMPUTATION, scan_layers=True))
  with pytest.raises(UserError, match='scan_layers=False'):
    read_prompts(model, params, prompts)
