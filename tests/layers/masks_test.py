import jax.numpy as jnp
import numpy as np

from codet5p_jax.layers import masks

QUERY_SEGMENTS = jnp.array([[1, 1, 2, 0], [1, 2, 3, 3]])
KEY_SEGMENTS = jnp.array([[1, 2, 2, 2, 0], [1, 1, 3, 0, 0]])


def test_padding_is_no_key_for_any_query():
  is_token = jnp.array([[True, True, False], [True, False, False]])
  mask = masks.padding_mask(is_token)
  assert mask.shape == (2, 1, 1, 3)
  np.testing.assert_array_equal(mask[:, 0, 0], is_token)


def test_a_query_attends_to_its_own_position_and_before():
  mask = masks.causal_mask(jnp.array([[0, 1, 5]]), jnp.array([[0, 1, 2, 6]]))
  np.testing.assert_array_equal(
      mask, [[[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]]]
  )


def test_a_query_attends_to_its_own_segment_and_never_to_padding():
  mask = masks.segment_mask(QUERY_SEGMENTS, KEY_SEGMENTS)
  assert mask.shape == (2, 1, 4, 5)
  for batch, query, key in np.ndindex(2, 4, 5):
    segment = KEY_SEGMENTS[batch, key]
    expected = segment != 0 and segment == QUERY_SEGMENTS[batch, query]
    assert mask[batch, 0, query, key] == expected


def test_combined_masks_are_their_conjunction_and_none_masks_nothing():
  causal = masks.causal_mask(jnp.arange(4)[None], jnp.arange(5)[None])
  segments = masks.segment_mask(QUERY_SEGMENTS, KEY_SEGMENTS)
  np.testing.assert_array_equal(
      masks.combine_masks(None, causal, None, segments),
      np.asarray(causal) & np.asarray(segments),
  )
  assert masks.combine_masks(None, causal) is causal
  assert masks.combine_masks() is masks.combine_masks(None, None) is None


def test_only_the_padding_at_the_end_of_a_row_is_padding():
  tokens = jnp.array([
      [9, 9, 9, 9],
      [9, 0, 9, 0],  # The first 0 is a token of the text.
      [0, 0, 9, 9],
      [9, 0, 0, 0],
      [0, 0, 0, 0],
  ])
  expected = [
      [1, 1, 1, 1],
      [1, 1, 1, 0],
      [1, 1, 1, 1],
      [1, 0, 0, 0],
      [0, 0, 0, 0],
  ]
  np.testing.assert_array_equal(masks.is_before_padding(tokens, 0), expected)


def test_decoders_see_what_stands_before_in_their_own_segment():
  causal = np.tril(np.ones((4, 4)))
  np.testing.assert_array_equal(masks.decoder_mask(4, None), [[causal]])
  mask = masks.decoder_mask(4, QUERY_SEGMENTS)
  for row in range(2):
    segments = np.asarray(QUERY_SEGMENTS[row])
    same = (segments[:, None] == segments) & (segments > 0)
    np.testing.assert_array_equal(mask[row, 0], causal * same)
