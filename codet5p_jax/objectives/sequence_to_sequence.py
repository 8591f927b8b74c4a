"""Plain fine-tuning: predict a target text from a source text."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from codet5p_jax.errors import UserError
from codet5p_jax.training import teacher_forcing

if TYPE_CHECKING:
  import grain

  from codet5p_jax.data.vocabularies import TaskTokens


def pair_example(
    source: list[int],
    target: list[int],
    task_tokens: 'TaskTokens',
    source_length: int,
    target_length: int,
) -> dict[str, np.ndarray]:
  """Makes an example of two token lists: truncated, framed and padded.

  >>> from codet5p_jax.data.task_tokens import TaskTokens
  >>> ids = TaskTokens(pad=0, bos=1, eos=2, unk=3, clm=3, match=4, tdec=5,
  ...                  cdec=6, sentinels=())
  >>> example = pair_example([7, 8, 9], [5], ids, 4, 5)
  >>> example['encoder_input_tokens'].tolist()
  [1, 7, 8, 2]
  >>> example['decoder_target_tokens'].tolist()
  [1, 5, 2, 0, 0]
  >>> example['decoder_loss_weights'].tolist()
  [1.0, 1.0, 1.0, 0.0, 0.0]
  """
  before = [] if task_tokens.bos is None else [task_tokens.bos]

  def frame(tokens, length):
    framed = before + tokens[: length - len(before) - 1] + [task_tokens.eos]
    padded = np.full(length, task_tokens.pad, np.int32)
    padded[: len(framed)] = framed
    return padded, np.float32(np.arange(length) < len(framed))

  targets, weights = frame(target, target_length)
  return {
      'encoder_input_tokens': frame(source, source_length)[0],
      'decoder_target_tokens': targets,
      'decoder_loss_weights': weights,
  }


@dataclasses.dataclass(frozen=True)
class SequenceToSequence:
  """Fine-tuning on pairs: a folder of `train.jsonl` and `validation.jsonl`.

  Attributes:
    source_length: tokens of a source, <s> and </s> included; longer ones are
      cut.
    target_length: tokens of a target, likewise.
    source_field: of the source text in each JSON line.
    target_field: of the target text.
    rate: how often it is drawn, relative to the other objectives.
    loss_tile_length: positions of each row whose logits exist at a time.
  """

  source_length: int
  target_length: int
  source_field: str = 'source'
  target_field: str = 'target'
  rate: float = 1.0
  loss_tile_length: int = 128

  name = 'sequence_to_sequence'

  def __post_init__(self):
    teacher_forcing.check_lengths(
        self.loss_tile_length,
        source_length=self.source_length,
        target_length=self.target_length,
    )

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return teacher_forcing.batch_spec(
        batch_size, self.source_length, self.target_length
    )

  def init_state(self, model: Any, params: Any) -> dict[str, Any]:
    return {}

  def loss(self, model, params, state, batch, key):
    return teacher_forcing.loss(
        model, params, state, batch, key, self.loss_tile_length
    )

  def dataset(
      self, data_dir: str, split: str, vocabulary: Any
  ) -> 'grain.MapDataset':
    """All pairs of a split, in the order of the file."""
    import grain

    fields = (self.source_field, self.target_field)
    pairs = _read_pairs(pathlib.Path(data_dir) / f'{split}.jsonl', fields)

    def example(pair: Mapping[str, str]) -> dict[str, np.ndarray]:
      source, target = (vocabulary.encode(pair[field]) for field in fields)
      return pair_example(
          source,
          target,
          vocabulary.task_tokens,
          self.source_length,
          self.target_length,
      )

    return grain.MapDataset.source(pairs).map(example)


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
