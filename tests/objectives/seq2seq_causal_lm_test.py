import collections

import numpy as np
import pytest
import scipy.stats

from codet5p_jax.data.task_tokens import TaskTokens
from codet5p_jax.errors import UserError
from codet5p_jax.objectives.seq2seq_causal_lm import (
    Seq2SeqCausalLM,
    cut_at_pivot,
    pivot_range,
)

FRAMED = TaskTokens(
    pad=0, bos=1, eos=2, unk=3, clm=9, match=4, tdec=5, cdec=6, sentinels=()
)
# As CodeGen's: one id for all of pad, end and unknown, and no beginning.
UNFRAMED = TaskTokens(
    pad=50, bos=None, eos=50, unk=50, clm=51, match=4, tdec=5, cdec=6,
    sentinels=(),
)  # fmt: skip
ROW = {'tokens': np.arange(100, 130)}


@pytest.mark.parametrize('ids', [FRAMED, UNFRAMED], ids=['framed', 'unframed'])
def test_the_source_says_clm_and_has_no_end_and_the_target_goes_on(ids):
  source, target = cut_at_pivot(ROW, np.random.default_rng(7), ids)
  before = [] if ids.bos is None else [ids.bos]
  prefix = source.tolist()[1 + len(before) :]
  assert source.tolist() == [ids.clm, *before, *prefix]
  continuation = target.tolist()[len(before) : -1]
  assert target.tolist() == [*before, *continuation, ids.eos]
  assert prefix + continuation == ROW['tokens'].tolist()
  assert source.dtype == target.dtype == np.int32


def test_pivots_are_uniform_from_a_tenth_to_nine_tenths():
  pivots = collections.Counter(
      len(cut_at_pivot(ROW, np.random.default_rng(seed), FRAMED)[0]) - 2
      for seed in range(5000)
  )
  assert sorted(pivots) == list(range(3, 28))
  assert scipy.stats.chisquare(list(pivots.values())).pvalue > 0.01


@pytest.mark.parametrize(
    ('length', 'expected'),
    [(660, (66, 594)), (30, (3, 27)), (11, (2, 9)), (70, (7, 63))],
)
def test_pivots_are_rounded_inwards_and_not_by_the_computer(length, expected):
  assert pivot_range(length) == expected


def test_no_row_of_the_default_lengths_overflows():
  objective = Seq2SeqCausalLM()
  first, last = pivot_range(objective.row_length)
  assert last + 2 <= objective.source_length
  assert objective.row_length - first + 2 <= objective.target_length


@pytest.mark.parametrize(
    ('fields', 'expected'),
    [
        ({'row_length': 30, 'source_length': 28, 'target_length': 29},
         'source_length to hold nine tenths of a row of 30 .* 29 in all'),
        ({'row_length': 30, 'source_length': 29, 'target_length': 28},
         'target_length to hold .* 29 in all, found 28'),
        ({'row_length': 2}, 'row_length of seq2seq_causal_lm to hold'),
        ({'batch_scale': -1}, 'batch_scale to be at least 1'),
    ],
)  # fmt: skip
def test_lengths_that_do_not_fit_are_one_clear_line(fields, expected):
  with pytest.raises(UserError, match=expected) as error:
    Seq2SeqCausalLM(**fields)
  assert '\n' not in str(error.value)
  Seq2SeqCausalLM(30, 29, 29)
