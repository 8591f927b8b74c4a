"""MBPP, mostly basic Python problems (Austin et al. 2021).

The prompt is a docstring of the task and its asserts, which a model without
instruction tuning continues by a program; zero-shot evaluations since InCoder
(Fried et al. 2022) ask so, with the first assert alone (`num_asserts` 1), the
paper shows all of them. Examples, too, are the paper's: a few of problems 1 to
10, from the second on. A newline follows the docstring, so that fine-tuning on
pairs and evaluation meet at the same place.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from codet5p_jax.errors import UserError
from codet5p_jax.tasks import problem_files
from codet5p_jax.tasks.problem_files import Row
from codet5p_jax.tasks.prompts import (
    Prepared,
    Prompt,
    check_stop_strings,
    cut_at_stop_strings,
    spaces_for_tabs,
    tabs_for_spaces,
)

# The task ids of each split, as its paper has them.
_SPLITS = {
    'train': range(601, 975),
    'validation': range(511, 601),
    'test': range(11, 511),
}
# Three examples are 2, 3 and 4 in the paper.
_EXAMPLES = ('2', '3', '4', '5', '6', '7', '8', '9', '10', '1')


@dataclasses.dataclass(frozen=True)
class MBPP:
  """MBPP, the whole or the sanitized one; a completion is a whole program.

  Attributes:
    examples: a file with problems 1 to 10, solutions included; only
      `num_examples` reads it.
    num_examples: solved problems that a prompt begins with, up to 10.
    num_asserts: of each problem's asserts, so many are shown; None for all.
    indent_with_tabs: whether the model is shown tabs for four spaces, as the
      released ones were; what it writes gets its spaces back.
    stop_strings: each ends what a model wrote. Functions do not: a program may
      need several.
  """

  examples: str | None = None
  num_examples: int = 0
  num_asserts: int | None = None
  indent_with_tabs: bool = True
  stop_strings: Sequence[str] = (
      '\nclass', '\nassert', '\n"""', '\nprint', '\nif'
  )  # fmt: skip

  def __post_init__(self):
    check_stop_strings(self.stop_strings)
    most = 0 if self.examples is None else len(_EXAMPLES)
    if not 0 <= self.num_examples <= most:
      raise UserError(
          f'expected num_examples from 0 to {len(_EXAMPLES)}, and a file of '
          f'examples if any, found {self.num_examples} of {self.examples}; set '
          f'both'
      )
    if self.num_asserts is not None and self.num_asserts < 0:
      raise UserError(
          f'expected num_asserts of 0 or more, found {self.num_asserts}; leave '
          f'it out to show all'
      )

  def read_problems(self, path: str) -> list[dict[str, Any]]:
    rows = problem_files.read_problems(path)
    for row in rows:
      _check_problem(row)
    return [row.fields for row in rows]

  def prompt(self, problem: Mapping[str, Any]) -> Prompt:
    text = self._examples + self._docstring(problem)
    if self.indent_with_tabs:
      text = tabs_for_spaces(text)
    return Prompt(str(problem['task_id']), text)

  def completion(self, problem: Mapping[str, Any], text: str) -> str:
    """The program."""
    del problem
    text = cut_at_stop_strings(text, self.stop_strings)
    return spaces_for_tabs(text) if self.indent_with_tabs else text

  def prepare(self, row: Row, split: str) -> Prepared | None:
    """The problem as it is, and the pair of its prompt and its solution.

    Raises:
      UserError: there is no such split, or the row is no problem of MBPP.
    """
    if split not in _SPLITS:
      raise UserError(
          f'expected a split of MBPP among {", ".join(_SPLITS)}, found '
          f'{split}; set --split'
      )
    if row.field('task_id', int) not in _SPLITS[split]:
      return None
    _check_problem(row)
    row.text('code')
    source = self._docstring(row.fields)
    target = _solution(row.fields)
    if self.indent_with_tabs:
      source, target = map(tabs_for_spaces, (source, target))
    return Prepared(row.fields, {'source': source, 'target': target})

  def _docstring(self, problem: Mapping[str, Any]) -> str:
    asserts = problem['test_list'][:self.num_asserts]
    text = problem.get('text', problem.get('prompt'))
    return '\n'.join(['"""', text, *map(str.strip, asserts), '"""', ''])

  @functools.cached_property
  def _examples(self) -> str:
    if not self.num_examples:
      return ''
    found = {
        str(row.fields['task_id']): row
        for row in problem_files.read_problems(self.examples)
    }
    text = ''
    for task_id in _EXAMPLES[: self.num_examples]:
      if task_id not in found:
        raise UserError(
            f'expected problem {task_id} of MBPP, the next example, in '
            f'{self.examples}, found none; give the file of all problems'
        )
      _check_problem(found[task_id])
      found[task_id].text('code')
      problem = found[task_id].fields
      text += self._docstring(problem) + _solution(problem) + '\n\n'
    return text


def _check_problem(row: Row) -> None:
  """Raises UserError: a row has no task or no asserts."""
  # The sanitized file calls it a prompt.
  row.text('text' if 'text' in row.fields else 'prompt')
  row.texts('test_list')


def _solution(problem: Mapping[str, Any]) -> str:
  """The reference program, without the carriage returns that most have."""
  return problem['code'].replace('\r\n', '\n').rstrip()


TASK = MBPP
