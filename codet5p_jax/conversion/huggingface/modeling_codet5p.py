# SPDX-License-Identifier: Apache-2.0
"""CodeT5+ 2B, 6B and 16B: a shallow encoder before a deep decoder.

Both stacks are CodeGen's (Nijkamp et al. 2023): rotary positions, one layer
norm a block, attention and feed-forward layer in parallel. The encoder attends
in both directions. The decoder's last block has cross-attention as a third
parallel branch (Wang et al. 2023, section 4.2), to the encoder's states after a
projection to the decoder's width.

Where rounding differs from the code these models were released with: attention
logits are divided by the square root of the head's size in float32, whatever
the dtype of the weights. That code rounds it to float16 with them, which is the
same number for heads of 64 and 256, but 8.9453125 instead of 8.9442719 for the
heads of 80 of the 2B decoder. Compare in float32.

Carried by the folders that codet5p_jax exports, for PyTorch and transformers 5
(4.57 will do): `AutoModelForSeq2SeqLM.from_pretrained(folder,
trust_remote_code=True)`.
"""

import math

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from .configuration_codet5p import CodeT5pConfig

# CodeGen's fused projections are cut in four: each holds a fourth of the heads
# of every part.
CHUNKS = 4
IGNORED_LABEL = -100
NO_START = (
    'Expected decoder_input_ids or a decoder_start_token_id, found neither; the'
    ' released models were tuned with 50256.'
)


def lower_triangle(size):
  """A causal mask as checkpoints hold it: uint8 [1, 1, size, size]."""
  return torch.ones(size, size, dtype=torch.uint8).tril()[None, None]


def rotate(states, positions, rotary_dim):
  """Turns neighbouring pairs of numbers by angles that grow with the position.

  Args:
    states: [batch, heads, length, head_dim].
    positions: [length], in tokens from the beginning.
    rotary_dim: how many numbers of each head are turned; even.

  Returns:
    The states in float32, the shape of `states`.
  """
  pairs = torch.arange(0, rotary_dim, 2, device=states.device)
  frequencies = 1.0 / 10000 ** (pairs.float() / rotary_dim)
  angles = positions.float()[:, None] * frequencies
  sine, cosine = angles.sin(), angles.cos()
  states = states.float()
  even, odd = states[..., :rotary_dim:2], states[..., 1:rotary_dim:2]
  turned = torch.stack(
      [even * cosine - odd * sine, odd * cosine + even * sine], dim=-1
  )
  return torch.cat([turned.flatten(-2), states[..., rotary_dim:]], dim=-1)


def padding_mask(mask, dtype):
  """What a padding mask, 1 for tokens, adds to logits: [batch, 1, 1, keys]."""
  hidden = (1 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
  return hidden.float()


def causal_mask(query_positions, key_positions):
  """What hides later keys, added to logits: float32 [queries, keys]."""
  later = key_positions > query_positions[:, None]
  return later.float() * torch.finfo(torch.float32).min


class Attention(nn.Module):
  """What self-attention and cross-attention share.

  Attributes:
    layer_index: the block's number, by which caches find its keys and values.
  """

  def __init__(self, config, layer_index, parts):
    super().__init__()
    size, heads = config.n_embd, config.n_head
    if heads % CHUNKS or size % heads:
      raise ValueError(
          f'Expected a number of heads that is a multiple of {CHUNKS} and'
          f' divides the width, found n_head={heads} and n_embd={size}.'
      )
    self.layer_index = layer_index
    self.heads = heads
    self.head_dim = size // heads
    self.rotary_dim = config.rotary_dim
    self.qkv_proj = nn.Linear(size, parts * size, bias=False)
    self.out_proj = nn.Linear(size, size, bias=False)
    self.dropout = nn.Dropout(config.attn_pdrop)
    self.output_dropout = nn.Dropout(config.resid_pdrop)
    # Checkpoints hold it; the mask that is used follows from the positions.
    self.register_buffer('causal_mask', lower_triangle(config.n_positions))

  def split(self, fused, parts):
    """Splits what the fused projection gives.

    Args:
      fused: [batch, length, parts * width], ordered by chunk, part, head within
        the chunk, and number within the head.
      parts: how many projections were fused.

    Returns:
      A list of `parts` arrays [batch, heads, length, head_dim].
    """
    batch, length, _ = fused.shape
    shape = (batch, length, CHUNKS, parts, self.heads // CHUNKS, self.head_dim)
    by_part = fused.view(shape).permute(3, 0, 2, 4, 1, 5)
    return list(by_part.flatten(2, 3))

  def attend(self, query, key, value, query_positions, mask):
    """Rotates, attends and projects; returns [batch, queries, width].

    Args:
      query: [batch, heads, queries, head_dim], before rotation.
      key: [batch, heads, keys, head_dim], before rotation; key i is at
        position i.
      value: [batch, heads, keys, head_dim].
      query_positions: [queries].
      mask: float32, added to the logits [batch, heads, queries, keys]; None
        hides no key.
    """
    key_positions = torch.arange(key.shape[2], device=key.device)
    query = rotate(query, query_positions, self.rotary_dim)
    key = rotate(key, key_positions, self.rotary_dim)
    logits = query @ key.transpose(-1, -2) / math.sqrt(self.head_dim)
    if mask is not None:
      logits = logits + mask
    weights = self.dropout(logits.softmax(-1).to(value.dtype))
    merged = (weights @ value).transpose(1, 2).flatten(2)
    return self.output_dropout(self.out_proj(merged))


class SelfAttention(Attention):
  """Attention to the stack's own states."""

  def __init__(self, config, layer_index):
    super().__init__(config, layer_index, parts=3)

  def forward(self, hidden, positions, mask, cache):
    query, value, key = self.split(self.qkv_proj(hidden), parts=3)
    if cache is not None:
      # Kept before rotation and in the weights' dtype: so what was cached gives
      # the very numbers that computing it anew would, in float16 too.
      key, value = cache.self_attention_cache.update(
          key, value, self.layer_index
      )
    return self.attend(query, key, value, positions, mask)


class CrossAttention(Attention):
  """Attention to the encoder's states, with rotary positions on both sides."""

  def __init__(self, config, layer_index):
    super().__init__(config, layer_index, parts=2)
    self.q_attn = nn.Linear(config.n_embd, config.n_embd, bias=False)

  def forward(self, hidden, positions, encoded, mask, cache):
    query = self.q_attn(hidden).unflatten(-1, (self.heads, self.head_dim))
    if encoded is None:
      cached = cache.cross_attention_cache.layers[self.layer_index]
      key, value = cached.keys, cached.values
    else:
      value, key = self.split(self.qkv_proj(encoded), parts=2)
      if cache is not None:
        cache.cross_attention_cache.update(key, value, self.layer_index)
        cache.is_updated[self.layer_index] = True
    return self.attend(query.transpose(1, 2), key, value, positions, mask)


class CodeT5pMLP(nn.Module):
  """The feed-forward layer."""

  def __init__(self, config):
    super().__init__()
    inner = config.n_inner or 4 * config.n_embd
    self.fc_in = nn.Linear(config.n_embd, inner)
    self.fc_out = nn.Linear(inner, config.n_embd)
    self.activation = ACT2FN[config.activation_function]
    self.dropout = nn.Dropout(config.resid_pdrop)

  def forward(self, hidden):
    return self.dropout(self.fc_out(self.activation(self.fc_in(hidden))))


class CodeT5pBlock(nn.Module):
  """Two or three branches, all from the same normalised states."""

  def __init__(self, config, layer_index, has_cross_attention):
    super().__init__()
    self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
    self.attn = SelfAttention(config, layer_index)
    self.mlp = CodeT5pMLP(config)
    self.crossattention = (
        CrossAttention(config, layer_index) if has_cross_attention else None
    )

  def forward(self, hidden, positions, mask, encoded, encoder_mask, cache):
    normed = self.ln_1(hidden)
    hidden = (
        hidden + self.attn(normed, positions, mask, cache) + self.mlp(normed)
    )
    if self.crossattention is not None:
      hidden = hidden + self.crossattention(
          normed, positions, encoded, encoder_mask, cache
      )
    return hidden


class CodeT5pStack(nn.Module):
  """Token embeddings, blocks and the final norm: the encoder, or the trunk.

  A decoder is causal, and its last block has cross-attention.
  """

  main_input_name = 'input_ids'  # Which `generate` asks an encoder for.

  def __init__(self, config, is_decoder):
    super().__init__()
    self.is_decoder = is_decoder
    self.wte = nn.Embedding(config.vocab_size, config.n_embd)
    self.dropout = nn.Dropout(config.embd_pdrop)
    last = config.n_layer - 1
    self.h = nn.ModuleList([
        CodeT5pBlock(config, index, is_decoder and index == last)
        for index in range(config.n_layer)
    ])
    self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

  def forward(
      self,
      input_ids,
      attention_mask=None,
      encoded=None,
      encoder_mask=None,
      past_key_values=None,
      output_hidden_states=None,
      output_attentions=None,
      return_dict=None,
  ):
    """Returns a BaseModelOutput of states after the final norm.

    Args:
      input_ids: [batch, length]; with a cache, those after the cached ones.
      attention_mask: [batch, cached and new length], 0 for padding.
      encoded: [batch, source length, width], the encoder's states projected;
        None in the encoder, and where the cache has their keys and values.
      encoder_mask: [batch, source length], 0 for padding.
      past_key_values: an EncoderDecoderCache, or None.
      output_hidden_states: whether to keep the states before each block.
      output_attentions: has no effect, as return_dict; `generate` gives both.
    """
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    keys = torch.arange(past + input_ids.shape[1], device=input_ids.device)
    positions = keys[past:]
    mask = causal_mask(positions, keys) if self.is_decoder else None
    dtype = self.wte.weight.dtype
    if attention_mask is not None:
      padding = padding_mask(attention_mask, dtype)
      mask = padding if mask is None else mask + padding
    if encoder_mask is not None:
      encoder_mask = padding_mask(encoder_mask, dtype)

    hidden = self.dropout(self.wte(input_ids))
    kept = ()
    for block in self.h:
      if output_hidden_states:
        kept += (hidden,)
      hidden = block(
          hidden, positions, mask, encoded, encoder_mask, past_key_values
      )
    hidden = self.ln_f(hidden)
    return BaseModelOutput(
        last_hidden_state=hidden,
        hidden_states=(*kept, hidden) if output_hidden_states else None,
    )


class CodeT5pDecoder(nn.Module):
  """The decoder with its head."""

  def __init__(self, config):
    super().__init__()
    self.transformer = CodeT5pStack(config, is_decoder=True)
    self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

  def forward(self, *args, logits_to_keep):
    """Returns float32 logits and the stack's output; takes its arguments."""
    output = self.transformer(*args)
    hidden = output.last_hidden_state[:, -logits_to_keep:]
    return self.lm_head(hidden).float(), output


class CodeT5pEncoderDecoderModel(PreTrainedModel, GenerationMixin):
  """The model as it was released, with its language modelling head."""

  config_class = CodeT5pConfig
  base_model_prefix = 'encoder_decoder'
  main_input_name = 'input_ids'
  _no_split_modules = ['CodeT5pBlock']
  _skip_keys_device_placement = ['past_key_values']
  _keys_to_ignore_on_load_missing = [r'\.causal_mask$']

  def __init__(self, config):
    super().__init__(config)
    self.encoder = CodeT5pStack(config.encoder, is_decoder=False)
    self.decoder = CodeT5pDecoder(config.decoder)
    self.enc_to_dec_proj = nn.Linear(
        config.encoder.n_embd, config.decoder.n_embd
    )
    self.post_init()

  def _init_weights(self, module):
    super()._init_weights(module)
    if isinstance(module, Attention):  # The checkpoint held no masks.
      mask = module.causal_mask
      mask.copy_(lower_triangle(mask.shape[-1]))

  def get_encoder(self):
    return self.encoder

  def get_input_embeddings(self):
    return self.encoder.wte

  def forward(
      self,
      input_ids=None,
      attention_mask=None,
      decoder_input_ids=None,
      decoder_attention_mask=None,
      encoder_outputs=None,
      past_key_values=None,
      labels=None,
      use_cache=None,
      output_hidden_states=None,
      output_attentions=None,
      return_dict=None,
      logits_to_keep=0,
  ):
    """Runs the model; ids and masks are [batch, length], padded on the right.

    Args:
      input_ids: the encoder's tokens. Not needed with `encoder_outputs`.
      attention_mask: 1 for tokens of the encoder, 0 for padding.
      decoder_input_ids: the decoder's tokens; with `past_key_values`, those
        that follow the cached ones.
      decoder_attention_mask: 1 for tokens, 0 for padding, of the cached tokens
        too. It moves no positions.
      encoder_outputs: what the encoder returned before.
      past_key_values: an EncoderDecoderCache, written in place.
      labels: [batch, target length]: position t holds the token to predict at
        position t of the decoder; they are not shifted. -100 has no loss.
      use_cache: whether to begin a cache where none is given.
      output_hidden_states: whether to return the states before each block.
      output_attentions: not supported.
      return_dict: False for a tuple.
      logits_to_keep: of how many last positions logits are returned; 0 for all.

    Returns:
      A Seq2SeqLMOutput; its logits are float32.
    """
    if output_attentions:
      raise ValueError('CodeT5+ keeps no attention weights to return.')
    if encoder_outputs is None:
      encoder_outputs = self.encoder(
          input_ids, attention_mask, output_hidden_states=output_hidden_states
      )
    elif not isinstance(encoder_outputs, BaseModelOutput):
      encoder_outputs = BaseModelOutput(*encoder_outputs)
    if decoder_input_ids is None:
      if labels is None:
        raise ValueError('Expected decoder_input_ids or labels, found neither.')
      decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
    cache = past_key_values
    if cache is None and use_cache:
      cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    encoded = None
    last_layer = self.config.decoder.n_layer - 1
    if cache is None or not cache.is_updated.get(last_layer):
      encoded = self.enc_to_dec_proj(encoder_outputs[0])
    logits, decoded = self.decoder(
        decoder_input_ids,
        decoder_attention_mask,
        encoded,
        attention_mask,
        cache,
        output_hidden_states,
        logits_to_keep=logits_to_keep,
    )
    loss = None
    if labels is not None:
      loss = nn.functional.cross_entropy(
          logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL
      )
    output = Seq2SeqLMOutput(
        loss=loss,
        logits=logits,
        past_key_values=cache,
        decoder_hidden_states=decoded.hidden_states,
        encoder_last_hidden_state=encoder_outputs[0],
        encoder_hidden_states=encoder_outputs.hidden_states,
    )
    return output.to_tuple() if return_dict is False else output

  def prepare_decoder_input_ids_from_labels(self, labels):
    """Shifts labels to the right, for targets without a prompt.

    Ignored labels become padding: where they hide a prompt, give the decoder's
    ids instead.

    Raises:
      ValueError: the configuration names no token to start with. That of the
        released 16B models does not.
    """
    start = self._find_id('decoder_start_token_id')
    if start is None:
      raise ValueError(f'{NO_START} Give decoder_input_ids beside labels.')
    pad = self._find_id('pad_token_id')
    if pad is None:
      pad = self._find_id('eos_token_id')
    shifted = labels.new_full(labels.shape, start)
    shifted[:, 1:] = labels[:, :-1].masked_fill(
        labels[:, :-1] == IGNORED_LABEL, pad
    )
    return shifted

  def prepare_inputs_for_generation(self, *args, **kwargs):
    inputs = super().prepare_inputs_for_generation(*args, **kwargs)
    # transformers 4 gives it; the cache knows.
    inputs.pop('cache_position', None)
    return inputs

  def _find_id(self, name):
    """The id of a special token by config.json, or None."""
    found = getattr(self.config, name, None)
    return getattr(self.config.decoder, name) if found is None else found

  def _prepare_decoder_input_ids_for_generation(self, model_kwargs, **kwargs):
    """Uses a given prompt as it is, without a start token before it.

    That is how the released results were made; transformers 5 would add one.

    Raises:
      ValueError: there is neither a prompt nor a token to start with.
    """
    prompt = model_kwargs.pop('decoder_input_ids', None)
    if prompt is not None:
      return prompt, model_kwargs
    # transformers takes bos where it knows no start; CodeGen's is no start.
    start = kwargs['decoder_start_token_id']
    bos = self._find_id('bos_token_id')
    known = self.generation_config.decoder_start_token_id is not None
    if not known and bos is not None and (start == bos).all():
      raise ValueError(f'{NO_START} Give generate one of them.')
    return super()._prepare_decoder_input_ids_for_generation(
        model_kwargs=model_kwargs, **kwargs
    )
