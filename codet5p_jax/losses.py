"""Loss functions: arrays in, arrays out."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from codet5p_jax.array_typing import Activations, Scalar, Tokens, Weights
from codet5p_jax.layers.embedding import OutputHead
from codet5p_jax.sharding import constrain


def cross_entropy(
    hidden: Activations,
    head: OutputHead,
    targets: Tokens,
    weights: Weights,
    tile_length: int,
    dtype: str,
) -> tuple[Scalar, Scalar]:
  """Sum of weighted cross-entropies, without the logits of a whole batch.

  The product with the vocabulary runs over tiles of `tile_length` positions.
  When a gradient is asked for, each tile's logits are turned into gradients at
  once, so logits are never kept and never computed twice: memory is that of
  one tile, work that of three matrix products.

  Args:
    hidden: the decoder's last states.
    head: see `OutputHead`; padded rows get no probability.
    targets: the token to predict at each position.
    weights: of each position's loss; 0 for padding.
    tile_length: positions of each row that are handled at a time.
    dtype: of the matrix products; log-probabilities are float32.

  Returns:
    The sum of weight * -log p(target), and the sum of the weights of the
    positions at which the target is the likeliest token.
  """
  hidden = hidden * jnp.asarray(head.scale, hidden.dtype)
  length = targets.shape[1]
  tiles = -(-length // tile_length)
  tile_length = -(-length // tiles)

  def tile(x):
    # [batch, length, ...] to [tiles, batch, tile_length, ...]; weights of the
    # positions added at the end are 0.
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, tiles * tile_length - length)
    x = jnp.pad(x, padding)
    x = x.reshape(x.shape[0], tiles, tile_length, *x.shape[2:])
    return jnp.swapaxes(x, 0, 1)

  return _tiled(
      tile(hidden),
      head.kernel,
      tile(targets),
      tile(weights),
      head.vocab_size,
      dtype,
  )


def _tile_logits(hidden, kernel, vocab_size, dtype):
  """Logits [batch * tile_length, vocab] of one tile, in float32."""
  rows = hidden.reshape(-1, hidden.shape[-1])
  logits = lax.dot_general(
      rows.astype(dtype),
      kernel.astype(dtype),
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
  )
  logits = constrain(logits, 'batch', 'act_vocab')
  if vocab_size < kernel.shape[0]:
    token = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where(
        token < vocab_size, logits, jnp.finfo(jnp.float32).min
    )
  return logits


def _tile_loss(logits, targets, weights):
  """Returns (loss sum, correct sum, log of the partition function)."""
  targets, weights = targets.reshape(-1), weights.reshape(-1)
  token = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  is_target = token == targets[:, None]
  log_z = jax.nn.logsumexp(logits, axis=-1)
  target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
  # The target counts as predicted when no logit exceeds its own.
  correct = target_logit >= jnp.max(logits, axis=-1)
  loss = jnp.sum((log_z - target_logit) * weights)
  return loss, jnp.sum(correct * weights), log_z


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _tiled(
    hidden: Float[Array, 'tiles batch tile_length embed'],
    kernel,
    targets,
    weights,
    vocab_size: int,
    dtype: str,
):
  def body(carry, tile):
    h, t, w = tile
    logits = _tile_logits(h, kernel, vocab_size, dtype)
    loss, correct, _ = _tile_loss(logits, t, w)
    return (carry[0] + loss, carry[1] + correct), None

  zero = jnp.zeros((), jnp.float32)
  sums, _ = lax.scan(body, (zero, zero), (hidden, targets, weights))
  return sums


def _tiled_forward(hidden, kernel, targets, weights, vocab_size, dtype):
  def body(carry, tile):
    loss_sum, correct_sum, d_kernel = carry
    h, t, w = tile
    logits = _tile_logits(h, kernel, vocab_size, dtype)
    loss, correct, log_z = _tile_loss(logits, t, w)
    token = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    is_target = (token == t.reshape(-1)[:, None]).astype(jnp.float32)
    d_logits = jnp.exp(logits - log_z[:, None]) - is_target
    d_logits = (d_logits * w.reshape(-1)[:, None]).astype(dtype)
    d_hidden = jnp.dot(d_logits, kernel.astype(dtype))
    d_kernel += lax.dot_general(
        d_logits,
        h.reshape(-1, h.shape[-1]).astype(dtype),
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    d_hidden = d_hidden.reshape(h.shape).astype(h.dtype)
    return (loss_sum + loss, correct_sum + correct, d_kernel), d_hidden

  zero = jnp.zeros((), jnp.float32)
  d_kernel = jnp.zeros(kernel.shape, jnp.float32)
  (loss, correct, d_kernel), d_hidden = lax.scan(
      body, (zero, zero, d_kernel), (hidden, targets, weights)
  )
  return (loss, correct), (d_hidden, d_kernel.astype(kernel.dtype))


def _tiled_backward(vocab_size, dtype, residuals, cotangents):
  d_hidden, d_kernel = residuals
  d_loss, _ = cotangents  # The count of correct positions has no gradient.
  return (
      d_hidden * d_loss.astype(d_hidden.dtype),
      d_kernel * d_loss.astype(d_kernel.dtype),
      None,
      None,
  )


_tiled.defvjp(_tiled_forward, _tiled_backward)
