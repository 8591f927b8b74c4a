"""Token embeddings, and the output head that a loss tiles."""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

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
  """What turns hidden states into logits.

      logits = (hidden * scale @ kernel.T) * kernel_scale + bias

  Attributes:
    kernel: [vocab, embed], in any dtype.
    scale: applied to the hidden states.
    vocab_size: rows of the kernel that are tokens; the rest is padding, whose
      logits are masked.
    kernel_scale: [vocab], of an int8 kernel; None for all 1.
    bias: [vocab]; None for all 0.
  """

  kernel: Num[Array, 'vocab embed']
  scale: float = flax.struct.field(pytree_node=False)
  vocab_size: int = flax.struct.field(pytree_node=False)
  kernel_scale: Float[Array, 'vocab'] | None = None
  bias: Float[Array, 'vocab'] | None = None

  def logits(
      self, hidden: Float[Array, '*batch embed']
  ) -> Float[Array, '*batch vocab']:
    """Returns logits in float32, -inf for padding; memory for all at once.

    The product is taken in the dtype of the hidden states.
    """
    logits = jnp.einsum(
        '...e,ve->...v',
        hidden * jnp.asarray(self.scale, hidden.dtype),
        self.kernel.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    if self.kernel_scale is not None:
      logits = logits * self.kernel_scale
    if self.bias is not None:
      logits = logits + self.bias.astype(jnp.float32)
    is_token = jnp.arange(logits.shape[-1]) < self.vocab_size
    return jnp.where(is_token, logits, -jnp.inf)


class Embed(nn.Module):
  """A table of token embeddings.

  An int8 table comes with `embedding_scale`, one factor per row; see
  layers/quantization.py, which makes both.

  Attributes:
    vocab_size: tokens; the table holds `padded_vocab_size` rows.
    emb_dim: the model width.
    dtype: of the looked-up embeddings; the table is created in float32.
    init_stddev: of the initial table.
  """

  vocab_size: int
  emb_dim: int
  dtype: str
  init_stddev: float = 1.0

  def setup(self):
    self.embedding = self.param(
        'embedding',
        nn.with_logical_partitioning(
            nn.initializers.normal(self.init_stddev), ('vocab', 'embed')
        ),
        (padded_vocab_size(self.vocab_size), self.emb_dim),
        jnp.float32,
    )
    self.embedding_scale = self.get_variable('params', 'embedding_scale')

  def __call__(self, tokens: Tokens) -> Activations:
    # Gathered over the axes that shard its width, once: a look-up in a table
    # cut both ways would leave every row of the batch cut in its width.
    # Rounded only after the look-up, so that gradients of all places of a
    # token add up in float32: in bfloat16 a sum of ones stops at 256.
    table = constrain(self.embedding, 'act_vocab', 'act_embed')
    rows = jnp.take(table, tokens, axis=0)
    if self.embedding_scale is not None:
      rows = rows * jnp.take(self.embedding_scale, tokens, axis=0)[..., None]
    return rows.astype(self.dtype)


class UntiedOutputHead(nn.Module):
  """An output head with weights of its own, and with a bias.

  Attributes:
    vocab_size: tokens; kernel and bias hold `padded_vocab_size` rows.
    emb_dim: the model width.
    init_stddev: of the initial kernel; the bias begins at 0.
  """

  vocab_size: int
  emb_dim: int
  init_stddev: float

  @nn.compact
  def __call__(self) -> OutputHead:
    rows = padded_vocab_size(self.vocab_size)
    return OutputHead(
        kernel=self.param(
            'kernel',
            nn.with_logical_partitioning(
                nn.initializers.normal(self.init_stddev), ('vocab', 'embed')
            ),
            (rows, self.emb_dim),
            jnp.float32,
        ),
        scale=1.0,
        vocab_size=self.vocab_size,
        kernel_scale=self.get_variable('params', 'kernel_scale'),
        bias=self.param(
            'bias',
            nn.with_logical_partitioning(nn.initializers.zeros, ('vocab',)),
            (rows,),
            jnp.float32,
        ),
    )
