"""Span denoising with whole words (paper, section 3.1; CodeT5's spans).

The encoder sees a row in which spans of words are hidden, each behind a
sentinel; the decoder tells each sentinel and what it hid.
"""

import dataclasses
import logging
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

_logger = logging.getLogger(__name__)


def sample_spans(
    word_starts: np.ndarray,
    is_maskable: np.ndarray,
    generator: np.random.Generator,
    max_tokens: int,
    max_target_tokens: int,
    max_spans: int,
    max_words: int,
) -> list[tuple[int, int]]:
  """Draws spans of whole words, apart from one another.

  A span begins at a random word and is 1 to `max_words` words long, each length
  as likely. A place is passed over where the longest span would not fit what is
  left of the budget, the row or the stretch between words that may not be
  hidden: so nothing is ever trimmed, and whether a span is dropped does not
  depend on its length, which would make short ones more frequent. Drawing ends
  when every place was tried.

  >>> starts = np.array([True, False, True, True, False, True, True])
  >>> random = np.random.default_rng(0)
  >>> sample_spans(starts, np.ones(7, bool), random, 4, 9, 9, 2)
  [(3, 5)]

  Args:
    word_starts: bool [length], where words begin. Tokens before the first
      belong to a word that is cut, those from the last on perhaps too: they are
      never hidden.
    is_maskable: bool [length], false for tokens that must stay.
    generator: of the random numbers.
    max_tokens: to hide at most.
    max_target_tokens: for spans and their sentinels at most.
    max_spans: to draw at most.
    max_words: length of the longest span.

  Returns:
    (begin, end) of each span in tokens, in order.
  """
  borders = np.flatnonzero(word_starts)
  num_words = len(borders) - 1
  if num_words < max_words:
    return []
  kept_before = np.append(0, np.cumsum(~is_maskable))
  ends = borders[max_words:]
  fits = kept_before[ends] == kept_before[borders[: len(ends)]]
  places = generator.permutation(np.flatnonzero(fits)).tolist()
  words = generator.integers(1, max_words + 1, len(places)).tolist()
  borders = borders.tolist()
  # Taken words, with one more at either end to save a check.
  taken = bytearray(num_words + 2)
  spans = []
  for place in places:
    if len(spans) == max_spans or max_tokens < max_words:
      break
    longest = borders[place + max_words] - borders[place]
    if longest > max_tokens or longest + 1 > max_target_tokens:
      continue
    # Apart: the words before and after the longest span are free too.
    if any(taken[place : place + max_words + 2]):
      continue
    last = place + words[len(spans)]
    for word in range(place + 1, last + 1):
      taken[word] = 1
    begin, end = borders[place], borders[last]
    spans.append((begin, end))
    max_tokens -= end - begin
    max_target_tokens -= end - begin + 1
  return sorted(spans)


def hide_spans(
    row: Mapping[str, np.ndarray],
    generator: np.random.Generator,
    task_tokens: 'TaskTokens',
    max_target_tokens: int,
    noise_density: float = 0.15,
    max_words: int = 5,
) -> tuple[np.ndarray, np.ndarray]:
  """Makes a source and a target of a row of tokens.

  >>> from codet5p_jax.data.task_tokens import TaskTokens
  >>> ids = TaskTokens(pad=0, bos=1, eos=2, unk=3, clm=3, match=4, tdec=5,
  ...                  cdec=6, sentinels=(99, 98))
  >>> row = {'tokens': np.array([17, 18, 19, 20, 21, 22, 23]),
  ...        'word_starts': np.array([1, 1, 0, 1, 1, 1, 1], bool)}
  >>> source, target = hide_spans(
  ...     row, np.random.default_rng(3), ids, 9, 0.6, max_words=2)
  >>> source.tolist()
  [1, 99, 20, 98, 22, 23, 2]
  >>> target.tolist()
  [1, 99, 17, 18, 19, 98, 21, 2]

  Args:
    row: 'tokens', int [length], and 'word_starts', bool [length].
    generator: of the random numbers.
    task_tokens: ids by role.
    max_target_tokens: of the target, <s> and </s> included.
    noise_density: share of the tokens to hide.
    max_words: spans are 1 to so many words long.

  Returns:
    Source and target, int32 of any length.
  """
  tokens = np.asarray(row['tokens'], np.int32)
  before = [] if task_tokens.bos is None else [task_tokens.bos]
  spans = sample_spans(
      row['word_starts'],
      # No span reaches over the end of a file.
      tokens != task_tokens.eos,
      generator,
      max_tokens=round(noise_density * len(tokens)),
      max_target_tokens=max_target_tokens - len(before) - 1,
      max_spans=len(task_tokens.sentinels),
      max_words=max_words,
  )
  source, target, kept_from = [before], [before], 0
  for (begin, end), sentinel in zip(spans, task_tokens.sentinels):
    source += [tokens[kept_from:begin], [sentinel]]
    target += [[sentinel], tokens[begin:end]]
    kept_from = end
  source += [tokens[kept_from:], [task_tokens.eos]]
  target += [[task_tokens.eos]]
  return (
      np.concatenate(source).astype(np.int32),
      np.concatenate(target).astype(np.int32),
  )


@dataclasses.dataclass(frozen=True)
class SpanDenoising(teacher_forcing.TeacherForced):
  """Whole-word span denoising over a corpus folder.

  Attributes:
    source_length: tokens of a row before any is hidden, <s> and </s> included;
      paper: 512.
    target_length: tokens of a target; no span is drawn that would not fit.
    noise_density: share of a row's tokens that are hidden at most.
    max_words: spans are 1 to so many words long, each length as likely.
    rate: how often it is drawn, relative to the other objectives.
    first_step: from which on it is drawn.
    batch_scale: rows of its batches, in multiples of the run's; paper: 2048
      rows where the other objectives have 512.
    loss_tile_length: positions of each row whose logits exist at a time.
    untrained_sentinels: allows CodeGen's vocabulary, whose released checkpoints
      never trained the rows that serve as sentinels.
  """

  source_length: int = 512
  target_length: int = 128
  noise_density: float = 0.15
  max_words: int = 5
  rate: float = 1.0
  first_step: int = 0
  batch_scale: int = 1
  loss_tile_length: int = 128
  untrained_sentinels: bool = False

  name = 'span_denoising'
  reads = 'tokens'

  def __post_init__(self):
    teacher_forcing.check_fields(
        self,
        source_length=self.source_length,
        target_length=self.target_length,
    )
    if not 0 < self.noise_density < 1 or self.max_words < 1:
      raise UserError(
          f'expected noise_density between 0 and 1 and max_words of 1 or more, '
          f'found {self.noise_density} and {self.max_words}; mend the '
          f'SpanDenoising of OBJECTIVES'
      )

  def rows(
      self, data_dir: str, split: str, vocabulary: 'Vocabulary'
  ) -> 'TokenRows':
    """Rows of a split of a corpus folder, by index.

    Raises:
      UserError: the vocabulary is CodeGen's, and `untrained_sentinels` does not
        ask for it; or as `token_rows`.
    """
    if vocabulary.kind == 'codegen':
      self._check_sentinels(split)
    added = 1 if vocabulary.task_tokens.bos is None else 2
    return token_rows(
        pathlib.Path(data_dir), vocabulary, split, self.source_length - added
    )

  def source_and_target(
      self,
      row: Mapping[str, np.ndarray],
      generator: np.random.Generator,
      vocabulary: 'Vocabulary',
  ) -> tuple[np.ndarray, np.ndarray]:
    return hide_spans(
        row,
        generator,
        vocabulary.task_tokens,
        self.target_length,
        self.noise_density,
        self.max_words,
    )

  def _check_sentinels(self, split: str) -> None:
    if not self.untrained_sentinels:
      raise UserError(
          "expected a vocabulary whose sentinels mean something, found "
          "CodeGen's: its released checkpoints never trained their rows, and a "
          'frozen decoder does not learn them; train with '
          'objectives/causal_lm.gin, or set '
          '--gin.span_denoising.SpanDenoising.untrained_sentinels=True'
      )
    if split == 'train':  # Once, for who trains.
      _logger.warning(
          "Denoising with CodeGen's vocabulary: its released checkpoints never "
          'trained the rows of the sentinels.'
      )
