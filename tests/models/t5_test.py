"""Properties of the T5 stack; parity/t5_test.py compares its numbers."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.losses import cross_entropy
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.t5 import T5Config
from tests.models.properties import (
    change_one_token_per_row,
    changed_states,
    count_products,
    draw_tokens,
    unroll,
)

# All sizes differ. Where a test says nothing else, dropout is switched off.
CONFIG = T5Config(
    vocab_size=131,
    emb_dim=12,
    num_heads=5,
    head_dim=7,
    mlp_dim=29,
    num_encoder_layers=2,
    num_decoder_layers=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
)
COMPUTATION = Computation(dtype='float32', dropout_rate=0.2)
SOURCE_LENGTHS, TARGET_LENGTHS = [5, 3, 7, 4, 2], [4, 6, 2, 5, 3]
ROWS = [[0, 1, 2], [3, 4]]  # Which examples a packed row holds.
CLM = 3

apply = jax.jit(
    CONFIG.make_model(COMPUTATION).apply,
    static_argnames=('method', 'deterministic'),
)


@pytest.fixture(scope='module')
def params(random_parameters):
  return random_parameters(CONFIG.make_model(COMPUTATION))


def close(tolerance):
  return functools.partial(
      np.testing.assert_allclose, rtol=tolerance, atol=tolerance
  )


def one_per_row(lengths, seed):
  """Returns tokens [examples, longest], zeros where a row is padded."""
  used = np.arange(max(lengths)) < np.array(lengths)[:, None]
  return np.where(used, draw_tokens(*used.shape, seed=seed), 0)


def pack(tokens, lengths, row_length, padding_seed):
  """Packs examples into `ROWS`; what is left holds random tokens."""
  packed = draw_tokens(len(ROWS), row_length, seed=padding_seed)
  segment_ids, positions = np.zeros_like(packed), np.zeros_like(packed)
  place = {}
  for row, examples in enumerate(ROWS):
    start = 0
    for segment, example in enumerate(examples, start=1):
      here = (row, slice(start, start + lengths[example]))
      packed[here] = tokens[example, : lengths[example]]
      segment_ids[here] = segment
      positions[here] = np.arange(lengths[example])
      place[example] = here
      start += lengths[example]
  return types.SimpleNamespace(
      tokens=packed, segment_ids=segment_ids, positions=positions, place=place
  )


@pytest.fixture(scope='module')
def examples(params):
  """Five examples of all lengths, one a row, and their last states."""
  sources = one_per_row(SOURCE_LENGTHS, seed=1)
  targets = one_per_row(TARGET_LENGTHS, seed=2)
  states = apply({'params': params}, sources, targets)
  return types.SimpleNamespace(sources=sources, targets=targets, states=states)


def assert_packed_equals(packed_states, targets, states):
  for example, place in targets.place.items():
    close(1e-5)(
        packed_states[place], states[example, : TARGET_LENGTHS[example]]
    )


@pytest.mark.parametrize('positions_restart', [False, True])
def test_packed_examples_equal_those_alone_in_their_rows(
    params, examples, positions_restart
):
  """Positions enter as differences: whether they restart changes nothing."""

  def run(padding_seed):
    source = pack(examples.sources, SOURCE_LENGTHS, 17, padding_seed)
    target = pack(examples.targets, TARGET_LENGTHS, 14, padding_seed)
    positions = source.positions, target.positions
    return target, apply(
        {'params': params},
        source.tokens,
        target.tokens,
        source.segment_ids,
        target.segment_ids,
        *(positions if positions_restart else ()),
    )

  target, states = run(padding_seed=3)
  assert_packed_equals(states, target, examples.states)
  # What stands in the padding changes nothing either.
  other_target, other_states = run(padding_seed=4)
  assert np.any(other_target.tokens != target.tokens)
  assert_packed_equals(other_states, target, examples.states)


def test_decoder_only_rows_can_be_packed_too(params, examples):
  """The encoder sees [CLM] alone, once for all examples of a row."""
  target = pack(examples.targets, TARGET_LENGTHS, 14, padding_seed=3)
  alone = apply(
      {'params': params}, jnp.full((5, 1), CLM), examples.targets
  )
  packed = apply(
      {'params': params},
      jnp.full((2, 1), CLM),
      target.tokens,
      None,
      target.segment_ids,
  )
  assert_packed_equals(packed, target, alone)


def test_the_embedding_of_the_padding_token_changes_nothing(params, examples):
  table = params['token_embedder']['embedding']
  changed = params | {
      'token_embedder': {'embedding': table.at[CONFIG.pad_id].add(1)}
  }
  states = apply({'params': changed}, examples.sources, examples.targets)
  for example, length in enumerate(TARGET_LENGTHS):
    close(1e-6)(states[example, :length], examples.states[example, :length])


def test_the_decoder_sees_no_later_token_and_all_of_the_source(params):
  source, target = draw_tokens(6, seed=1), draw_tokens(6, seed=2)
  states = apply(
      {'params': params}, np.tile(source, (7, 1)),
      change_one_token_per_row(target),
  )
  seen = changed_states(states)
  np.testing.assert_array_equal(seen, np.triu(np.ones((6, 6))))
  states = apply(
      {'params': params}, change_one_token_per_row(source),
      np.tile(target, (7, 1)),
  )
  assert np.all(changed_states(states))


def test_the_encoder_alone_sees_in_both_directions(params):
  """It needs no decoder, not even its parameters."""
  encoder_only = {
      name: params[name] for name in ('token_embedder', 'encoder')
  }
  states = apply(
      {'params': encoder_only},
      change_one_token_per_row(draw_tokens(6)),
      method='encode',
  )
  assert np.all(changed_states(states))


@functools.cache
def loss_function(deterministic=True, **changes):
  """Returns a compiled params -> (loss, gradients)."""
  computation = dataclasses.replace(COMPUTATION, **changes)
  model = CONFIG.make_model(computation)
  source = jnp.asarray(one_per_row(SOURCE_LENGTHS, seed=1))
  target = jnp.asarray(one_per_row(TARGET_LENGTHS, seed=2))

  def loss(params):
    variables = {'params': params}
    # Teacher forcing: position i predicts token i + 1.
    states = model.apply(
        variables,
        source,
        target[:, :-1],
        deterministic=deterministic,
        rngs={'dropout': jax.random.key(7, impl='rbg')},
    )
    head = model.apply(variables, method='output_head')
    wanted = target[:, 1:]
    weights = (wanted > 0).astype(jnp.float32)
    total, _ = cross_entropy(
        states, head, wanted, weights, 2, computation.dtype
    )
    return total / jnp.sum(weights)

  return jax.jit(jax.value_and_grad(loss))


def test_scanned_layers_equal_unrolled_ones(params):
  loss, gradients = loss_function()(params)
  for changes in ({}, {'remat_policy': 'full'}):
    unrolled = loss_function(scan_layers=False, **changes)
    found = unrolled(unroll(params))
    jax.tree.map(close(1e-5), found, (loss, unroll(gradients)))


@pytest.mark.parametrize('policy', ['dots', 'full'])
def test_what_is_computed_again_is_the_same_with_its_dropout(params, policy):
  expected = loss_function(deterministic=False)(params)
  found = loss_function(deterministic=False, remat_policy=policy)(params)
  jax.tree.map(close(1e-5), found, expected)


def test_policies_trade_memory_for_products(params):
  """`dots` computes attention again; `full` all of it."""
  none, dots, full = (
      count_products(
          jax.make_jaxpr(loss_function(remat_policy=policy))(params).jaxpr
      )
      for policy in ('none', 'dots', 'full')
  )
  assert none < dots < full


def test_bfloat16_keeps_float32_parameters_and_gradients(params):
  expected, gradients = loss_function()(params)
  found, rounded = loss_function(dtype='bfloat16')(params)
  assert {x.dtype for x in jax.tree.leaves(rounded)} == {jnp.dtype('float32')}
  close(2e-2)(found, expected)
  for one, other in zip(*map(jax.tree.leaves, (rounded, gradients))):
    assert np.linalg.norm(one - other) < 0.25 * np.linalg.norm(other)
  model = CONFIG.make_model(Computation(dtype='bfloat16'))
  token = jnp.ones((1, 1), jnp.int32)
  states, variables = jax.eval_shape(
      model.init_with_output, jax.random.key(0), token, token
  )
  assert states.dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(variables)} == {
      jnp.dtype('float32')
  }


def test_dropout_follows_its_key_and_its_switch(params, examples):
  def run(seed, deterministic=False):
    return apply(
        {'params': params},
        examples.sources,
        examples.targets,
        deterministic=deterministic,
        rngs={'dropout': jax.random.key(seed)},
    )

  np.testing.assert_array_equal(run(0), run(0))
  assert not np.allclose(run(0), run(1))
  assert not np.allclose(run(0), examples.states)
  close(1e-6)(run(0, deterministic=True), examples.states)


def test_initial_parameters_have_the_deviations_of_t5():
  config = dataclasses.replace(
      CONFIG, emb_dim=48, num_heads=6, head_dim=8, mlp_dim=80,
      relative_attention_num_buckets=100,
  )
  params = nn.unbox(
      jax.jit(config.make_model().init_params)(jax.random.key(0))
  )
  expected = {
      'query/kernel': (48 * 8) ** -0.5,
      'key/kernel': 48**-0.5,
      'value/kernel': 48**-0.5,
      'out/kernel': (6 * 8) ** -0.5,
      'wi/kernel': 48**-0.5,
      'wo/kernel': 80**-0.5,
      'token_embedder/embedding': 1.0,
      'relative_position_bias/embedding': 48**-0.5,
  }
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    keys = [key.key for key in path]
    if keys[-1] == 'scale':
      np.testing.assert_array_equal(leaf, 1)
      continue
    # The smallest table holds 600 values: five standard errors.
    assert np.std(leaf) == pytest.approx(
        expected['/'.join(keys[-2:])], rel=0.15
    ), keys
    if 'layers' in keys:
      assert not np.any(leaf[0] == leaf[1])


@pytest.mark.parametrize(
    'wrong', [{'remat_policy': 'some'}, {'dtype': 'float16'},
              {'dropout_rate': 1.0}, {'dropout_rate': -0.1}]
)
def test_configurations_that_mean_nothing_are_refused(wrong):
  (name, value), = wrong.items()
  expected = rf'expected .*{name}.* found {value!r}; set {name.upper()}'
  with pytest.raises(UserError, match=expected):
    Computation(**wrong)
