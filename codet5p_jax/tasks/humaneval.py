"""HumanEval (Chen et al. 2021), asked as the released evaluation asks it.

Every detail is that of the released procedure (spec 7.1, steps 1 to 5), what
looks like an oversight too: the scores in the paper depend on it.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from codet5p_jax.errors import UserError
from codet5p_jax.tasks import problem_files
from codet5p_jax.tasks.prompts import (
    INDENTATION,
    Prompt,
    check_stop_strings,
    cut_at_stop_strings,
    spaces_for_tabs,
    tabs_for_spaces,
)

# With one newline more than instruction tuning had (spec T17).
_INSTRUCTION = (
    'Below is an instruction that describes a task. Write a response that '
    'appropriately completes the request.\n\n\n'
    '### Instruction:\nCreate a Python script for this problem:\n'
    '{description}\n\n### Response:'
)


@dataclasses.dataclass(frozen=True)
class HumanEval:
  """HumanEval, and HumanEval-X for Python.

  Attributes:
    instruct: whether the problem is put as an instruction, as to
      InstructCodeT5+ 16B.
    indent_with_tabs: whether the model is shown tabs for four spaces, as the
      released ones were; what it writes gets its spaces back.
    stop_strings: each ends what a model wrote.
    write_tests: whether the model is asked for tests of the problem instead of
      its solution, as CodeT asks: what it writes then are the `tests` of
      `codet5p score codet` (spec 7.1).
  """

  instruct: bool = False
  indent_with_tabs: bool = True
  stop_strings: Sequence[str] = (
      '\nclass', '\ndef', '\n#', '\nif', '\nprint'
  )  # fmt: skip
  write_tests: bool = False

  def __post_init__(self):
    check_stop_strings(self.stop_strings)

  def read_problems(self, path: str) -> list[dict[str, Any]]:
    """The problems of a file: `task_id`, `prompt` and whatever `score` needs.

    Raises:
      UserError: as every task; or a prompt has tabs, which could not be told
        from those that four spaces become.
    """
    rows = problem_files.read_problems(path, 'prompt')
    for row in rows:
      if self.indent_with_tabs and '\t' in row.text('prompt'):
        raise UserError(
            f'expected a prompt without tabs in {row.place}, found one; make '
            f'them spaces, or set indent_with_tabs to False'
        )
    return [row.fields for row in rows]

  def prompt(self, problem: Mapping[str, Any]) -> Prompt:
    code = problem['prompt']
    if self.write_tests:
      code = ask_for_tests(code)
    if self.indent_with_tabs:
      code = tabs_for_spaces(code)
    task_id = str(problem['task_id'])
    if not self.instruct:
      return Prompt(task_id, code)
    instruction = _INSTRUCTION.format(description=describe(code))
    # Nothing stands between the two, not even a newline.
    return Prompt(task_id, instruction, instruction + code)

  def completion(self, problem: Mapping[str, Any], text: str) -> str:
    """What follows the problem's prompt in the program that is judged."""
    del problem
    text = cut_at_stop_strings(text, self.stop_strings)
    return spaces_for_tabs(text) if self.indent_with_tabs else text


def ask_for_tests(code: str) -> str:
  '''A prompt that an assertion about its last function follows.

  Without the examples, which are tests already: the docstring ends before the
  first that is announced or calls the function.

  >>> print(ask_for_tests("""def f(x):
  ...     \'\'\'Twice x.
  ...     >>> f(1)
  ...     2
  ...     \'\'\'
  ... """))
  def f(x):
      \'\'\'Twice x.
      \'\'\'
      pass
  <BLANKLINE>
  # check the correctness of f
  assert
  '''
  begin, name = 0, ''
  for function in re.finditer(r'^def (\w+)', code, re.MULTILINE):
    begin, name = function.start(), function[1]
  docstring = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL).search(code, begin)
  if docstring:
    quotes, text = docstring.groups()
    example = re.search(
        rf'>>>|(\bfor\s+)?\bexamples?\b|\b{name}\(', text, re.IGNORECASE
    )
    if example:
      text = text[: example.start()].rstrip()
    end = '' if '\n' not in docstring[2] else f'\n{INDENTATION}'
    code = code[: docstring.start()] + quotes + text.rstrip() + end + quotes
  return (
      f'{code.rstrip()}\n{INDENTATION}pass\n\n'
      f'# check the correctness of {name}\nassert '
  )


def describe(code: str) -> str:
  '''The text of a prompt's docstring before its first example, on one line.

  As released, and so with the places that `str.find` gives: without an example
  all but the prompt's last character is taken, without a docstring all but the
  first two.

  >>> describe('def f(x):\\n\\t"""Twice\\n\\t  x.\\n\\t>>> f(1)\\n\\t"""')
  'Twice x.'
  >>> describe('def f(x):\\n\\t"""Twice."""\\n')
  'Twice."""'
  >>> describe('# No docstring, no example.\\n')
  'No docstring, no example.'
  '''
  begin = code.find('"""') + 3
  text = code[begin:code.find('>>>')]
  return re.sub(r'\s+', ' ', text.replace('\n', ' ')).strip()


TASK = HumanEval
