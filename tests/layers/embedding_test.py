import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.layers.embedding import (
    Embed,
    OutputHead,
    UntiedOutputHead,
    padded_vocab_size,
)


@pytest.mark.parametrize(
    ('vocab_size', 'rows'),
    [(1, 128), (128, 128), (129, 256), (32100, 32128), (32103, 32128)],
)
def test_tables_hold_whole_multiples_of_128_rows(vocab_size, rows):
  assert padded_vocab_size(vocab_size) == rows


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_each_token_gets_its_row_of_a_float32_table(dtype):
  embed = Embed(130, 5, dtype)
  tokens = jnp.array([[0, 129, 7], [7, 1, 1]])
  params = nn.unbox(embed.init(jax.random.key(0), tokens))['params']
  table = params['embedding']
  assert table.shape == (256, 5) and table.dtype == jnp.float32
  # Of 1,280 values: five standard errors.
  assert abs(np.std(table) - 1) < 0.1
  found = embed.apply({'params': params}, tokens)
  assert found.dtype == dtype
  np.testing.assert_array_equal(
      found, np.asarray(table)[tokens].astype(found.dtype)
  )


def test_gradients_of_a_frequent_token_add_up_in_float32():
  tokens = jnp.full((2, 500), 7)

  def total(table):
    found = Embed(130, 5, 'bfloat16').apply(
        {'params': {'embedding': table}}, tokens
    )
    return jnp.sum(found.astype(jnp.float32))

  gradient = jax.jit(jax.grad(total))(jnp.ones((256, 5)))
  expected = np.zeros((256, 5))
  expected[7] = tokens.size
  np.testing.assert_array_equal(gradient, expected)


def test_rows_of_int8_tables_are_scaled_one_by_one():
  numbers = np.random.default_rng(1)
  table = numbers.integers(-127, 128, (256, 5)).astype(np.int8)
  scale = numbers.uniform(0.5, 1.5, 256).astype(np.float32)
  params = jax.tree.map(
      jnp.asarray, {'embedding': table, 'embedding_scale': scale}
  )
  tokens = jnp.array([[0, 129, 7], [7, 1, 1]])
  found = Embed(130, 5, 'float32').apply({'params': params}, tokens)
  np.testing.assert_array_equal(found, (table * scale[:, None])[tokens])


def test_a_table_begins_with_its_deviation():
  embed = Embed(300, 50, 'float32', init_stddev=0.02)
  params = nn.unbox(embed.init(jax.random.key(0), jnp.ones((1, 1), int)))
  # Of 19,200 values: five standard errors.
  assert np.std(params['params']['embedding']) == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize('kernel_scale', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_logits_are_scaled_products_with_a_bias(kernel_scale, bias):
  numbers = np.random.default_rng(2)
  kernel = numbers.integers(-9, 9, (128, 5)).astype(np.int8)
  factors = numbers.uniform(0.5, 1.5, 128).astype(np.float32)
  shifts = numbers.normal(size=128).astype(np.float32)
  hidden = jnp.asarray(numbers.normal(size=(2, 3, 5)), jnp.float32)
  head = OutputHead(
      kernel=jnp.asarray(kernel),
      scale=0.3,
      vocab_size=120,
      kernel_scale=jnp.asarray(factors) if kernel_scale else None,
      bias=jnp.asarray(shifts) if bias else None,
  )
  expected = 0.3 * np.asarray(hidden) @ kernel.T
  expected = expected * (factors if kernel_scale else 1)
  expected = expected + (shifts if bias else 0)
  found = head.logits(hidden)
  np.testing.assert_allclose(
      found[..., :120], expected[..., :120], rtol=1e-4, atol=1e-5
  )
  assert np.all(found[..., 120:] == -np.inf)


def test_logits_are_float32_under_bfloat16():
  hidden = jnp.full((1, 3), 1.25, jnp.bfloat16)
  kernel = jnp.array([[256.0, 1.0, 1.0]], jnp.bfloat16)
  found = OutputHead(kernel, 1.0, 1).logits(hidden)
  assert found.dtype == jnp.float32
  assert found == 1.25 * 258


def test_an_untied_head_has_a_kernel_and_a_bias_of_its_own():
  head = UntiedOutputHead(130, 50, 0.02)
  boxed = head.init(jax.random.key(0))['params']
  assert boxed['kernel'].names == ('vocab', 'embed')
  assert boxed['bias'].names == ('vocab',)
  params = nn.unbox(boxed)
  assert params['kernel'].shape == (256, 50) and params['bias'].shape == (256,)
  # Of 12,800 values: five standard errors.
  assert np.std(params['kernel']) == pytest.approx(0.02, rel=0.035)
  assert not np.any(params['bias'])
  params = {
      'kernel': jnp.ones((256, 50), jnp.int8),
      'kernel_scale': jnp.full((256,), 0.5),
      'bias': jnp.arange(256.0),
  }
  found = head.apply({'params': params})
  np.testing.assert_array_equal(
      found.logits(jnp.ones((50,)))[:130], 25 + np.arange(130)
  )
  assert found.vocab_size == 130
