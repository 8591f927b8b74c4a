"""The composite of CodeT5+ 2B, 6B and 16B: two CodeGen stacks and a bridge.

A shallow encoder that sees in both directions, and a deep decoder of which the
last layer alone looks at the encoder (paper, section 3.3; section 4 of the
released system's specification). The structure is the freezing rule:

  encoder/*                              trained
  encoder_to_decoder/*                   trained
  decoder/layers/*                       the trunk: plain CodeGen layers
  decoder/last_layer/*                   one more of them, and beside it
  decoder/last_layer/cross_attention/*   trained
  decoder/{token_embedder,final_layer_norm,output_head}/*

Nothing of the trunk depends on a trained weight. So it runs once, forward,
saves nothing, and has no backward pass; it is never computed again.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float, Int

from codet5p_jax.array_typing import (
    Activations,
    AttentionMask,
    CrossMask,
    Positions,
    SegmentIds,
    Tokens,
)
from codet5p_jax.errors import UserError
from codet5p_jax.layers import masks
from codet5p_jax.layers.cache import CacheView
from codet5p_jax.layers.dense import Dense
from codet5p_jax.layers.embedding import UntiedOutputHead
from codet5p_jax.layers.positions import positions_or_index
from codet5p_jax.models.codegen import (
    INIT_STDDEV,
    CodeGenConfig,
    HeadedModel,
    Layer,
    Stack,
    SubLayers,
)
from codet5p_jax.models.computation import Computation, apply_layers
from codet5p_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class ShallowEncoderDeepDecoderConfig:
  """Sizes of the two stacks; special tokens are those given here.

  Attributes:
    encoder: sizes of the encoder, which takes the special tokens from here.
    decoder: likewise; its last layer has cross-attention too.
    pad_id: the padding token, which is also the end of a text.
    eos_id: ends sources and targets.
    decoder_start_id: the first decoder input.
    indent_with_tabs: whether the weights know indentation by tabs: released
      ones were evaluated on prompts whose four spaces were made tabs (spec
      T16).
    vocabulary_kinds: kinds of `Vocabulary` that it can be used with.
    prompt_to_decoder: whether the decoder gets the prompt too, before what it
      is to write.
    max_length: tokens that each stack was made for.

  Raises:
    UserError: the stacks have other vocabularies, or the decoder no trunk.
  """

  encoder: CodeGenConfig
  decoder: CodeGenConfig
  pad_id: int = 50256
  eos_id: int = 50256
  decoder_start_id: int = 50256
  indent_with_tabs: bool = False

  vocabulary_kinds: ClassVar[tuple[str, ...]] = ('codegen', 'sentencepiece')
  prompt_to_decoder: ClassVar[bool] = True
  max_length: ClassVar[int] = CodeGenConfig.max_length

  def __post_init__(self):
    if self.encoder.vocab_size != self.decoder.vocab_size:
      raise UserError(
          f'expected encoder and decoder to have one vocab_size, found '
          f'{self.encoder.vocab_size} and {self.decoder.vocab_size}; give the '
          f'same'
      )
    if self.decoder.num_layers < 2:
      raise UserError(
          f'expected a decoder of 2 layers or more, the last of which has '
          f'cross-attention, found {self.decoder.num_layers}; give more '
          f'num_layers'
      )
    # Special tokens are given once; a stack of other ones would mislead.
    tokens = {
        name: getattr(self, name)
        for name in ('pad_id', 'eos_id', 'decoder_start_id')
    }
    for name in ('encoder', 'decoder'):
      stack = dataclasses.replace(getattr(self, name), **tokens)
      object.__setattr__(self, name, stack)

  @property
  def vocab_size(self) -> int:
    return self.decoder.vocab_size

  def make_model(
      self, computation: Computation = Computation()
  ) -> 'ShallowEncoderDeepDecoder':
    return ShallowEncoderDeepDecoder(self, computation)

  def head_counts(self) -> dict[str, int]:
    """Attention heads of each stack; a mesh's model axis must divide them."""
    return {
        'encoder': self.encoder.num_heads,
        'decoder': self.decoder.num_heads,
    }


class LastLayer(nn.Module):
  """Self-attention, feed-forward and cross-attention, all from one norm."""

  config: CodeGenConfig
  computation: Computation

  @nn.compact
  def __call__(
      self,
      x: Float[Array, 'batch q_length embed'],
      encoded: Float[Array, 'batch kv_length embed'] | None,
      positions: Int[Array, '#batch q_length'],
      encoder_positions: Int[Array, '#batch kv_length'] | None,
      mask: AttentionMask,
      cross_mask: CrossMask,
      deterministic: bool,
      cache_slot: Int[Array, ''] | None = None,
  ) -> Float[Array, 'batch q_length embed']:
    sub_layer = SubLayers(self.config, self.computation, deterministic)
    y = sub_layer.norm('layer_norm')(x)
    attended = sub_layer.attention('self_attention')(
        y, y, None, mask, deterministic, positions, positions, cache_slot
    )
    crossed = sub_layer.attention('cross_attention')(
        y, encoded, None, cross_mask, deterministic, positions,
        encoder_positions,
    )  # fmt: skip
    x = x + sub_layer.dropout(attended) + sub_layer.dropout(sub_layer.mlp()(y))
    x = x + sub_layer.dropout(crossed)
    return constrain(x, 'batch', 'act_length', 'act_embed')


class Decoder(nn.Module):
  """Embedding, trunk, last layer, final norm and output head."""

  config: CodeGenConfig
  computation: Computation

  def setup(self):
    self.output_head = UntiedOutputHead(
        self.config.vocab_size, self.config.emb_dim, INIT_STDDEV
    )

  @nn.compact
  def __call__(
      self,
      tokens: Int[Array, 'batch q_length'],
      encoded: Float[Array, 'batch kv_length embed'] | None,
      positions: Int[Array, '#batch q_length'],
      encoder_positions: Int[Array, '#batch kv_length'] | None,
      mask: AttentionMask,
      cross_mask: CrossMask,
      deterministic: bool,
      cache_slot: Int[Array, ''] | None = None,
  ) -> Float[Array, 'batch q_length embed']:
    config, computation = self.config, self.computation
    sub_layer = SubLayers(config, computation, deterministic)
    x = apply_layers(
        config,
        # Computed again in a backward pass, it would cost what it never does.
        dataclasses.replace(computation, remat_policy='none'),
        Layer,
        config.num_layers - 1,
        sub_layer.embed(tokens),
        (positions, mask, deterministic),
        cache_slot,
    )
    x = LastLayer(config, computation, name='last_layer')(
        x, encoded, positions, encoder_positions, mask, cross_mask,
        deterministic, cache_slot,
    )  # fmt: skip
    return sub_layer.norm('final_layer_norm')(x)


class ShallowEncoderDeepDecoder(HeadedModel):
  """Encoder, bridge and decoder, each with embeddings of its own."""

  config: ShallowEncoderDeepDecoderConfig
  computation: Computation

  def setup(self):
    config, computation = self.config, self.computation
    self.encoder = Stack(config.encoder, computation)
    self.encoder_to_decoder = Dense(
        (config.decoder.emb_dim,),
        ('embed', 'decoder_embed'),
        INIT_STDDEV,
        bias_axes=('decoder_embed',),
        dtype=computation.dtype,
    )
    self.decoder = Decoder(config.decoder, computation)

  def encode(
      self,
      encoder_input_tokens: Tokens,
      encoder_segment_ids: SegmentIds | None = None,
      encoder_positions: Positions | None = None,
      deterministic: bool = True,
  ) -> Activations:
    """Returns the encoder's states, bridged to the decoder's width.

    Padding is what stands at the end of a row: `pad_id` within it is a token.
    In packed rows, `encoder_segment_ids` keep the packed examples apart (0 for
    padding), and positions must start anew with each.
    """
    x = self.encoder(
        encoder_input_tokens,
        positions_or_index(encoder_input_tokens, encoder_positions),
        self._key_mask(
            encoder_input_tokens, encoder_segment_ids, encoder_segment_ids
        ),
        deterministic,
    )
    x = self.encoder_to_decoder(x)
    return constrain(x, 'batch', 'act_length', 'act_embed')

  def decode(
      self,
      encoded: Float[Array, 'batch kv_length embed'],
      encoder_input_tokens: Int[Array, 'batch kv_length'],
      decoder_input_tokens: Int[Array, 'batch q_length'],
      encoder_segment_ids: Int[Array, 'batch kv_length'] | None = None,
      decoder_segment_ids: Int[Array, 'batch q_length'] | None = None,
      decoder_positions: Int[Array, 'batch q_length'] | None = None,
      deterministic: bool = True,
      encoder_positions: Int[Array, 'batch kv_length'] | None = None,
  ) -> Float[Array, 'batch q_length embed']:
    """Returns the decoder's last states [batch, q_length, embed].

    Cross-attention is rotary too, each side by its own positions: in packed
    rows both must start anew with each example. Padding among the decoder's
    inputs is not masked: it stands at the end, where causality hides it.
    """
    return self.decoder(
        decoder_input_tokens,
        encoded,
        positions_or_index(decoder_input_tokens, decoder_positions),
        positions_or_index(encoder_input_tokens, encoder_positions),
        masks.decoder_mask(decoder_input_tokens.shape[1], decoder_segment_ids),
        self._key_mask(
            encoder_input_tokens, decoder_segment_ids, encoder_segment_ids
        ),
        deterministic,
    )

  def decode_step(
      self,
      encoder_input_tokens: Int[Array, 'sources kv_length'],
      decoder_input_tokens: Int[Array, 'batch 1'],
      view: CacheView,
  ) -> Float[Array, 'batch 1 embed']:
    """Returns the states of one new token a row; see `T5.decode_step`."""
    return self.decoder(
        decoder_input_tokens,
        None,
        view.positions,
        None,
        masks.padding_mask(view.is_seen),
        self._key_mask(encoder_input_tokens, None, None),
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
        encoder_positions,
    )

  def _key_mask(
      self,
      key_tokens: Int[Array, 'batch kv_length'],
      query_segment_ids: Int[Array, 'batch q_length'] | None,
      key_segment_ids: Int[Array, 'batch kv_length'] | None,
  ) -> AttentionMask:
    if query_segment_ids is None or key_segment_ids is None:
      return masks.padding_mask(
          masks.is_before_padding(key_tokens, self.config.pad_id)
      )
    return masks.segment_mask(query_segment_ids, key_segment_ids)
