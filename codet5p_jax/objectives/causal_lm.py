"""Decoder-only causal language modelling (paper, section 3.1).

The encoder sees the single token [CLM]; the decoder generates the whole row.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from codet5p_jax.corpus.folder import token_rows
from codet5p_jax.training import teacher_forcing

if TYPE_CHECKING:
  from codet5p_jax.corpus.token_store import TokenRows
  from codet5p_jax.data.vocabularies import TaskTokens, Vocabulary


def follow_clm(
    row: Mapping[str, np.ndarray], task_tokens: 'TaskTokens'
) -> tuple[np.ndarray, np.ndarray]:
  """Makes a source and a target of a row of tokens.

  >>> from codet5p_jax.data.task_tokens import TaskTokens
  >>> ids = TaskTokens(pad=0, bos=1, eos=2, unk=3, clm=9, match=4, tdec=5,
  ...                  cdec=6, sentinels=())
  >>> source, target = follow_clm({'tokens': np.array([17, 18, 19])}, ids)
  >>> source.tolist(), target.tolist()
  ([9], [1, 17, 18, 19, 2])

  Args:
    row: 'tokens', int [length].
    task_tokens: ids by role.

  Returns:
    Source, int32 [1], and target, int32 of any length.
  """
  before = [] if task_tokens.bos is None else [task_tokens.bos]
  target = np.concatenate([before, row['tokens'], [task_tokens.eos]])
  return np.array([task_tokens.clm], np.int32), target.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class CausalLM(teacher_forcing.TeacherForced):
  """Decoder-only causal language modelling over a corpus folder.

  Attributes:
    target_length: tokens of a row, <s> and </s> included; paper: 1024.
    rate: how often it is drawn, relative to the other objectives.
    first_step: from which on it is drawn.
    batch_scale: rows of its batches, in multiples of the run's.
    loss_tile_length: positions of each row whose logits exist at a time.
  """

  target_length: int = 1024
  rate: float = 1.0
  first_step: int = 0
  batch_scale: int = 1
  loss_tile_length: int = 128

  name = 'causal_lm'
  source_length = 1
  reads = 'tokens'

  def __post_init__(self):
    teacher_forcing.check_fields(self, target_length=self.target_length)

  def rows(
      self, data_dir: str, split: str, vocabulary: 'Vocabulary'
  ) -> 'TokenRows':
    """Rows of a split of a corpus folder, by index."""
    added = 1 if vocabulary.task_tokens.bos is None else 2
    return token_rows(
        pathlib.Path(data_dir), vocabulary, split, self.target_length - added
    )

  def source_and_target(
      self,
      row: Mapping[str, np.ndarray],
      generator: np.random.Generator,
      vocabulary: 'Vocabulary',
  ) -> tuple[np.ndarray, np.ndarray]:
    del generator  # Nothing is random.
    return follow_clm(row, vocabulary.task_tokens)
