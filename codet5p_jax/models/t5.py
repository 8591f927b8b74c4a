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
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from codet5p_jax.array_typing import (
    Activations,
    AttentionBias,
    AttentionMask,
    Positions,
    SegmentIds,
    Tokens,
)
from codet5p_jax.layers import masks
from codet5p_jax.layers.attention import Attention
from codet5p_jax.layers.dense import MLP
from codet5p_jax.layers.embedding import Embed, OutputHead
from codet5p_jax.layers.normalization import RMSNorm
from codet5p_jax.layers.positions import RelativePositionBias
from codet5p_jax.sharding import constrain

# What the backward pass of a layer finds saved, and what it computes again.
REMAT_POLICIES = {
    # Everything is saved.
    'none': None,
    # Results of products with weights are saved; attention logits and
    # element-wise operations are computed again.
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Only each layer's input is saved.
    'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes of the model, and how it is computed.

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
    decoder_start_id: the first decoder input.
    dropout_rate: of embeddings, attention weights and sub-layer outputs.
    dtype: of the computation; parameters are float32.
    remat_policy: a key of `REMAT_POLICIES`.
    scan_layers: one compiled layer applied to stacked parameters (fast to
      compile), or one copy per layer.
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
  decoder_start_id: int = 0
  dropout_rate: float = 0.0
  dtype: str = 'bfloat16'
  remat_policy: str = 'none'
  scan_layers: bool = True

  def __post_init__(self):
    if self.remat_policy not in REMAT_POLICIES:
      raise ValueError(
          f'remat_policy is {self.remat_policy!r}; known: '
          f'{", ".join(REMAT_POLICIES)}'
      )
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(
          f'dtype is {self.dtype!r}; expected float32 or bfloat16'
      )
    if not 0 <= self.dropout_rate < 1:
      raise ValueError(
          f'dropout_rate is {self.dropout_rate}; expected 0 <= rate < 1'
      )

  def make_model(self) -> 'T5':
    return T5(self)


class EncoderLayer(nn.Module):
  """Self-attention and feed-forward layer, each: x += f(norm(x))."""

  config: T5Config

  @nn.compact
  def __call__(
      self,
      x: Activations,
      bias: AttentionBias,
      mask: AttentionMask | None,
      deterministic: bool,
  ) -> tuple[Activations, None]:
    sub_layer = _SubLayers(self.config, deterministic)
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

  @nn.compact
  def __call__(
      self,
      x: Float[Array, 'batch q_length embed'],
      encoded: Float[Array, 'batch kv_length embed'],
      bias: AttentionBias,
      mask: AttentionMask,
      cross_mask: AttentionMask | None,
      deterministic: bool,
  ) -> tuple[Float[Array, 'batch q_length embed'], None]:
    sub_layer = _SubLayers(self.config, deterministic)
    y = sub_layer.norm('pre_self_attention_layer_norm')(x)
    y = sub_layer.attention('self_attention')(y, y, bias, mask, deterministic)
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
  deterministic: bool

  def norm(self, name: str) -> RMSNorm:
    return RMSNorm(
        self.config.layer_norm_epsilon, self.config.dtype, name=name
    )

  def attention(self, name: str) -> Attention:
    return Attention(
        self.config.num_heads,
        self.config.head_dim,
        self.config.dropout_rate,
        self.config.dtype,
        name=name,
    )

  def mlp(self) -> MLP:
    return MLP(
        self.config.mlp_dim,
        self.config.dropout_rate,
        self.config.dtype,
        name='mlp',
    )

  def dropout(self, x: jax.Array) -> jax.Array:
    return nn.Dropout(self.config.dropout_rate)(x, self.deterministic)


class Encoder(nn.Module):
  """The encoder's layers and final norm, over embedded tokens."""

  config: T5Config

  @nn.compact
  def __call__(
      self,
      x: Activations,
      positions: Int[Array, '#batch length'],
      mask: AttentionMask | None,
      deterministic: bool,
  ) -> Activations:
    config = self.config
    bias = _position_bias(config, bidirectional=True)(positions, positions)
    x = nn.Dropout(config.dropout_rate)(x, deterministic)
    x = _apply_layers(
        config,
        EncoderLayer,
        config.num_encoder_layers,
        x,
        (bias, mask, deterministic),
    )
    return _end_of_stack(config, x, deterministic)


class Decoder(nn.Module):
  """The decoder's layers and final norm, over embedded tokens."""

  config: T5Config

  @nn.compact
  def __call__(
      self,
      x: Float[Array, 'batch q_length embed'],
      positions: Int[Array, '#batch q_length'],
      encoded: Float[Array, 'batch kv_length embed'],
      mask: AttentionMask,
      cross_mask: AttentionMask | None,
      deterministic: bool,
  ) -> Float[Array, 'batch q_length embed']:
    config = self.config
    bias = _position_bias(config, bidirectional=False)(positions, positions)
    x = nn.Dropout(config.dropout_rate)(x, deterministic)
    x = _apply_layers(
        config,
        DecoderLayer,
        config.num_decoder_layers,
        x,
        (encoded, bias, mask, cross_mask, deterministic),
    )
    return _end_of_stack(config, x, deterministic)


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
    config: T5Config, x: jax.Array, deterministic: bool
) -> jax.Array:
  x = RMSNorm(config.layer_norm_epsilon, config.dtype, name='final_layer_norm')(
      x
  )
  return nn.Dropout(config.dropout_rate)(x, deterministic)


def _apply_layers(
    config: T5Config,
    layer: type[nn.Module],
    num_layers: int,
    x: jax.Array,
    inputs: tuple[Any, ...],
) -> jax.Array:
  """Applies the layers in turn; all take the same `inputs` after `x`.

  Called within a compact module, whose parameters the layers become:
  `layers` with a leading axis when scanned, else `layers_0`, `layers_1`, ...
  The last of the inputs is the flag `deterministic`.
  """
  if config.remat_policy != 'none':
    layer = nn.remat(
        layer,
        policy=REMAT_POLICIES[config.remat_policy],
        # Within a scan nothing can be merged with the forward pass anyway.
        prevent_cse=not config.scan_layers,
        static_argnums=(len(inputs) + 1,),
    )
  if config.scan_layers:
    scanned = nn.scan(
        layer,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(nn.broadcast,) * len(inputs),
        length=num_layers,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    x, _ = scanned(config, name='layers')(x, *inputs)
    return x
  for i in range(num_layers):
    x, _ = layer(config, name=f'layers_{i}')(x, *inputs)
  return x


class T5(nn.Module):
  """Encoder and decoder over one table of embeddings."""

  config: T5Config

  def setup(self):
    config = self.config
    self.token_embedder = Embed(config.vocab_size, config.emb_dim, config.dtype)
    self.encoder = Encoder(config)
    self.decoder = Decoder(config)

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
    positions = _positions(encoder_input_tokens, encoder_positions)
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
    """
    positions = _positions(decoder_input_tokens, decoder_positions)
    # Causality is by index, not by position: packed examples start anew.
    index = jnp.arange(decoder_input_tokens.shape[1])[None]
    mask = masks.causal_mask(index, index)
    if decoder_segment_ids is not None:
      mask = masks.combine_masks(
          mask, masks.segment_mask(decoder_segment_ids, decoder_segment_ids)
      )
    cross_mask = self._key_mask(
        encoder_input_tokens, decoder_segment_ids, encoder_segment_ids
    )
    x = self._embed(decoder_input_tokens)
    return self.decoder(
        x, positions, encoded, mask, cross_mask, deterministic
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
        self.token_embedder.embedding,
        self.config.emb_dim**-0.5,
        self.config.vocab_size,
    )

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


def _positions(
    tokens: Tokens, positions: Positions | None
) -> Int[Array, '#batch length']:
  return jnp.arange(tokens.shape[1])[None] if positions is None else positions
