"""The heads of stage 2 over the T5 stack.

Equations are those of sections 3.1 and 3.2 of the released system's
specification (paper, section 3.2): text and code are embedded by the encoder,
and a pair is matched by the decoder, which reads the code and looks at the
encoded text. CodeT5+ 220M bimodal does both; CodeT5+ 110M embedding is encoder
and projection alone.
"""

import dataclasses
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codet5p_jax.array_typing import PRNGKey, Scalar, Tokens, Tree
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.layers.dense import Dense, fan_in_stddev
from codet5p_jax.models import t5
from codet5p_jax.models.computation import Computation

# Of the matching head's two outputs, the one that says a pair is a match.
MATCH = 1

# Between which the temperature is kept, as in the code that the authors cite
# (BLIP).
LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 0.001, 0.5


@dataclasses.dataclass(frozen=True)
class BimodalConfig(t5.T5Config):
  """Sizes of the T5 stack and its heads.

  Attributes:
    projection_dim: width of an embedding.
    match_id: the token [Match], in place of the first one where the decoder
      matches.
    text_decoder_id: [TDec], where it writes text.
    code_decoder_id: [CDec], where it writes code.
    initial_temperature: of the similarities of text and code, a parameter that
      contrast trains. None for a model without one: the released have none.
  """

  projection_dim: int = 256
  match_id: int = 32100
  text_decoder_id: int = 32101
  code_decoder_id: int = 32102
  initial_temperature: float | None = None

  vocabulary_kinds: ClassVar[tuple[str, ...]] = (
      'codet5_bimodal',
      'sentencepiece',
  )

  def __post_init__(self):
    super().__post_init__()
    require_positive(projection_dim=self.projection_dim)
    temperature = self.initial_temperature
    if temperature is not None and not (
        math.isfinite(temperature)
        and LEAST_TEMPERATURE <= temperature <= GREATEST_TEMPERATURE
    ):
      raise UserError(
          f'expected an initial_temperature of {LEAST_TEMPERATURE} to '
          f'{GREATEST_TEMPERATURE}, found {temperature}; set TEMPERATURE'
      )

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
    if self.config.initial_temperature is not None:
      self.temperature = Temperature(self.config.initial_temperature)

  def embed(
      self, encoder_input_tokens: Tokens, deterministic: bool = True
  ) -> Float[Array, 'batch projection']:
    """Returns the embedding of each row, float32 of norm 1.

    It is the projected state of the first token, `<s>`.
    """
    return self.project(
        self.encode(encoder_input_tokens, deterministic=deterministic)
    )

  def project(
      self, encoded: Float[Array, 'batch length embed']
  ) -> Float[Array, 'batch projection']:
    """As `embed`, of rows that are encoded already."""
    return _normalise(self.projection(encoded[:, 0]))

  def similarity_temperature(self) -> Scalar:
    """What similarities are divided by before their softmax, float32."""
    return self.temperature()

  def init_params(self, key: PRNGKey) -> Tree:
    """Returns initial parameters, boxed with the names of their axes."""
    return self.init(key, method=_use_every_part)['params']


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


class Temperature(nn.Module):
  """The temperature of the similarities, a parameter."""

  initial: float

  @nn.compact
  def __call__(self) -> Scalar:
    """Returns it, kept between the bounds."""
    value = self.param(
        'value',
        nn.with_logical_partitioning(
            nn.initializers.constant(self.initial), ()
        ),
        (),
        jnp.float32,
    )
    return _bounded(value)


@jax.custom_vjp
def _bounded(value: Scalar) -> Scalar:
  """Between the bounds; a parameter beyond is not driven further out.

  BLIP cuts the parameter itself before each step. A gradient that leads back is
  that at the bound.
  """
  return jnp.clip(value, LEAST_TEMPERATURE, GREATEST_TEMPERATURE)


def _bounded_backward(value, gradient):
  leads_out = jnp.where(
      gradient > 0, value <= LEAST_TEMPERATURE, value >= GREATEST_TEMPERATURE
  )
  return (jnp.where(leads_out, 0.0, gradient),)


_bounded.defvjp(lambda value: (_bounded(value), value), _bounded_backward)


def _use_every_part(model: Embedding) -> None:
  token = jnp.ones((1, 1), jnp.int32)
  model.embed(token)
  if isinstance(model, Bimodal):
    model.match(model.encode(token), token, token)
  if model.config.initial_temperature is not None:
    model.similarity_temperature()


def _normalise(
    x: Float[Array, 'batch projection']
) -> Float[Array, 'batch projection']:
  """Returns rows of norm 1, in float32; a row of zeros stays one."""
  x = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  # As torch's `normalize` with its epsilon of 1e-12, and with a gradient at 0.
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
