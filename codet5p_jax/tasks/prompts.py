"""What a benchmark asks of a model, and what every task can be asked for.

A task is one module of this package. It holds a frozen dataclass with the
methods of `Task`, and names it `TASK`; its fields are what gin files set.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from codet5p_jax.errors import UserError
from codet5p_jax.tasks.problem_files import Row

INDENTATION = ' ' * 4


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is asked for one problem.

  Attributes:
    prompt_id: the problem's task id, as text.
    encoder_text: for the encoder.
    decoder_text: what the decoder is made to begin with, and goes on from.
      None for what suits the mode: the encoder's text where the decoder gets
      the prompt, and nothing elsewhere.
  """

  prompt_id: str
  encoder_text: str
  decoder_text: str | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What a row of a benchmark's file gives.

  Attributes:
    problem: for generation and `score`; None if its answer is unknown.
    pair: of texts, `source` and `target`, to fine-tune on; None if there is
      none.
    reason: one word for why there is no pair.
  """

  problem: Mapping[str, Any] | None
  pair: Mapping[str, str] | None
  reason: str | None = None


@runtime_checkable
class Task(Protocol):
  """A benchmark."""

  def read_problems(self, path: str) -> list[dict[str, Any]]:
    """The problems of a file, in order.

    Raises:
      UserError: the file is not what it should be, or has a problem twice.
    """

  def prompt(self, problem: Mapping[str, Any]) -> Prompt:
    """What a model is asked."""

  def completion(self, problem: Mapping[str, Any], text: str) -> str:
    """The completion that `score` reads.

    What is executed is this behind the problem's prompt, or, where that is no
    code (MBPP), this alone.

    Args:
      problem: one of `read_problems`.
      text: what a model wrote.
    """


@runtime_checkable
class PreparableTask(Task, Protocol):
  """A benchmark whose own file is not what the other commands read."""

  def prepare(self, row: Row, split: str) -> Prepared | None:
    """What a row gives; None if it belongs to another split.

    Args:
      row: of the benchmark's own file.
      split: "train", "validation" or "test".

    Raises:
      UserError: the row is not what it should be.
    """


def cut_at_stop_strings(text: str, stop_strings: Sequence[str]) -> str:
  """Cuts a text at each stop string in turn, as the released evaluation does.

  A later string is looked for in what an earlier one left.

  >>> cut_at_stop_strings('  return 1\\nprint(2)\\ndef', ('\\ndef', '\\nprint'))
  '  return 1'
  """
  for stop in stop_strings:
    text = text.partition(stop)[0]
  return text


def check_stop_strings(stop_strings: Sequence[str]) -> None:
  """Raises UserError: one is empty, so every text would be; or they are one."""
  if isinstance(stop_strings, str):
    raise UserError(
        f'expected stop strings as a tuple, found the text {stop_strings!r}; '
        r"""set STOP_STRINGS="('\n', '\ndef')" or the like"""
    )
  if '' in stop_strings:
    raise UserError(
        'expected stop strings of at least one character, found an empty one, '
        'which would end every text at once; leave it out of STOP_STRINGS'
    )


def tabs_for_spaces(text: str) -> str:
  """Makes every four spaces in a row, from the left, a tab (spec 7.1, T16).

  >>> tabs_for_spaces('     if x:    # five, then four')
  '\\t if x:\\t# five, then four'
  """
  return text.replace(INDENTATION, '\t')


def spaces_for_tabs(text: str) -> str:
  """Makes every tab four spaces, wherever it stands."""
  return text.replace('\t', INDENTATION)
