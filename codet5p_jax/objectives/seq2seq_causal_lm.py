"""Sequence-to-sequence causal language modelling (paper, section 3.1).

A row is cut at a random pivot: the encoder sees what stands before, the decoder
goes on.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from codet5p_jax.corpus.folder import token_rows
from codet5p_jax.errors import UserError
from codet5p_jax.training import teacher_forcing

if TYPE_CHECKING:
  from codet5p_jax.corpus.token_store import TokenRows
  from codet5p_jax.data.vocabularies import TaskTokens, Vocabulary

# Share of the row that stands before the pivot.
FIRST_PIVOT, LAST_PIVOT = 0.1, 0.9


def pivot_range(row_length: int) -> tuple[int, int]:
  """The first and the last pivot of a row, in tokens before it.

  >>> pivot_range(660)
  (66, 594)
  """
  # Rounded first: 0.1 * 30 is a little more than 3 in floating point.
  first = math.ceil(round(FIRST_PIVOT * row_length, 6))
  return first, math.floor(round(LAST_PIVOT * row_length, 6))


def cut_at_pivot(
    row: Mapping[str, np.ndarray],
    generator: np.random.Generator,
    task_tokens: 'TaskTokens',
) -> tuple[np.ndarray, np.ndarray]:
  """Makes a source and a target of a row of tokens.

  The pivot is uniform between a tenth and nine tenths of the row.

  >>> from codet5p_jax.data.task_tokens import TaskTokens
  >>> ids = TaskTokens(pad=0, bos=1, eos=2, unk=3, clm=9, match=4, tdec=5,
  ...                  cdec=6, sentinels=())
  >>> row = {'tokens': np.array([17, 18, 19, 20])}
  >>> source, target = cut_at_pivot(row, np.random.default_rng(0), ids)
  >>> source.tolist(), target.tolist()
  ([9, 1, 17, 18, 19], [1, 20, 2])

  Args:
    row: 'tokens', int [length].
    generator: of the random numbers.
    task_tokens: ids by role.

  Returns:
    Source and target, int32 of any length.
  """
  tokens = np.asarray(row['tokens'], np.int32)
  first, last = pivot_range(len(tokens))
  pivot = generator.integers(first, last, endpoint=True)
  before = [] if task_tokens.bos is None else [task_tokens.bos]
  source = [[task_tokens.clm], before, tokens[:pivot]]
  target = [before, tokens[pivot:], [task_tokens.eos]]
  return (
      np.concatenate(source).astype(np.int32),
      np.concatenate(target).astype(np.int32),
  )


@dataclasses.dataclass(frozen=True)
class Seq2SeqCausalLM(teacher_forcing.TeacherForced):
  """Sequence-to-sequence causal language modelling over a corpus folder.

  Attributes:
    row_length: tokens of a row before it is cut; such that the longest prefix
      and the longest continuation, nine tenths of it each, fit the two lengths.
    source_length: tokens of a source, [CLM] and <s> included; paper: 768.
    target_length: tokens of a target, <s> and </s> included; paper: 600.
    rate: how often it is drawn, relative to the other objectives.
    first_step: from which on it is drawn.
    batch_scale: rows of its batches, in multiples of the run's.
    loss_tile_length: positions of each row whose logits exist at a time.
  """

  row_length: int = 660
  source_length: int = 768
  target_length: int = 600
  rate: float = 1.0
  first_step: int = 0
  batch_scale: int = 1
  loss_tile_length: int = 128

  name = 'seq2seq_causal_lm'
  reads = 'tokens'

  def __post_init__(self):
    teacher_forcing.check_fields(
        self,
        row_length=self.row_length,
        source_length=self.source_length,
        target_length=self.target_length,
    )
    first, last = pivot_range(self.row_length)
    longest = {
        'source_length': last + 2,
        'target_length': self.row_length - first + 2,
    }
    for name, needed in longest.items():
      if getattr(self, name) < needed:
        raise UserError(
            f'expected {name} to hold nine tenths of a row of '
            f'{self.row_length} tokens and two more, {needed} in all, found '
            f'{getattr(self, name)}; raise it or shorten the rows'
        )

  def rows(
      self, data_dir: str, split: str, vocabulary: 'Vocabulary'
  ) -> 'TokenRows':
    """Rows of a split of a corpus folder, by index."""
    return token_rows(
        pathlib.Path(data_dir), vocabulary, split, self.row_length
    )

  def source_and_target(
      self,
      row: Mapping[str, np.ndarray],
      generator: np.random.Generator,
      vocabulary: 'Vocabulary',
  ) -> tuple[np.ndarray, np.ndarray]:
    return cut_at_pivot(row, generator, vocabulary.task_tokens)
