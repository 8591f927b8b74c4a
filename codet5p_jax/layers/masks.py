"""Attention masks: boolean, True where a query may attend to a key."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from codet5p_jax.array_typing import AttentionMask, Tokens


def padding_mask(
    key_is_token: Bool[Array, 'batch kv_length'],
) -> AttentionMask:
  """Every query may attend to every key that is not padding."""
  return key_is_token[:, None, None, :]


def is_before_padding(
    tokens: Tokens, pad_id: int
) -> Bool[Array, 'batch length']:
  """True up to the last token that is not padding.

  Where the padding token is also a token of texts, as <|endoftext|> is in
  CodeGen's vocabulary, only those at the end of a row are padding.

  >>> is_before_padding(jnp.array([[7, 0, 8, 0, 0]]), pad_id=0).tolist()
  [[True, True, True, False, False]]
  """
  index = jnp.arange(tokens.shape[1])
  last = jnp.max(jnp.where(tokens != pad_id, index, -1), axis=1)
  return index <= last[:, None]


def causal_mask(
    query_positions: Int[Array, '#batch q_length'],
    key_positions: Int[Array, '#batch kv_length'],
) -> Bool[Array, '#batch 1 q_length kv_length']:
  """A query attends to keys at its own position or before."""
  return (query_positions[:, :, None] >= key_positions[:, None, :])[:, None]


def segment_mask(
    query_segment_ids: Int[Array, 'batch q_length'],
    key_segment_ids: Int[Array, 'batch kv_length'],
) -> Bool[Array, 'batch 1 q_length kv_length']:
  """A query attends to keys of its own segment; segment 0 is padding."""
  same = query_segment_ids[:, :, None] == key_segment_ids[:, None, :]
  return (same & (key_segment_ids[:, None, :] > 0))[:, None]


def decoder_mask(
    length: int, segment_ids: Int[Array, 'batch length'] | None
) -> AttentionMask:
  """A query attends to keys of its own segment at its index or before.

  By index, not by position: packed examples start anew.

  Args:
    length: of the rows.
    segment_ids: of packed examples, 0 for padding; None for one example a row.
  """
  index = jnp.arange(length)[None]
  mask = causal_mask(index, index)
  if segment_ids is None:
    return mask
  return combine_masks(mask, segment_mask(segment_ids, segment_ids))


def combine_masks(*masks: AttentionMask | None) -> AttentionMask | None:
  """The conjunction of those masks that are given."""
  given = [mask for mask in masks if mask is not None]
  if not given:
    return None
  result = given[0]
  for mask in given[1:]:
    result = jnp.logical_and(result, mask)
  return result
