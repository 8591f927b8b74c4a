"""The released models in NumPy, from their own names and layouts.

Written from spec sections 3 and 4 alone, and knows nothing of our networks: a
mistake in a table cannot be made twice. Slow and plain on purpose. Conversion
compares one module after another with it; it is tested against transformers.

`Read` gives a tensor by its name within a module. All is computed in the dtype
that it gives, float32 in conversion.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Read = Callable[[str], np.ndarray]

_LOWEST = np.finfo(np.float32).min


def inside(read: Read, module: str) -> Read:
  """Returns what reads the tensors of a module."""
  return lambda name: read(f'{module}.{name}')


# Section 3: T5.


def t5_norm(read: Read, x: np.ndarray, epsilon: float) -> np.ndarray:
  """Divides by the root mean square (3.2)."""
  mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
  return read('weight') * (x / np.sqrt(mean_square + epsilon))


def t5_position_bias(
    table: np.ndarray,
    length: int,
    bidirectional: bool,
    max_distance: int,
) -> np.ndarray:
  """Returns the bias of a stack's self-attention (3.5, 3.6).

  Args:
    table: [buckets, heads].
    length: of queries and keys.
    bidirectional: True in the encoder.
    max_distance: from here on, all share the last bucket.

  Returns:
    [1, heads, length, length].
  """
  position = np.arange(length)
  relative = position[None, :] - position[:, None]
  buckets = len(table)
  offset = np.zeros_like(relative)
  if bidirectional:
    buckets //= 2
    offset = np.where(relative > 0, buckets, 0)
    distance = np.abs(relative)
  else:
    distance = np.maximum(-relative, 0)
  exact = buckets // 2
  # In float32, as the spec asks: the borders depend on it.
  ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
  scaled = np.log(ratio) / np.float32(np.log(max_distance / exact))
  far = exact + (scaled * np.float32(buckets - exact)).astype(np.int64)
  bucket = np.where(distance < exact, distance, np.minimum(far, buckets - 1))
  return table[offset + bucket].transpose(2, 0, 1)[None]


def t5_attention(
    read: Read,
    x: np.ndarray,
    keys_and_values: np.ndarray,
    num_heads: int,
    bias: np.ndarray,
) -> np.ndarray:
  """Attention without scaling (3.4).

  Args:
    read: of the attention.
    x: queries, [batch, q_length, embed].
    keys_and_values: [batch, kv_length, embed].
    num_heads: of the attention.
    bias: added to the logits; position bias and mask.
  """
  query = _split_heads(x @ read('q.weight').T, num_heads)
  key = _split_heads(keys_and_values @ read('k.weight').T, num_heads)
  value = _split_heads(keys_and_values @ read('v.weight').T, num_heads)
  weights = _softmax(query @ key.swapaxes(-1, -2) + bias)
  return _merge_heads(weights @ value) @ read('o.weight').T


def t5_block(
    read: Read,
    config: Mapping[str, Any],
    x: np.ndarray,
    bias: np.ndarray,
    encoded: np.ndarray | None = None,
    encoded_bias: np.ndarray | float = 0.0,
) -> np.ndarray:
  """One layer of the encoder, or of the decoder if `encoded` is given (3.3).

  Args:
    read: of the block.
    config: config.json.
    x: [batch, length, embed].
    bias: position bias and mask of self-attention.
    encoded: the encoder's states.
    encoded_bias: mask of cross-attention.
  """
  heads, epsilon = config['num_heads'], config['layer_norm_epsilon']
  layer = inside(read, 'layer.0')
  y = t5_norm(inside(layer, 'layer_norm'), x, epsilon)
  x = x + t5_attention(inside(layer, 'SelfAttention'), y, y, heads, bias)
  last = 1
  if encoded is not None:
    last = 2
    layer = inside(read, 'layer.1')
    y = t5_norm(inside(layer, 'layer_norm'), x, epsilon)
    x = x + t5_attention(
        inside(layer, 'EncDecAttention'), y, encoded, heads, encoded_bias
    )
  layer = inside(read, f'layer.{last}')
  y = t5_norm(inside(layer, 'layer_norm'), x, epsilon)
  dense = inside(layer, 'DenseReluDense')
  hidden = np.maximum(y @ dense('wi.weight').T, 0)
  return x + hidden @ dense('wo.weight').T


def t5_logits(
    read: Read, config: Mapping[str, Any], hidden: np.ndarray
) -> np.ndarray:
  """Logits of the decoder's last states (3.7)."""
  scale = hidden.dtype.type(config['d_model'] ** -0.5)
  return (hidden * scale) @ read('shared.weight').T


# Section 4: CodeGen and the composite.


def layer_norm(read: Read, x: np.ndarray, epsilon: float) -> np.ndarray:
  """Mean and variance, scale and bias (4.3)."""
  centred = x - np.mean(x, axis=-1, keepdims=True)
  variance = np.mean(np.square(centred), axis=-1, keepdims=True)
  return centred / np.sqrt(variance + epsilon) * read('weight') + read('bias')


def linear(read: Read, x: np.ndarray) -> np.ndarray:
  """A map with bias."""
  return x @ read('weight').T + read('bias')


def rotate(x: np.ndarray, rotary_dim: int) -> np.ndarray:
  """Rotates the first `rotary_dim` of each head, in pairs of neighbours (4.1).

  Args:
    x: [batch, heads, length, kv]; positions are 0, 1, ... along the length.
    rotary_dim: how many of kv are rotated.
  """
  frequency = 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
  angle = np.arange(x.shape[2])[:, None] * frequency
  sin, cos = np.sin(angle).astype(x.dtype), np.cos(angle).astype(x.dtype)
  result = x.copy()
  even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
  result[..., 0:rotary_dim:2] = even * cos - odd * sin
  result[..., 1:rotary_dim:2] = odd * cos + even * sin
  return result


def codegen_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    rotary_dim: int,
    mask: np.ndarray,
) -> np.ndarray:
  """Rotates, scales, masks, attends and merges heads (4.2, 4.4).

  Args:
    query: [batch, heads, q_length, kv], not rotated.
    key: [batch, heads, kv_length, kv], not rotated.
    value: as key.
    rotary_dim: see `rotate`.
    mask: True where a query may attend.
  """
  query, key = rotate(query, rotary_dim), rotate(key, rotary_dim)
  scale = query.dtype.type(np.sqrt(query.shape[-1]))
  scores = query @ key.swapaxes(-1, -2) / scale
  weights = _softmax(np.where(mask, scores, scores.dtype.type(_LOWEST)))
  return _merge_heads(weights @ value)


def codegen_block(
    read: Read,
    config: Mapping[str, Any],
    x: np.ndarray,
    mask: np.ndarray,
    encoded: np.ndarray | None = None,
    encoded_mask: np.ndarray | None = None,
) -> np.ndarray:
  """One layer: all branches read the same norm (4.3, 4.4).

  Args:
    read: of the block.
    config: config.json, or the part of it for this stack.
    x: [batch, length, embed].
    mask: of self-attention; causal in a decoder, of padding in the encoder.
    encoded: projected states of the encoder, in the composite's last layer.
    encoded_mask: of cross-attention.
  """
  heads, rotary_dim = config['n_head'], config['rotary_dim']
  y = layer_norm(inside(read, 'ln_1'), x, config['layer_norm_epsilon'])

  attention = inside(read, 'attn')
  query, value, key = _unfuse(y @ attention('qkv_proj.weight').T, 3, heads)
  mixed = codegen_attention(query, key, value, rotary_dim, mask)
  result = x + mixed @ attention('out_proj.weight').T

  mlp = inside(read, 'mlp')
  hidden = _gelu_new(linear(inside(mlp, 'fc_in'), y))
  result += linear(inside(mlp, 'fc_out'), hidden)

  if encoded is not None:
    attention = inside(read, 'crossattention')
    query = _split_heads(y @ attention('q_attn.weight').T, heads)
    value, key = _unfuse(encoded @ attention('qkv_proj.weight').T, 2, heads)
    mixed = codegen_attention(query, key, value, rotary_dim, encoded_mask)
    result += mixed @ attention('out_proj.weight').T
  return result


def codegen_logits(
    read: Read, config: Mapping[str, Any], tokens: np.ndarray
) -> np.ndarray:
  """The whole decoder-only model, [batch, length] to [batch, length, vocab]."""
  stack = inside(read, 'transformer')
  x = stack('wte.weight')[tokens]
  for i in range(config['n_layer']):
    x = codegen_block(
        inside(stack, f'h.{i}'), config, x, causal_mask(tokens.shape[1])
    )
  x = layer_norm(inside(stack, 'ln_f'), x, config['layer_norm_epsilon'])
  return linear(inside(read, 'lm_head'), x)


def composite_logits(
    read: Read,
    config: Mapping[str, Any],
    encoder_tokens: np.ndarray,
    encoder_is_token: np.ndarray,
    decoder_tokens: np.ndarray,
) -> np.ndarray:
  """The whole shallow encoder and deep decoder.

  Args:
    read: of the model.
    config: config.json, with one part for each stack.
    encoder_tokens: [batch, kv_length].
    encoder_is_token: [batch, kv_length], False for padding.
    decoder_tokens: [batch, length].

  Returns:
    [batch, length, vocab].
  """
  encoder, decoder = config['encoder'], config['decoder']
  key_mask = encoder_is_token[:, None, None, :]
  stack = inside(read, 'encoder')
  x = stack('wte.weight')[encoder_tokens]
  for i in range(encoder['n_layer']):
    x = codegen_block(inside(stack, f'h.{i}'), encoder, x, key_mask)
  x = layer_norm(inside(stack, 'ln_f'), x, encoder['layer_norm_epsilon'])
  encoded = linear(inside(read, 'enc_to_dec_proj'), x)

  stack = inside(read, 'decoder.transformer')
  x = stack('wte.weight')[decoder_tokens]
  mask = causal_mask(decoder_tokens.shape[1])
  last = decoder['n_layer'] - 1
  for i in range(last):
    x = codegen_block(inside(stack, f'h.{i}'), decoder, x, mask)
  x = codegen_block(
      inside(stack, f'h.{last}'), decoder, x, mask, encoded, key_mask
  )
  x = layer_norm(inside(stack, 'ln_f'), x, decoder['layer_norm_epsilon'])
  return linear(inside(read, 'decoder.lm_head'), x)


def causal_mask(length: int) -> np.ndarray:
  """True where a position may attend, [1, 1, length, length]."""
  return np.tril(np.ones((length, length), bool))[None, None]


def added_to_logits(mask: np.ndarray) -> np.ndarray:
  """Returns a mask as T5 adds it to its logits."""
  return np.where(mask, np.float32(0), _LOWEST)


def _split_heads(x: np.ndarray, num_heads: int) -> np.ndarray:
  """[batch, length, heads * kv] to [batch, heads, length, kv]."""
  batch, length, _ = x.shape
  return x.reshape(batch, length, num_heads, -1).transpose(0, 2, 1, 3)


def _merge_heads(x: np.ndarray) -> np.ndarray:
  """[batch, heads, length, kv] to [batch, length, heads * kv]."""
  batch, heads, length, width = x.shape
  return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * width)


def _unfuse(x: np.ndarray, parts: int, num_heads: int) -> list[np.ndarray]:
  """Cuts a fused projection into its parts, [batch, heads, length, kv] (2.3).

  Row r: chunk r // (parts * ld), part (r mod (parts * ld)) // ld, where ld is
  a fourth of one part's width; the chunk's heads follow those of the one
  before.
  """
  chunks = 4
  local = x.shape[-1] // (parts * chunks)
  return [
      _split_heads(
          np.concatenate(
              [
                  x[..., start : start + local]
                  for chunk in range(chunks)
                  for start in [(chunk * parts + part) * local]
              ],
              axis=-1,
          ),
          num_heads,
      )
      for part in range(parts)
  ]


def _softmax(x: np.ndarray) -> np.ndarray:
  x = np.exp(x - np.max(x, axis=-1, keepdims=True))
  return x / np.sum(x, axis=-1, keepdims=True)


def _gelu_new(x: np.ndarray) -> np.ndarray:
  inner = x.dtype.type(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3)
  return 0.5 * x * (1 + np.tanh(inner))
