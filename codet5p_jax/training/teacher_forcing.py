"""Teacher-forced cross-entropy of a target, given a source.

The loss of every objective whose batch is a source and a target.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from codet5p_jax.array_typing import PRNGKey, Scalar, Tree
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.losses import cross_entropy
from codet5p_jax.training.train_step import Batch, ObjectiveOutput


def batch_spec(
    batch_size: int, source_length: int, target_length: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a batch of sources and targets."""

  def spec(length, dtype):
    return jax.ShapeDtypeStruct((batch_size, length), dtype)

  return {
      'encoder_input_tokens': spec(source_length, jnp.int32),
      'decoder_target_tokens': spec(target_length, jnp.int32),
      'decoder_loss_weights': spec(target_length, jnp.float32),
  }


def shift_right(targets: jax.Array, start_id: int) -> jax.Array:
  """Decoder inputs: the start token, then each target but the last.

  >>> shift_right(jnp.array([[1, 17, 18, 2]]), start_id=0).tolist()
  [[0, 1, 17, 18]]
  """
  return jnp.pad(
      targets[:, :-1], ((0, 0), (1, 0)), constant_values=start_id
  )


def loss(
    model: nn.Module,
    params: Tree,
    state: Tree,
    batch: Batch,
    key: PRNGKey | None,
    tile_length: int,
) -> tuple[Scalar, ObjectiveOutput]:
  """Sum of cross-entropies over target tokens; see `Objective.loss`.

  Args:
    model: the network.
    params: all of its parameters.
    state: of the objective; returned as it is.
    batch: see `batch_spec`.
    key: of the dropout; None for none.
    tile_length: see `cross_entropy`.
  """
  rngs = None if key is None else {'dropout': key}
  targets = batch['decoder_target_tokens']
  weights = batch['decoder_loss_weights']
  hidden = model.apply(
      {'params': params},
      batch['encoder_input_tokens'],
      shift_right(targets, model.config.decoder_start_id),
      deterministic=key is None,
      rngs=rngs,
  )
  head = model.apply({'params': params}, method='output_head')
  loss_sum, correct = cross_entropy(
      hidden, head, targets, weights, tile_length, model.computation.dtype
  )
  weight = jnp.sum(weights)
  return loss_sum, ObjectiveOutput(
      weight=weight, metrics={'accuracy': (correct, weight)}, state=state
  )


def check_lengths(loss_tile_length: int, **lengths: int) -> None:
  """Checks that rows hold a token between <s> and </s>.

  Args:
    loss_tile_length: of the objective.
    **lengths: of its rows, by name; macros are their capitals.

  Raises:
    UserError: a length is too small.
  """
  require_positive(loss_tile_length=loss_tile_length)
  for name, length in lengths.items():
    if length < 3:
      raise UserError(
          f'expected {name} to hold a token between <s> and </s>, found '
          f'{length}; set {name.upper()} to 3 or more'
      )
