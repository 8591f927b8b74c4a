"""The heads of stage 2 over the T5 stack.

Equations are those of sections 3.1 and 3.2 of the released system's
specification (paper, section 3.2): text and code are embedded by the encoder,
and a pair is matched by the decoder, which reads the code and looks at the
encoded text. CodeT5+ 220M bimodal does both; CodeT5+ 110M embedding is encoder
and projection alone.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codet5p_jax.array_typing import PRNGKey, Tokens, Tree
from codet5p_jax.errors import require_positive
from codet5p_jax.layers.dense import Dense, fan_in_stddev
from codet5p_jax.models import t5
from codet5p_jax.models.computation import Computation

# Of the matching head's two outputs, the one that says a pair is a match.
MATCH = 1


@dataclasses.dataclass(frozen=True)
class BimodalConfig(t5.T5Config):
  """Sizes of the T5 stack and its heads.

  Attributes:
    projection_dim: width of an embedding.
  """

  projection_dim: int = 256

  vocabulary_kinds: ClassVar[tuple[str, ...]] = (
      'codet5_bimodal',
      'sentencepiece',
  )

  def __post_init__(self):
    super().__post_init__()
    require_positive(projection_dim=self.projection_dim)

  def make_model(self, computation: Computation = Computation()) -> 'Bimodal':
    return Bimodal(self, computation)


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig(BimodalConfig):
  """Sizes of the encoder and the projection; there is no decoder."""

  num_decoder_layers: int = dataclasses.field(default=0, init=False)

  def make_model(self, computation: Computation = Computation()) -> 'Embedding':
    return Embedding(self, computation)

  def head_counts(self) -> dict[str, int]:
    """See `T5Config.head_counts`."""
    return {'encoder': self.num_heads}


class Embedding(t5.T5):
  """The T5 encoder with a projection; it has no parameters of a decoder."""

  config: BimodalConfig

  def setup(self):
    super().setup()
    self.projection = Dense(
        (self.config.projection_dim,),
        ('embed', 'projection'),
        fan_in_stddev(self.config.emb_dim),
        bias_axes=('projection',),
        dtype=self.computation.dtype,
    )

  def embed(
      self, encoder_input_tokens: Tokens, deterministic: bool = True
  ) -> Float[Array, 'batch projection']:
    """Returns the embedding of each row, float32 of norm 1.

    It is the projected state of the first token, `<s>`.
    """
    encoded = self.encode(encoder_input_tokens, deterministic=deterministic)
    return _normalise(self.projection(encoded[:, 0]))

  def init_params(self, key: PRNGKey) -> Tree:
    """Returns initial parameters, boxed with the names of their axes."""
    token = jnp.ones((1, 1), jnp.int32)
    return self.init(key, token, method='embed')['params']


class Bimodal(Embedding):
  """The whole T5 stack with a projection and a matching head."""

  def setup(self):
    super().setup()
    self.matching_head = Dense(
        (2,),
        ('embed', 'classes'),
        fan_in_stddev(self.config.emb_dim),
        bias_axes=('classes',),
        dtype=self.computation.dtype,
    )

  def match(
      self,
      encoded: Float[Array, 'batch kv_length embed'],
      encoder_input_tokens: Int[Array, 'batch kv_length'],
      decoder_input_tokens: Int[Array, 'batch q_length'],
      deterministic: bool = True,
  ) -> Float[Array, 'batch classes']:
    """Returns two logits a row, in float32; the one at `MATCH` says yes.

    Args:
      encoded: of the text, as `encode` returns it.
      encoder_input_tokens: of the text.
      decoder_input_tokens: of the code, `[Match] code </s>`: as it is encoded,
        not shifted, with the task token in place of the first. Read at the
        last `</s>` of the row, which must have one.
      deterministic: no dropout.
    """
    hidden = self.decode(
        encoded,
        encoder_input_tokens,
        decoder_input_tokens,
        deterministic=deterministic,
    )
    index = jnp.arange(decoder_input_tokens.shape[1])
    is_end = decoder_input_tokens == self.config.eos_id
    last = jnp.max(jnp.where(is_end, index, -1), axis=1)
    rows = jnp.arange(decoder_input_tokens.shape[0])
    return self.matching_head(hidden[rows, last]).astype(jnp.float32)

  def init_params(self, key: PRNGKey) -> Tree:
    """Returns initial parameters, boxed with the names of their axes."""
    token = jnp.ones((1, 1), jnp.int32)

    def use_every_part(model):
      model.embed(token)
      model.match(model.encode(token), token, token)

    return self.init(key, method=use_every_part)['params']


def _normalise(
    x: Float[Array, 'batch projection']
) -> Float[Array, 'batch projection']:
  """Returns rows of norm 1, in float32; a row of zeros stays one."""
  x = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  # As torch's `normalize` with its epsilon of 1e-12, and with a gradient at 0.
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
