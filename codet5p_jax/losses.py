"""Loss functions: arrays in, arrays out."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
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
  one tile, work that of three matrix products. Where the head is frozen, its
  gradient is not computed: two products, and no array of the kernel's size.

  Args:
    hidden: the decoder's last states.
    head: see `OutputHead`; padded rows get no probability. Its `kernel_scale`
      has no gradient: an int8 kernel is never trained.
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
      lax.stop_gradient(head.kernel_scale),
      head.bias,
      tile(targets),
      tile(weights),
      head.vocab_size,
      dtype,
  )


def _tile_logits(hidden, kernel, kernel_scale, bias, vocab_size, dtype):
  """Logits [batch * tile_length, vocab] of one tile, in float32."""
  rows = hidden.reshape(-1, hidden.shape[-1])
  logits = lax.dot_general(
      rows.astype(dtype),
      kernel.astype(dtype),
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
  )
  logits = constrain(logits, 'batch', 'act_vocab')
  if kernel_scale is not None:
    logits = logits * kernel_scale
  if bias is not None:
    logits = logits + bias.astype(jnp.float32)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _tiled(
    hidden: Float[Array, 'tiles batch tile_length embed'],
    kernel,
    kernel_scale,
    bias,
    targets,
    weights,
    vocab_size: int,
    dtype: str,
):
  def body(carry, tile):
    h, t, w = tile
    logits = _tile_logits(h, kernel, kernel_scale, bias, vocab_size, dtype)
    loss, correct, _ = _tile_loss(logits, t, w)
    return (carry[0] + loss, carry[1] + correct), None

  zero = jnp.zeros((), jnp.float32)
  sums, _ = lax.scan(body, (zero, zero), (hidden, targets, weights))
  return sums


def _tiled_forward(
    hidden, kernel, kernel_scale, bias, targets, weights, vocab_size, dtype
):
  # Each argument says whether a derivative with respect to it is asked for;
  # absent ones are None.
  wants_hidden, wants_kernel = hidden.perturbed, kernel.perturbed
  wants_bias = bias is not None and bias.perturbed
  hidden, kernel, kernel_scale, bias, targets, weights = (
      None if x is None else x.value
      for x in (hidden, kernel, kernel_scale, bias, targets, weights)
  )

  def body(carry, tile):
    loss_sum, correct_sum, d_kernel, d_bias = carry
    h, t, w = tile
    logits = _tile_logits(h, kernel, kernel_scale, bias, vocab_size, dtype)
    loss, correct, log_z = _tile_loss(logits, t, w)
    token = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    is_target = (token == t.reshape(-1)[:, None]).astype(jnp.float32)
    d_logits = jnp.exp(logits - log_z[:, None]) - is_target
    d_logits = d_logits * w.reshape(-1)[:, None]
    if wants_bias:
      d_bias += jnp.sum(d_logits, axis=0)
    if kernel_scale is not None:
      d_logits = d_logits * kernel_scale
    d_logits = d_logits.astype(dtype)
    d_hidden = None
    if wants_hidden:
      d_hidden = jnp.dot(d_logits, kernel.astype(dtype))
      d_hidden = d_hidden.reshape(h.shape).astype(h.dtype)
    if wants_kernel:
      d_kernel += lax.dot_general(
          d_logits,
          h.reshape(-1, h.shape[-1]).astype(dtype),
          (((0,), (0,)), ((), ())),
          preferred_element_type=jnp.float32,
      )
    carry = (loss_sum + loss, correct_sum + correct, d_kernel, d_bias)
    return carry, d_hidden

  def zeros(wanted, like):
    return jnp.zeros(like.shape, jnp.float32) if wanted else None

  zero = jnp.zeros((), jnp.float32)
  carry = (zero, zero, zeros(wants_kernel, kernel), zeros(wants_bias, bias))
  (loss, correct, d_kernel, d_bias), d_hidden = lax.scan(
      body, carry, (hidden, targets, weights)
  )
  # The gradients are of the arguments' own dtypes.
  if wants_kernel:
    d_kernel = d_kernel.astype(kernel.dtype)
  if wants_bias:
    d_bias = d_bias.astype(bias.dtype)
  return (loss, correct), (d_hidden, d_kernel, d_bias)


def _tiled_backward(vocab_size, dtype, gradients, cotangents):
  d_loss, _ = cotangents  # The count of correct positions has no gradient.
  if isinstance(d_loss, SymbolicZero):
    d_loss = jnp.zeros((), jnp.float32)
  d_hidden, d_kernel, d_bias = (
      None if x is None else x * d_loss.astype(x.dtype) for x in gradients
  )
  return d_hidden, d_kernel, None, d_bias, None, None


_tiled.defvjp(_tiled_forward, _tiled_backward, symbolic_zeros=True)
