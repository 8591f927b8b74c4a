"""Attention masks: boolean, True where a query may attend to a key."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from codet5p_jax.array_typing import AttentionMask


def padding_mask(
    key_is_token: Bool[Array, 'batch kv_length'],
) -> AttentionMask:
  """Every query may attend to every key that is not padding."""
  return key_is_token[:, None, None, :]


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


def combine_masks(*masks: AttentionMask | None) -> AttentionMask | None:
  """The conjunction of those masks that are given."""
  given = [mask for mask in masks if mask is not None]
  if not given:
    return None
  result = given[0]
  for mask in given[1:]:
    result = jnp.logical_and(result, mask)
  return result
