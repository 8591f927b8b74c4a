import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.layers.embedding import Embed, padded_vocab_size


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
