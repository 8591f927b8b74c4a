"""CodeGen: the decoder-only stack of CodeGen-mono, as released.

Equations follow section 4 of the released system's specification (transformers
`modeling_codegen.py`): one layer norm a layer, from which attention and the
feed-forward layer start in parallel; rotary positions on a part of each head;
logits scaled by head_dim^-0.5; an output head of its own with a bias.

models/shallow_encoder_deep_decoder.py makes an encoder and a decoder of these
layers.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codet5p_jax.array_typing import (
    Activations,
    AttentionMask,
    PRNGKey,
    Positions,
    SegmentIds,
    Tokens,
    Tree,
)
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.layers import masks
from codet5p_jax.layers.attention import Attention
from codet5p_jax.layers.cache import CacheView
from codet5p_jax.layers.dense import Dense
from codet5p_jax.layers.embedding import Embed, OutputHead, UntiedOutputHead
from codet5p_jax.layers.normalization import LayerNorm
from codet5p_jax.layers.positions import positions_or_index
from codet5p_jax.models.computation import Computation, apply_layers
from codet5p_jax.sharding import constrain

# Of all initial weights; biases begin at 0 (`initializer_range`).
INIT_STDDEV = 0.02


@dataclasses.dataclass(frozen=True)
class CodeGenConfig:
  """Sizes of the model.

  Attributes:
    vocab_size: tokens; tables are padded to a multiple of 128 rows.
    emb_dim: the model width.
    num_layers: depth.
    num_heads: attention heads of every layer.
    head_dim: width of one head.
    rotary_dim: dimensions of a head that are rotated by position.
    mlp_dim: hidden width of the feed-forward layers.
    layer_norm_epsilon: added to the variance.
    pad_id: the padding token, which is also the end of a text.
    eos_id: ends a text.
    decoder_start_id: the first input.
    vocabulary_kinds: kinds of `Vocabulary` that it can be used with.
    prompt_to_decoder: whether the decoder gets the prompt, before what it is to
      write.
    max_length: tokens that it was made for.

  Raises:
    UserError: a size is not positive, or `rotary_dim` is odd or too large.
  """

  vocab_size: int
  emb_dim: int
  num_layers: int
  num_heads: int
  head_dim: int
  rotary_dim: int
  mlp_dim: int
  layer_norm_epsilon: float = 1e-5
  pad_id: int = 50256
  eos_id: int = 50256
  decoder_start_id: int = 50256

  vocabulary_kinds: ClassVar[tuple[str, ...]] = ('codegen', 'sentencepiece')
  prompt_to_decoder: ClassVar[bool] = True
  max_length: ClassVar[int] = 2048

  def __post_init__(self):
    sizes = (
        'vocab_size',
        'emb_dim',
        'num_layers',
        'num_heads',
        'head_dim',
        'rotary_dim',
        'mlp_dim',
    )
    require_positive(**{name: getattr(self, name) for name in sizes})
    if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
      raise UserError(
          f'expected rotary_dim to be even and at most the head_dim of '
          f'{self.head_dim}, found {self.rotary_dim}; give another'
      )

  def make_model(self, computation: Computation = Computation()) -> 'CodeGen':
    return CodeGen(self, computation)

  def head_counts(self) -> dict[str, int]:
    """Attention heads of each stack; a mesh's model axis must divide them."""
    return {'decoder': self.num_heads}


class FeedForward(nn.Module):
  """Gaussian error linear units between two maps with a bias."""

  config: CodeGenConfig
  computation: Computation

  @nn.compact
  def __call__(self, x: Activations) -> Activations:
    config = self.config
    x = Dense(
        (config.mlp_dim,),
        ('embed', 'mlp'),
        INIT_STDDEV,
        bias_axes=('mlp',),
        dtype=self.computation.dtype,
        name='wi',
    )(x)
    x = jax.nn.gelu(x, approximate=True)  # By tanh, as `gelu_new`.
    x = constrain(x, 'batch', 'act_length', 'act_mlp')
    return Dense(
        (config.emb_dim,),
        ('mlp', 'embed'),
        INIT_STDDEV,
        bias_axes=('norm',),
        dtype=self.computation.dtype,
        name='wo',
    )(x)


@dataclasses.dataclass(frozen=True)
class SubLayers:
  """The parts of a layer, as the configuration sizes them."""

  config: CodeGenConfig
  computation: Computation
  deterministic: bool

  def embed(self, tokens: Tokens) -> Activations:
    config = self.config
    embedder = Embed(
        config.vocab_size,
        config.emb_dim,
        self.computation.dtype,
        INIT_STDDEV,
        name='token_embedder',
    )
    x = constrain(embedder(tokens), 'batch', 'act_length', 'act_embed')
    return self.dropout(x)

  def norm(self, name: str) -> LayerNorm:
    return LayerNorm(
        self.config.layer_norm_epsilon, self.computation.dtype, name=name
    )

  def attention(self, name: str) -> Attention:
    config = self.config
    return Attention(
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        logits_scale=config.head_dim**-0.5,
        rotary_dim=config.rotary_dim,
        query_stddev=INIT_STDDEV,
        key_value_stddev=INIT_STDDEV,
        out_stddev=INIT_STDDEV,
        dropout_rate=self.computation.dropout_rate,
        dtype=self.computation.dtype,
        name=name,
    )

  def mlp(self) -> FeedForward:
    return FeedForward(self.config, self.computation, name='mlp')

  def dropout(self, x: jax.Array) -> jax.Array:
    return nn.Dropout(self.computation.dropout_rate)(x, self.deterministic)


class Layer(nn.Module):
  """Self-attention and feed-forward layer in parallel, from one norm."""

  config: CodeGenConfig
  computation: Computation

  @nn.compact
  def __call__(
      self,
      x: Activations,
      positions: Int[Array, '#batch length'],
      mask: AttentionMask | None,
      deterministic: bool,
      cache_slot: Int[Array, ''] | None = None,
  ) -> tuple[Activations, None]:
    sub_layer = SubLayers(self.config, self.computation, deterministic)
    y = sub_layer.norm('layer_norm')(x)
    attended = sub_layer.attention('self_attention')(
        y, y, None, mask, deterministic, positions, positions, cache_slot
    )
    x = x + sub_layer.dropout(attended) + sub_layer.dropout(sub_layer.mlp()(y))
    return constrain(x, 'batch', 'act_length', 'act_embed'), None


class Stack(nn.Module):
  """Embedding, layers and final norm; the mask says who sees whom."""

  config: CodeGenConfig
  computation: Computation

  @nn.compact
  def __call__(
      self,
      tokens: Tokens,
      positions: Int[Array, '#batch length'],
      mask: AttentionMask,
      deterministic: bool,
      cache_slot: Int[Array, ''] | None = None,
  ) -> Activations:
    config, computation = self.config, self.computation
    sub_layer = SubLayers(config, computation, deterministic)
    x = apply_layers(
        config,
        computation,
        Layer,
        config.num_layers,
        sub_layer.embed(tokens),
        (positions, mask, deterministic),
        cache_slot,
    )
    return sub_layer.norm('final_layer_norm')(x)


class Decoder(Stack):
  """A stack and its output head: all of CodeGen."""

  def setup(self):
    self.output_head = UntiedOutputHead(
        self.config.vocab_size, self.config.emb_dim, INIT_STDDEV
    )


class HeadedModel(nn.Module):
  """What models have in common whose `decoder` has an output head."""

  def output_head(self) -> OutputHead:
    return self.decoder.output_head()

  def init_params(self, key: PRNGKey) -> Tree:
    """Returns initial parameters, boxed with the names of their axes."""
    token = jnp.ones((1, 1), jnp.int32)

    def use_every_part(model):
      model(token, token)
      model.output_head()

    return self.init(key, method=use_every_part)['params']


class CodeGen(HeadedModel):
  """A decoder alone, with the surface of an encoder-decoder.

  It has no encoder, and serves the decoder-only mode: its source is the single
  token [CLM], which it does not look at.
  """

  config: CodeGenConfig
  computation: Computation

  def setup(self):
    self.decoder = Decoder(self.config, self.computation)

  def encode(
      self,
      encoder_input_tokens: Tokens,
      encoder_segment_ids: SegmentIds | None = None,
      encoder_positions: Positions | None = None,
      deterministic: bool = True,
  ) -> Activations:
    """Returns states of width 0 [batch, 1, 0].

    Raises:
      UserError: the source is more than one token, and would go unseen.
    """
    del encoder_segment_ids, encoder_positions, deterministic
    length = encoder_input_tokens.shape[1]
    if length != 1:
      raise UserError(
          f'expected a source of one token for CodeGen, which has no encoder, '
          f'found {length}; use it in decoder-only mode, as in '
          f'objectives/causal_lm.gin'
      )
    return jnp.zeros(
        (*encoder_input_tokens.shape, 0), self.computation.dtype
    )

  def decode(
      self,
      encoded: Float[Array, 'batch kv_length none'],
      encoder_input_tokens: Int[Array, 'batch kv_length'],
      decoder_input_tokens: Int[Array, 'batch q_length'],
      encoder_segment_ids: Int[Array, 'batch kv_length'] | None = None,
      decoder_segment_ids: Int[Array, 'batch q_length'] | None = None,
      decoder_positions: Int[Array, 'batch q_length'] | None = None,
      deterministic: bool = True,
  ) -> Float[Array, 'batch q_length embed']:
    """Returns the last states [batch, q_length, embed].

    Padding is not masked: it stands at the end, where causality hides it.
    """
    del encoded, encoder_input_tokens, encoder_segment_ids
    return self.decoder(
        decoder_input_tokens,
        positions_or_index(decoder_input_tokens, decoder_positions),
        masks.decoder_mask(decoder_input_tokens.shape[1], decoder_segment_ids),
        deterministic,
    )

  def decode_step(
      self,
      encoder_input_tokens: Int[Array, 'sources kv_length'],
      decoder_input_tokens: Int[Array, 'batch 1'],
      view: CacheView,
  ) -> Float[Array, 'batch 1 embed']:
    """Returns the states of one new token a row; see `T5.decode_step`."""
    del encoder_input_tokens
    return self.decoder(
        decoder_input_tokens,
        view.positions,
        masks.padding_mask(view.is_seen),
        True,
        view.slot,
    )

  def __call__(
      self,
      encoder_input_tokens: Int[Array, 'batch kv_length'],
      decoder_input_tokens: Int[Array, 'batch q_length'],
      encoder_segment_ids: Int[Array, 'batch kv_length'] | None = None,
      decoder_segment_ids: Int[Array, 'batch q_length'] | None = None,
      encoder_positions: Int[Array, 'batch kv_length'] | None = None,
      decoder_positions: Int[Array, 'batch q_length'] | None = None,
      deterministic: bool = True,
  ) -> Float[Array, 'batch q_length embed']:
    """The last states; see `encode` and `decode`."""
    encoded = self.encode(
        encoder_input_tokens,
        encoder_segment_ids,
        encoder_positions,
        deterministic,
    )
    return self.decode(
        encoded,
        encoder_input_tokens,
        decoder_input_tokens,
        encoder_segment_ids,
        decoder_segment_ids,
        decoder_positions,
        deterministic,
    )
