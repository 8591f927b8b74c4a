"""The T5 stack: encoder and decoder of CodeT5+ 60M, 220M and 770M.

Equations follow T5 v1.0 as the released checkpoints use it (transformers
`modeling_t5.py`): RMS norm before each sub-layer, sequential residuals, a
relative position bias shared by the layers of a stack, attention logits
unscaled, no biases, ReLU, an output head tied to the embedding and scaled by
emb_dim^-0.5.

One set of weights serves three modes:
  encoder-decoder   `encode` the source, `decode` the target;
  decoder-only      the encoder sees the single token [CLM];
  encoder-only      `encode` alone.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from codet5p_jax.array_typing import (
    Activations,
    AttentionBias,
    AttentionMask,
    CrossMask,
    PRNGKey,
    Positions,
    SegmentIds,
    Tokens,
    Tree,
)
from codet5p_jax.errors import require_positive
from codet5p_jax.layers import masks
from codet5p_jax.layers.attention import Attention
from codet5p_jax.layers.cache import CacheView
from codet5p_jax.layers.dense import MLP, fan_in_stddev
from codet5p_jax.layers.embedding import Embed, OutputHead
from codet5p_jax.layers.normalization import RMSNorm
from codet5p_jax.layers.positions import (
    RelativePositionBias,
    positions_or_index,
)
from codet5p_jax.models.computation import Computation, apply_layers
from codet5p_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes of the model.

  Attributes:
    vocab_size: tokens; tables are padded to a multiple of 128 rows.
    emb_dim: the model width.
    num_heads: attention heads of every layer.
    head_dim: width of one head.
    mlp_dim: hidden width of the feed-forward layers.
    num_encoder_layers: depth of the encoder.
    num_decoder_layers: depth of the decoder.
    relative_attention_num_buckets: rows of each position bias table.
    relative_attention_max_distance: distances from here on share a bucket.
    layer_norm_epsilon: added to the mean square.
    pad_id: the padding token; masked as a key in the encoder.
    eos_id: ends sources and targets.
    decoder_start_id: the first decoder input.
    indent_with_tabs: whether the weights know indentation by tabs: released
      ones were evaluated on prompts whose four spaces were made tabs (spec
      T16).
    vocabulary_kinds: kinds of `Vocabulary` that it can be used with.
    prompt_to_decoder: whether the decoder gets the prompt too, before what it
      is to write.
    max_length: tokens that each stack was made for; None for any number.
  """

  vocab_size: int
  emb_dim: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  num_encoder_layers: int
  num_decoder_layers: int
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  pad_id: int = 0
  eos_id: int = 2
  decoder_start_id: int = 0
  indent_with_tabs: bool = False

  vocabulary_kinds: ClassVar[tuple[str, ...]] = (
      'codet5',
      'codet5_bimodal',
      'sentencepiece',
  )
  prompt_to_decoder: ClassVar[bool] = False
  max_length: ClassVar[int | None] = None

  def __post_init__(self):
    sizes = (
        'vocab_size',
        'emb_dim',
        'num_heads',
        'head_dim',
        'mlp_dim',
    )
    require_positive(**{name: getattr(self, name) for name in sizes})

  def make_model(self, computation: Computation = Computation()) -> 'T5':
    return T5(self, computation)

  def head_counts(self) -> dict[str, int]:
    """Attention heads of each stack; a mesh's model axis must divide them."""
    return {'encoder': self.num_heads, 'decoder': self.num_heads}


class EncoderLayer(nn.Module):
  """Self-attention and feed-forward layer, each: x += f(norm(x))."""

  config: T5Config
  computation: Computation

  @nn.compact
  def __call__(
      self,
      x: Activations,
      bias: AttentionBias,
      mask: AttentionMask | None,
      deterministic: bool,
  ) -> tuple[Activations, None]:
    sub_layer = _SubLayers(self.config, self.computation, deterministic)
    y = sub_layer.norm('pre_attention_layer_norm')(x)
    y = sub_layer.attention('self_attention')(y, y, bias, mask, deterministic)
    x = x + sub_layer.dropout(y)

    y = sub_layer.norm('pre_mlp_layer_norm')(x)
    y = sub_layer.mlp()(y, deterministic)
    x = x + sub_layer.dropout(y)
    return constrain(x, 'batch', 'act_length', 'act_embed'), None


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention and feed-forward layer."""

  config: T5Config
  computation: Computation

  @nn.compact
  def __call__(
      self,
      x: Float[Array, 'batch q_length embed'],
      encoded: Float[Array, 'batch kv_length embed'] | None,
      bias: AttentionBias,
      mask: AttentionMask,
      cross_mask: CrossMask | None,
      deterministic: bool,
      cache_slot: Int[Array, ''] | None = None,
  ) -> tuple[Float[Array, 'batch q_length embed'], None]:
    sub_layer = _SubLayers(self.config, self.computation, deterministic)
    y = sub_layer.norm('pre_self_attention_layer_norm')(x)
    y = sub_layer.attention('self_attention')(
        y, y, bias, mask, deterministic, cache_slot=cache_slot
    )
    x = x + sub_layer.dropout(y)

    y = sub_layer.norm('pre_cross_attention_layer_norm')(x)
    y = sub_layer.attention('cross_attention')(
        y, encoded, None, cross_mask, deterministic
    )
    x = x + sub_layer.dropout(y)

    y = sub_layer.norm('pre_mlp_layer_norm')(x)
    y = sub_layer.mlp()(y, deterministic)
    x = x + sub_layer.dropout(y)
    return constrain(x, 'batch', 'act_length', 'act_embed'), None


@dataclasses.dataclass(frozen=True)
class _SubLayers:
  """The parts of a layer, as the configuration sizes them."""

  config: T5Config
  computation: Computation
  deterministic: bool

  def norm(self, name: str) -> RMSNorm:
    return RMSNorm(
        self.config.layer_norm_epsilon, self.computation.dtype, name=name
    )

  def attention(self, name: str) -> Attention:
    config = self.config
    return Attention(
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        logits_scale=1.0,
        rotary_dim=0,
        # Smaller by the scale that the logits do without.
        query_stddev=fan_in_stddev(config.emb_dim * config.head_dim),
        key_value_stddev=fan_in_stddev(config.emb_dim),
        out_stddev=fan_in_stddev(config.num_heads * config.head_dim),
        dropout_rate=self.computation.dropout_rate,
        dtype=self.computation.dtype,
        name=name,
    )

  def mlp(self) -> MLP:
    return MLP(
        self.config.mlp_dim,
        self.computation.dropout_rate,
        self.computation.dtype,
        name='mlp',
    )

  def dropout(self, x: jax.Array) -> jax.Array:
    return nn.Dropout(self.computation.dropout_rate)(x, self.deterministic)


class Encoder(nn.Module):
  """The encoder's layers and final norm, over embedded tokens."""

  config: T5Config
  computation: Computation

  @nn.compact
  def __call__(
      self,
      x: Activations,
      positions: Int[Array, '#batch length'],
      mask: AttentionMask | None,
      deterministic: bool,
  ) -> Activations:
    config, computation = self.config, self.computation
    bias = _position_bias(config, bidirectional=True)(positions, positions)
    x = nn.Dropout(computation.dropout_rate)(x, deterministic)
    x = apply_layers(
        config,
        computation,
        EncoderLayer,
        config.num_encoder_layers,
        x,
        (bias, mask, deterministic),
    )
    return _end_of_stack(config, computation, x, deterministic)


class Decoder(nn.Module):
  """The decoder's layers and final norm, over embedded tokens."""

  config: T5Config
  computation: Computation

  @nn.compact
  def __call__(
      self,
      x: Float[Array, 'batch q_length embed'],
      positions: Int[Array, '#batch q_length'],
      encoded: Float[Array, 'batch kv_length embed'] | None,
      mask: AttentionMask,
      cross_mask: CrossMask | None,
      deterministic: bool,
      key_positions: Int[Array, '#batch cache_length'] | None = None,
      cache_slot: Int[Array, ''] | None = None,
  ) -> Float[Array, 'batch q_length embed']:
    config, computation = self.config, self.computation
    if key_positions is None:
      key_positions = positions
    bias = _position_bias(config, bidirectional=False)(
        positions, key_positions
    )
    x = nn.Dropout(computation.dropout_rate)(x, deterministic)
    x = apply_layers(
        config,
        computation,
        DecoderLayer,
        config.num_decoder_layers,
        x,
        (encoded, bias, mask, cross_mask, deterministic),
        cache_slot,
    )
    return _end_of_stack(config, computation, x, deterministic)


def _position_bias(
    config: T5Config, bidirectional: bool
) -> RelativePositionBias:
  return RelativePositionBias(
      config.num_heads,
      config.relative_attention_num_buckets,
      config.relative_attention_max_distance,
      bidirectional,
      init_stddev=config.emb_dim**-0.5,
      name='relative_position_bias',
  )


def _end_of_stack(
    config: T5Config,
    computation: Computation,
    x: jax.Array,
    deterministic: bool,
) -> jax.Array:
  x = RMSNorm(
      config.layer_norm_epsilon, computation.dtype, name='final_layer_norm'
  )(x)
  return nn.Dropout(computation.dropout_rate)(x, deterministic)


class T5(nn.Module):
  """Encoder and decoder over one table of embeddings."""

  config: T5Config
  computation: Computation

  def setup(self):
    config, computation = self.config, self.computation
    self.token_embedder = Embed(
        config.vocab_size, config.emb_dim, computation.dtype
    )
    self.encoder = Encoder(config, computation)
    self.decoder = Decoder(config, computation)

  def encode(
      self,
      encoder_input_tokens: Tokens,
      encoder_segment_ids: SegmentIds | None = None,
      encoder_positions: Positions | None = None,
      deterministic: bool = True,
  ) -> Activations:
    """Returns the encoder's states [batch, length, embed].

    Padding (`pad_id`) is masked. In packed rows, `encoder_segment_ids` keep
    the packed examples apart (0 for padding). Positions enter only as
    differences, so packed examples need no positions of their own; those given
    replace the index of each token.
    """
    mask = self._key_mask(
        encoder_input_tokens, encoder_segment_ids, encoder_segment_ids
    )
    x = self._embed(encoder_input_tokens)
    positions = positions_or_index(encoder_input_tokens, encoder_positions)
    return self.encoder(x, positions, mask, deterministic)

  def decode(
      self,
      encoded: Float[Array, 'batch kv_length embed'],
      encoder_input_tokens: Int[Array, 'batch kv_length'],
      decoder_input_tokens: Int[Array, 'batch q_length'],
      encoder_segment_ids: Int[Array, 'batch kv_length'] | None = None,
      decoder_segment_ids: Int[Array, 'batch q_length'] | None = None,
      decoder_positions: Int[Array, 'batch q_length'] | None = None,
      deterministic: bool = True,
  ) -> Float[Array, 'batch q_length embed']:
    """Returns the decoder's last states [batch, q_length, embed].

    Padding among the decoder's inputs is not masked: it stands at the end,
    where causality hides it, and the start token may be the padding token.

    Where the collection `cache` is mutable, the decoder's keys and values are
    kept in it for `decode_step`.
    """
    positions = positions_or_index(decoder_input_tokens, decoder_positions)
    mask = masks.decoder_mask(
        decoder_input_tokens.shape[1], decoder_segment_ids
    )
    cross_mask = self._key_mask(
        encoder_input_tokens, decoder_segment_ids, encoder_segment_ids
    )
    x = self._embed(decoder_input_tokens)
    return self.decoder(
        x, positions, encoded, mask, cross_mask, deterministic
    )

  def decode_step(
      self,
      encoder_input_tokens: Int[Array, 'sources kv_length'],
      decoder_input_tokens: Int[Array, 'batch 1'],
      view: CacheView,
  ) -> Float[Array, 'batch 1 embed']:
    """Returns the states of one new token a row [batch, 1, embed].

    It goes into the cache that `decode` made of the prompt, which is given and
    mutable as the collection `cache`.

    Args:
      encoder_input_tokens: of the sources, each of which serves as many rows,
        one after the other.
      decoder_input_tokens: the new token of each row.
      view: of the cache.
    """
    return self.decoder(
        self._embed(decoder_input_tokens),
        view.positions,
        None,
        masks.padding_mask(view.is_seen),
        self._key_mask(encoder_input_tokens, None, None),
        True,
        view.key_positions,
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
    """Encodes, then decodes; the decoder's last states."""
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

  def output_head(self) -> OutputHead:
    """The head: the embedding table, for states scaled by emb_dim^-0.5."""
    return OutputHead(
        kernel=self.token_embedder.embedding,
        scale=self.config.emb_dim**-0.5,
        vocab_size=self.config.vocab_size,
        kernel_scale=self.token_embedder.embedding_scale,
    )

  def init_params(self, key: PRNGKey) -> Tree:
    """Returns initial parameters, boxed with the names of their axes."""
    token = jnp.ones((1, 1), jnp.int32)
    return self.init(key, token, token)['params']

  def _embed(self, tokens: Tokens) -> Activations:
    x = self.token_embedder(tokens)
    return constrain(x, 'batch', 'act_length', 'act_embed')

  def _key_mask(
      self,
      key_tokens: Int[Array, 'batch kv_length'],
      query_segment_ids: Int[Array, 'batch q_length'] | None,
      key_segment_ids: Int[Array, 'batch kv_length'] | None,
  ) -> Bool[Array, 'batch 1 #q_length kv_length']:
    if query_segment_ids is None or key_segment_ids is None:
      return masks.padding_mask(key_tokens != self.config.pad_id)
    return masks.segment_mask(query_segment_ids, key_segment_ids)
