"""Plain fine-tuning: predict a target text from a source text."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from codet5p_jax.errors import UserError
from codet5p_jax.training import teacher_forcing

if TYPE_CHECKING:
  from codet5p_jax.data.vocabularies import TaskTokens, Vocabulary


def frame_pair(
    source: list[int],
    target: list[int],
    task_tokens: 'TaskTokens',
    source_length: int,
    target_length: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Frames two token lists by <s> and </s>, cut to their lengths.

  Vocabularies without <s> (CodeGen's) add nothing around a source, as the
  released tokenizers; a target ends all the same, or no end would be learned.

  >>> from codet5p_jax.data.task_tokens import TaskTokens
  >>> ids = TaskTokens(pad=0, bos=1, eos=2, unk=3, clm=3, match=4, tdec=5,
  ...                  cdec=6, sentinels=())
  >>> source, target = frame_pair([7, 8, 9], [5], ids, 4, 5)
  >>> source.tolist(), target.tolist()
  ([1, 7, 8, 2], [1, 5, 2])
  """

  def frame(tokens, length, before, after):
    kept = tokens[: length - len(before) - len(after)]
    return np.array([*before, *kept, *after], np.int32)

  before = [] if task_tokens.bos is None else [task_tokens.bos]
  after = [task_tokens.eos]
  return (
      frame(source, source_length, before, after if before else []),
      frame(target, target_length, before, after),
  )


def continue_prompt(
    source: list[int],
    target: list[int],
    task_tokens: 'TaskTokens',
    source_length: int,
    target_length: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Makes a source, and a decoder sequence that begins with all of it.

  As the released instruction tuning (`instruct_tune_codet5p.py`), nothing is
  added but one </s> at the very end, and what is longer than its length is
  cut, that </s> too: a cut text has not ended. Source and target are joined as
  tokens, as a prompt is continued, not as texts.

  >>> from codet5p_jax.data.task_tokens import TaskTokens
  >>> ids = TaskTokens(pad=9, bos=None, eos=9, unk=9, clm=3, match=4, tdec=5,
  ...                  cdec=6, sentinels=())
  >>> source, target = continue_prompt([7, 8, 6], [5], ids, 2, 5)
  >>> source.tolist(), target.tolist()
  ([7, 8], [7, 8, 6, 5, 9])
  """
  sequence = [*source, *target, task_tokens.eos]
  return (
      np.array(source[:source_length], np.int32),
      np.array(sequence[:target_length], np.int32),
  )


@dataclasses.dataclass(frozen=True)
class SequenceToSequence(teacher_forcing.TeacherForced):
  """Fine-tuning on pairs: a folder of `train.jsonl` and `validation.jsonl`.

  Attributes:
    source_length: tokens of a source, <s> and </s> included; longer ones are
      cut.
    target_length: tokens of a target, likewise; with `prompt_to_decoder`, of
      source and target together.
    source_field: of the source text in each JSON line.
    target_field: of the target text.
    prompt_to_decoder: the decoder, too, is given the source; the loss is of
      what follows it. As the model was trained: see its configuration.
    rate: how often it is drawn, relative to the other objectives.
    first_step: from which on it is drawn.
    batch_scale: rows of its batches, in multiples of the run's.
    loss_tile_length: positions of each row whose logits exist at a time.
  """

  source_length: int
  target_length: int
  source_field: str = 'source'
  target_field: str = 'target'
  prompt_to_decoder: bool = False
  rate: float = 1.0
  first_step: int = 0
  batch_scale: int = 1
  loss_tile_length: int = 128

  name = 'sequence_to_sequence'
  reads = 'texts'

  def __post_init__(self):
    teacher_forcing.check_fields(
        self,
        source_length=self.source_length,
        target_length=self.target_length,
    )

  def rows(
      self, data_dir: str, split: str, vocabulary: 'Vocabulary'
  ) -> list[dict[str, str]]:
    """The pairs of a split, in the order of the file."""
    del vocabulary  # Pairs are texts.
    fields = (self.source_field, self.target_field)
    return _read_pairs(pathlib.Path(data_dir) / f'{split}.jsonl', fields)

  def check_model(self, model: Any) -> None:
    """Checks that source and target reach the model as it was trained.

    Raises:
      UserError: prompts reach the decoder of one and not of the other, or the
        model lacks a stack.
    """
    super().check_model(model)
    if self.prompt_to_decoder != model.prompt_to_decoder:
      raise UserError(
          f'expected prompt_to_decoder {model.prompt_to_decoder}, as the model '
          f'was made for, found {self.prompt_to_decoder} in {self.name}; set '
          f'PROMPT_TO_DECODER={model.prompt_to_decoder}'
      )

  def source_and_target(
      self,
      row: Mapping[str, str],
      generator: np.random.Generator,
      vocabulary: 'Vocabulary',
  ) -> tuple[np.ndarray, np.ndarray]:
    del generator  # Nothing is random.
    return self._make_pair(*self._encode(row, vocabulary), vocabulary)

  def example(
      self,
      row: Mapping[str, str],
      generator: np.random.Generator,
      vocabulary: 'Vocabulary',
  ) -> dict[str, np.ndarray]:
    del generator
    source, target = self._encode(row, vocabulary)
    return teacher_forcing.padded_example(
        *self._make_pair(source, target, vocabulary),
        vocabulary.task_tokens.pad,
        self.source_length,
        self.target_length,
        len(source) if self.prompt_to_decoder else 0,
    )

  def _encode(
      self, row: Mapping[str, str], vocabulary: 'Vocabulary'
  ) -> tuple[list[int], list[int]]:
    source, target = row[self.source_field], row[self.target_field]
    return vocabulary.encode(source), vocabulary.encode(target)

  def _make_pair(
      self, source: list[int], target: list[int], vocabulary: 'Vocabulary'
  ) -> tuple[np.ndarray, np.ndarray]:
    make_pair = continue_prompt if self.prompt_to_decoder else frame_pair
    return make_pair(
        source,
        target,
        vocabulary.task_tokens,
        self.source_length,
        self.target_length,
    )


def _read_pairs(
    path: pathlib.Path, fields: tuple[str, str]
) -> list[dict[str, str]]:
  if not path.is_file():
    raise UserError(
        f'expected pairs in {path}, found no such file; write one JSON object '
        f'a line with the fields {fields[0]!r} and {fields[1]!r}'
    )
  pairs = []
  # As bytes, so that a line that is not UTF-8 is named too.
  with path.open('rb') as lines:
    for number, line in enumerate(lines, 1):
      try:
        row = json.loads(line.decode())
        pairs.append({field: _text(row[field]) for field in fields})
      except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'expected a JSON object with the texts {fields[0]!r} and '
            f'{fields[1]!r} in line {number} of {path}, found '
            f'{line.decode(errors="replace").strip()[:60]!r}; mend or remove '
            f'the line'
        ) from error
  if not pairs:
    raise UserError(f'expected pairs in {path}, found an empty file; add some')
  return pairs


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise TypeError(value)
  return value
