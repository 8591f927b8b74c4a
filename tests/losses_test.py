import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.layers.embedding import OutputHead
from codet5p_jax.losses import cross_entropy

BATCH, LENGTH, EMBED, VOCAB, PADDED_VOCAB = 3, 7, 5, 11, 16
SCALE = 0.7
NUMBERS = np.random.default_rng(0)
HIDDEN = jnp.asarray(NUMBERS.normal(size=(BATCH, LENGTH, EMBED)), jnp.float32)
# Were the padded rows not masked, they would win everywhere.
KERNEL = jnp.asarray(
    NUMBERS.normal(size=(PADDED_VOCAB, EMBED))
    * np.where(np.arange(PADDED_VOCAB) < VOCAB, 1, 1000)[:, None],
    jnp.float32,
)
WEIGHTS = NUMBERS.uniform(0.5, 2, (BATCH, LENGTH)) * (
    NUMBERS.random((BATCH, LENGTH)) < 0.7
)
WEIGHTS = jnp.asarray(WEIGHTS, jnp.float32)
TARGETS = NUMBERS.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
# Ignored, whatever it is: some data marks padding so.
TARGETS = jnp.asarray(np.where(WEIGHTS > 0, TARGETS, -100))


@functools.partial(jax.jit, static_argnums=(2, 3))
def tiled(hidden, kernel, tile_length, dtype='float32'):
  head = OutputHead(kernel, SCALE, VOCAB)
  return cross_entropy(hidden, head, TARGETS, WEIGHTS, tile_length, dtype)


def untiled(hidden, kernel):
  """The definition, differentiated by JAX."""
  logits = (hidden * SCALE) @ kernel[:VOCAB].T
  log_p = jax.nn.log_softmax(logits, axis=-1)
  target_log_p = jnp.sum(log_p * jax.nn.one_hot(TARGETS, VOCAB), axis=-1)
  correct = jnp.argmax(logits, axis=-1) == TARGETS
  return -jnp.sum(WEIGHTS * target_log_p), jnp.sum(WEIGHTS * correct)


def upstream(loss):
  """A function of the loss whose derivative is not one."""
  return 2.5 * jnp.log(loss)


def test_the_loss_equals_a_loop_over_positions():
  loss = correct = 0.0
  for b, i in np.ndindex(BATCH, LENGTH):
    if WEIGHTS[b, i]:
      logits = SCALE * np.asarray(KERNEL[:VOCAB], np.float64) @ HIDDEN[b, i]
      log_z = np.log(np.sum(np.exp(logits)))
      loss += WEIGHTS[b, i] * (log_z - logits[TARGETS[b, i]])
      correct += WEIGHTS[b, i] * (np.argmax(logits) == TARGETS[b, i])
  assert 0 < correct < np.sum(WEIGHTS)
  np.testing.assert_allclose(tiled(HIDDEN, KERNEL, 3), (loss, correct), 1e-6)


@pytest.mark.parametrize('tile_length', [1, 3, 4, LENGTH, 50])
def test_tiles_of_any_length_give_the_same_loss_and_gradients(tile_length):
  @jax.jit
  def both(hidden, kernel):
    def in_tiles(hidden, kernel):
      return tiled(hidden, kernel, tile_length)

    return [
        (
            function(hidden, kernel),
            jax.grad(lambda h, k: upstream(function(h, k)[0]), (0, 1))(
                hidden, kernel
            ),
        )
        for function in (in_tiles, untiled)
    ]

  found, expected = both(HIDDEN, KERNEL)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
      found,
      expected,
  )
  # Rows that pad the vocabulary get nothing, not merely little.
  assert not np.any(found[1][1][VOCAB:])
  assert np.all(np.any(found[1][1][:VOCAB], axis=1))


def test_the_count_of_correct_positions_has_no_gradient():
  gradient = jax.jit(jax.grad(lambda h: tiled(h, KERNEL, 3)[1]))(HIDDEN)
  assert not np.any(gradient)


def test_bfloat16_keeps_a_float32_loss_and_kernel_gradient():
  def loss(hidden, kernel):
    return tiled(hidden, kernel, 3, 'bfloat16')[0]

  expected, _ = tiled(HIDDEN, KERNEL, 3)
  found, (d_hidden, d_kernel) = jax.jit(
      jax.value_and_grad(loss, (0, 1))
  )(HIDDEN.astype(jnp.bfloat16), KERNEL)
  assert found.dtype == d_kernel.dtype == jnp.float32
  assert d_hidden.dtype == jnp.bfloat16
  np.testing.assert_allclose(found, expected, rtol=1e-2)
  assert np.any(d_kernel.astype(jnp.bfloat16) != d_kernel)


def test_no_logits_of_a_whole_batch_are_kept():
  """The largest value of the differentiated program is a tile's, or an input.
  """
  length = 512
  shapes = [(2, length, EMBED), (PADDED_VOCAB * 8, EMBED), (2, length)]
  hidden, kernel, numbers = (np.zeros(s, np.float32) for s in shapes)

  def loss(hidden, kernel):
    head = OutputHead(kernel, SCALE, VOCAB)
    targets = jnp.zeros(numbers.shape, jnp.int32)
    return cross_entropy(
        hidden, head, targets, jnp.asarray(numbers), 8, 'float32'
    )[0]

  program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, kernel))
  assert f'f32[{2 * 8},{PADDED_VOCAB * 8}]' in program
  assert f'f32[{2 * length},{PADDED_VOCAB * 8}]' not in program
  assert f'f32[{length // 8},{2 * 8},{PADDED_VOCAB * 8}]' not in program


BIAS = jnp.asarray(NUMBERS.normal(size=PADDED_VOCAB), jnp.float32)
INT8_KERNEL = NUMBERS.integers(-127, 128, (PADDED_VOCAB, EMBED)).astype(np.int8)
KERNEL_SCALE = NUMBERS.uniform(0.001, 0.03, PADDED_VOCAB).astype(np.float32)


def twin(hidden, kernel, bias):
  """Loss, and its derivatives by hidden states, kernel and bias, in NumPy."""
  hidden, kernel, bias = (np.float64(x) for x in (hidden, kernel, bias))
  kernel, bias = kernel[:VOCAB], bias[:VOCAB]
  loss, d_hidden = 0.0, np.zeros(hidden.shape)
  d_kernel = np.zeros((PADDED_VOCAB, EMBED))
  d_bias = np.zeros(PADDED_VOCAB)
  for b, i in np.ndindex(BATCH, LENGTH):
    weight, target = float(WEIGHTS[b, i]), int(TARGETS[b, i])
    if weight:
      logits = SCALE * kernel @ hidden[b, i] + bias
      p = np.exp(logits - logits.max())
      p /= p.sum()
      loss -= weight * np.log(p[target])
      p[target] -= 1
      d_hidden[b, i] = weight * SCALE * p @ kernel
      d_kernel[:VOCAB] += weight * SCALE * np.outer(p, hidden[b, i])
      d_bias[:VOCAB] += weight * p
  return loss, (d_hidden, d_kernel, d_bias)


def test_a_head_with_a_bias_equals_its_twin():
  def loss(hidden, kernel, bias):
    head = OutputHead(kernel, SCALE, VOCAB, bias=bias)
    return cross_entropy(hidden, head, TARGETS, WEIGHTS, 3, 'float32')[0]

  found = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(HIDDEN, KERNEL, BIAS)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
      found,
      twin(HIDDEN, KERNEL, BIAS),
  )


@pytest.mark.parametrize('wanted', [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_wanted_gradients_are_computed(wanted):
  def loss(hidden, kernel, bias):
    head = OutputHead(kernel, SCALE, VOCAB, bias=bias)
    return cross_entropy(hidden, head, TARGETS, WEIGHTS, 3, 'float32')[0]

  gradient = jax.grad(loss, wanted)
  program = str(jax.make_jaxpr(gradient)(HIDDEN, KERNEL, BIAS))
  products = 1 + (0 in wanted) + (1 in wanted)
  assert program.count('dot_general') == products
  _, expected = twin(HIDDEN, KERNEL, BIAS)
  for number, found in zip(
      wanted, jax.jit(gradient)(HIDDEN, KERNEL, BIAS), strict=True
  ):
    np.testing.assert_allclose(found, expected[number], rtol=1e-5, atol=1e-5)


def test_an_int8_head_is_one_of_scaled_rows():
  def loss(hidden, kernel, kernel_scale):
    head = OutputHead(kernel, SCALE, VOCAB, kernel_scale, BIAS)
    return cross_entropy(hidden, head, TARGETS, WEIGHTS, 3, 'float32')[0]

  found, (d_hidden, d_scale) = jax.jit(jax.value_and_grad(loss, (0, 2)))(
      HIDDEN, INT8_KERNEL, KERNEL_SCALE
  )
  kernel = INT8_KERNEL * np.float64(KERNEL_SCALE)[:, None]
  expected, (expected_d_hidden, _, _) = twin(HIDDEN, kernel, BIAS)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  np.testing.assert_allclose(d_hidden, expected_d_hidden, rtol=1e-5, atol=1e-6)
  # What belongs to an int8 kernel is never trained.
  assert not np.any(d_scale)


def test_a_frozen_head_makes_no_array_of_its_kernels_size():
  def loss(hidden):
    head = OutputHead(
        jnp.zeros((PADDED_VOCAB * 8, EMBED), jnp.bfloat16), SCALE, VOCAB,
        bias=jnp.zeros(PADDED_VOCAB * 8, jnp.bfloat16),
    )  # fmt: skip
    return cross_entropy(hidden, head, TARGETS, WEIGHTS, 3, 'bfloat16')[0]

  program = str(jax.make_jaxpr(jax.grad(loss))(HIDDEN))
  assert f'f32[{PADDED_VOCAB * 8},{EMBED}]' not in program
