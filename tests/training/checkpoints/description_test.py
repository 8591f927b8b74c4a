import jax
import jax.numpy as jnp
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.training.checkpoints.description import (
    describe_leaves,
    require_same_leaves,
)


def _describe(**shapes):
  return describe_leaves({
      path: jax.ShapeDtypeStruct(shape, jnp.float32)
      for path, shape in shapes.items()
  })


def test_equal_leaves_in_another_order_pass():
  saved, expected = _describe(a=(2, 3), b=()), _describe(b=(), a=(2, 3))
  require_same_leaves(saved, expected, 'here')


def test_every_kind_of_difference_is_in_one_line():
  saved = _describe(a=(2, 3), b=(4,), old=(5,))
  expected = _describe(a=(2, 7), b=(4,), new=(5,))
  expected['b']['dtype'] = 'bfloat16'
  with pytest.raises(UserError) as raised:
    require_same_leaves(saved, expected, 'checkpoint here')
  assert str(raised.value) == (
      'expected in checkpoint here the arrays of this model and optimizer, '
      'found 1 missing (new); 1 unexpected (old); '
      '1 of another shape (a: expected [2, 7], found [2, 3]); '
      '1 of another dtype (b: expected bfloat16, found float32); '
      'use the configuration that wrote it, or another checkpoint'
  )


def test_many_differences_are_counted_and_five_named():
  saved = _describe(**{f'x{index}': (2,) for index in range(9)})
  with pytest.raises(UserError, match=r'9 unexpected \(x0, .* x4, \.'):
    require_same_leaves(saved, {}, 'here')
