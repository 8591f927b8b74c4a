"""Token embeddings, and the output head that a loss tiles."""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from codet5p_jax.array_typing import Activations, Tokens
from codet5p_jax.sharding import constrain

# Tables are padded to whole multiples: a mesh axis of any power of two up to
# this divides them, and a TPU's matrix unit is filled.
VOCABULARY_MULTIPLE = 128


def padded_vocab_size(vocab_size: int) -> int:
  """Rows of the table that holds `vocab_size` tokens."""
  return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@flax.struct.dataclass
class OutputHead:
  """What turns hidden states into logits: `hidden * scale @ kernel.T`.

  Attributes:
    kernel: [vocab, embed], in float32.
    scale: applied to the hidden states.
    vocab_size: rows of the kernel that are tokens; the rest is padding, whose
      logits are masked.
  """

  kernel: Float[Array, 'vocab embed']
  scale: float = flax.struct.field(pytree_node=False)
  vocab_size: int = flax.struct.field(pytree_node=False)


class Embed(nn.Module):
  """A table of token embeddings.

  Attributes:
    vocab_size: tokens; the table holds `padded_vocab_size` rows.
    emb_dim: the model width.
    dtype: of the looked-up embeddings; the table is stored in float32.
  """

  vocab_size: int
  emb_dim: int
  dtype: str

  def setup(self):
    self.embedding = self.param(
        'embedding',
        nn.with_logical_partitioning(
            nn.initializers.normal(1.0), ('vocab', 'embed')
        ),
        (padded_vocab_size(self.vocab_size), self.emb_dim),
        jnp.float32,
    )

  def __call__(self, tokens: Tokens) -> Activations:
    # Gathered over the axes that shard its width, once: a look-up in a table
    # cut both ways would leave every row of the batch cut in its width.
    # Rounded only after the look-up, so that gradients of all places of a
    # token add up in float32: in bfloat16 a sum of ones stops at 256.
    table = constrain(self.embedding, 'act_vocab', 'act_embed')
    return jnp.take(table, tokens, axis=0).astype(self.dtype)
