"""Comparing a batch of pairs with others: similarities, negatives, a queue.

The mathematics of L_tcc and of the negatives of L_tcm (paper, section 3.2 and
appendix B). Arrays in, arrays out. Candidates lie in slots, each as large as a
batch: slot 0 is the batch itself, the others are batches before it. A slot's
columns are spread over the devices as the rows of a batch are, and slots are
not. So a batch goes into the queue, and every similarity is computed, where it
lies; what travels is the queries, which are small, and sums.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from codet5p_jax.array_typing import PRNGKey, Tree
from codet5p_jax.sharding import constrain

Queries = Float[Array, 'batch projection']
Candidates = Float[Array, 'slots columns projection']
Logits = Float[Array, 'batch slots columns']
Flags = Bool[Array, 'batch slots columns']
# Two words of a hash: what has the same ones is the same.
Identities = UInt32[Array, 'batch 2']
CandidateIdentities = UInt32[Array, 'slots columns 2']


def with_queue(
    batch: dict[str, Shaped[Array, 'columns *_']],
    queue: dict[str, Shaped[Array, 'slots columns *_']],
) -> dict[str, Shaped[Array, 'slots_and_one columns *_']]:
  """The candidates: the batch in slot 0, and what the queue holds.

  Args:
    batch: by name.
    queue: by name; empty for none.
  """
  candidates = {name: value[None] for name, value in batch.items()}
  for name, slots in queue.items():
    own = candidates[name].astype(slots.dtype)
    candidates[name] = jnp.concatenate([own, slots])
  return candidates


def are_there(
    weights: Float[Array, 'columns'],
    num_slots: int,
    num_batches: Int[Array, ''],
) -> Bool[Array, 'slots columns']:
  """Which candidates there are.

  Args:
    weights: of the batch's rows; 0 for those that only fill it.
    num_slots: of the queue, and one for the batch.
    num_batches: that were put into the queue so far.
  """
  is_filled = jnp.arange(num_slots) <= num_batches
  is_own = jnp.arange(num_slots)[:, None] == 0
  return jnp.where(is_own, weights > 0, is_filled[:, None])


def similarities(queries: Queries, candidates: Candidates) -> Logits:
  """Cosines of unit vectors, in full float32: they are divided by little."""
  queries = constrain(queries, None, None)
  candidates = constrain(candidates, None, 'batch', None)
  cosines = jnp.einsum(
      'bp,scp->bsc', queries, candidates, precision=lax.Precision.HIGHEST
  )
  return constrain(cosines, None, None, 'batch')


def true_pairs(
    texts: Identities,
    codes: Identities,
    candidate_texts: CandidateIdentities,
    candidate_codes: CandidateIdentities,
) -> Flags:
  """Which candidates a row of the batch is a pair with.

  Beside its own they are those of the same text or the same code: what is said
  of one holds for the other.
  """

  def same(ours, theirs):
    return jnp.all(ours[:, None, None] == theirs[None], axis=-1)

  flags = same(texts, candidate_texts) | same(codes, candidate_codes)
  return constrain(flags, None, None, 'batch')


def contrastive_losses(
    logits: Logits,
    targets: Logits,
    is_true: Flags,
    is_there: Bool[Array, 'slots columns'],
) -> tuple[Float[Array, 'batch'], Float[Array, 'batch']]:
  """Cross-entropy of each row's targets (L_tcc), and whether it finds one.

  Args:
    logits: similarities over their temperature.
    targets: sum to 1 in each row, over candidates that are there.
    is_true: which candidates it is to find.
    is_there: the others get no probability.

  Returns:
    The losses, and 1.0 for each row of which a target is likelier than all
    else.
  """
  logits = jnp.where(is_there, logits, jnp.finfo(logits.dtype).min)
  log_z = jax.nn.logsumexp(logits, axis=(1, 2))
  losses = log_z - jnp.sum(targets * logits, axis=(1, 2))

  def best(where):
    return jnp.max(jnp.where(where, logits, -jnp.inf), axis=(1, 2))

  found = best(is_there & is_true) > best(is_there & ~is_true)
  return losses, found.astype(jnp.float32)


def one_hot_targets(
    is_true: Flags, is_there: Bool[Array, 'slots columns']
) -> Logits:
  """Equal shares of 1 for the true pairs of each row."""
  flags = (is_true & is_there).astype(jnp.float32)
  return flags / jnp.maximum(jnp.sum(flags, axis=(1, 2), keepdims=True), 1)


def softened(
    targets: Logits,
    logits: Logits,
    is_there: Bool[Array, 'slots columns'],
    share: float,
) -> Logits:
  """Targets of which a share is the softmax of other logits."""
  logits = jnp.where(is_there, logits, jnp.finfo(logits.dtype).min)
  soft = jax.nn.softmax(logits, axis=(1, 2))
  return share * soft + (1 - share) * targets


def draw_negatives(
    key: PRNGKey, logits: Logits, is_allowed: Flags
) -> tuple[
    Int[Array, 'batch'], Int[Array, 'batch'], Bool[Array, 'batch']
]:
  """Draws a candidate for each row, in proportion to exp(logits).

  Args:
    key: of the random numbers.
    logits: similarities over their temperature.
    is_allowed: which candidates may be drawn.

  Returns:
    Slot and column of each, and whether there was any to draw.
  """
  # The largest of the logits with Gumbel noise is such a draw.
  noise = constrain(
      jax.random.gumbel(key, logits.shape, jnp.float32), None, None, 'batch'
  )
  scores = jnp.where(is_allowed, logits + noise, -jnp.inf)
  # Slots lie together, columns do not.
  slots = jnp.argmax(scores, axis=1)
  best = jnp.max(scores, axis=1)
  columns = jnp.argmax(best, axis=1)
  rows = jnp.arange(logits.shape[0])
  return (
      slots[rows, columns], columns, jnp.any(is_allowed, axis=(1, 2))
  )  # fmt: skip


def enqueue(
    queue: dict[str, Shaped[Array, 'slots columns *_']],
    batch: dict[str, Shaped[Array, 'batch *_']],
    num_batches: Int[Array, ''],
) -> dict[str, Shaped[Array, 'slots columns *_']]:
  """Puts a batch in place of the oldest one.

  Args:
    queue: by name.
    batch: by name.
    num_batches: that were put in before.
  """
  return {
      name: lax.dynamic_update_index_in_dim(
          slots,
          batch[name].astype(slots.dtype),
          num_batches % slots.shape[0],
          axis=0,
      )
      for name, slots in queue.items()
  }


def moving_average(average: Tree, params: Tree, momentum: float) -> Tree:
  """`momentum` times the average and the rest of the parameters, float32."""

  def move(old, new):
    # Frozen int8 kernels do not move, and have no gradient either.
    if not jnp.issubdtype(new.dtype, jnp.floating):
      return new
    # So what does not change stays as it is, to the last bit.
    old_value, new_value = old.astype(jnp.float32), new.astype(jnp.float32)
    moved = old_value + (1 - momentum) * (new_value - old_value)
    return moved.astype(old.dtype)

  return jax.tree.map(move, average, lax.stop_gradient(params))
