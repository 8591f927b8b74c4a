import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from codet5p_jax.conversion.layouts import (
    FROM_HEADS,
    FUSED_HEADS,
    SAME,
    TO_HEADS,
    TRANSPOSED,
)
from codet5p_jax.errors import UserError

SIZES = st.integers(1, 6)
DTYPES = st.sampled_from(['uint16', 'uint32'])


def all_bits(shape, dtype, seed):
  """Any bits at all, as numbers of which none is NaN."""
  numbers = np.random.default_rng(seed)
  return numbers.integers(0, np.iinfo(dtype).max, shape, dtype)


@st.composite
def rows(draw):
  """A layout, and the shapes of leaves that it takes."""
  embed, heads, kv = draw(SIZES), draw(SIZES), draw(SIZES)
  parts = draw(st.integers(1, 4))
  return draw(
      st.sampled_from([
          (SAME, [(embed,)]),
          (SAME, [(embed, kv)]),
          (TRANSPOSED, [(embed, kv)]),
          (TO_HEADS, [(embed, heads, kv)]),
          (FROM_HEADS, [(heads, kv, embed)]),
          (FUSED_HEADS, [(embed, 4 * heads, kv)] * parts),
      ])
  )


@hypothesis.given(rows(), DTYPES, st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=100, deadline=None)
def test_there_and_back_every_bit_is_the_same(row, dtype, seed):
  layout, shapes = row
  tensor = all_bits(layout.their_shape(shapes), dtype, seed)
  leaves = layout.to_ours(tensor, shapes)
  assert [leaf.shape for leaf in leaves] == shapes
  assert sum(leaf.size for leaf in leaves) == tensor.size
  back = layout.to_theirs(leaves)
  np.testing.assert_array_equal(back, tensor)
  for leaf, again in zip(leaves, layout.to_ours(back, shapes), strict=True):
    np.testing.assert_array_equal(leaf, again)


def test_a_linear_map_computes_the_same():
  numbers = np.random.default_rng(0)
  x = numbers.normal(size=(2, 3))
  weight = numbers.normal(size=(5 * 7, 3))
  (kernel,) = TO_HEADS.to_ours(weight, [(3, 5, 7)])
  heads = np.einsum('be,ehk->bhk', x, kernel)
  np.testing.assert_allclose(heads.reshape(2, -1), x @ weight.T)
  weight = numbers.normal(size=(3, 5 * 7))
  (kernel,) = FROM_HEADS.to_ours(weight, [(5, 7, 3)])
  np.testing.assert_allclose(
      np.einsum('bhk,hke->be', heads, kernel), heads.reshape(2, -1) @ weight.T
  )


@pytest.mark.parametrize('parts', [3, 2])
def test_fused_rows_are_those_of_the_index_map(parts):
  """Spec 2.3, written out row by row."""
  embed, heads, kv = 5, 8, 3
  local = heads * kv // 4
  shapes = [(embed, heads, kv)] * parts
  tensor = np.arange(parts * heads * kv * embed).reshape(-1, embed)
  leaves = FUSED_HEADS.to_ours(tensor, shapes)
  for row in range(len(tensor)):
    chunk = row // (parts * local)
    part = row % (parts * local) // local
    offset = row % local
    head = chunk * (heads // 4) + offset // kv
    np.testing.assert_array_equal(
        leaves[part][:, head, offset % kv], tensor[row]
    )
  assert math.prod(FUSED_HEADS.their_shape(shapes)) == tensor.size


def test_heads_that_four_does_not_divide_cannot_be_fused():
  with pytest.raises(UserError, match='heads that 4 divides.*found 6'):
    FUSED_HEADS.their_shape([(5, 6, 3)] * 3)
