import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.training.partition import merge_params, partition_params

PARAMS = {
    'encoder': {'wi': {'kernel': 1}, 'norm': {'scale': 2}},
    'decoder': {'cross_attention': {'out': 3}, 'wi': {'kernel': 4}},
}


def test_patterns_match_whole_paths_and_parts_merge_back():
  trainable, frozen = partition_params(
      PARAMS, ('encoder/.*', '.*/cross_attention/.*')
  )
  assert trainable == {
      'encoder': PARAMS['encoder'],
      'decoder': {'cross_attention': {'out': 3}},
  }
  assert frozen == {'decoder': {'wi': {'kernel': 4}}}
  assert merge_params(trainable, frozen) == PARAMS


def test_everything_may_be_trainable():
  assert partition_params(PARAMS, ('.*',)) == (PARAMS, {})


@pytest.mark.parametrize(
    ('patterns', 'message'),
    [
        (('encoder',), "'encoder' matches no parameter"),
        (('(',), 'is no regular expression'),
        ((), 'at least one trainable parameter'),
    ],
)
def test_patterns_that_select_nothing_are_refused(patterns, message):
  with pytest.raises(UserError, match=message):
    partition_params(PARAMS, patterns)
