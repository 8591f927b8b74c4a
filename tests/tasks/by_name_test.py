import sys
import textwrap

import pytest

from codet5p_jax import tasks
from codet5p_jax.errors import UserError
from codet5p_jax.tasks.by_name import make_task
from codet5p_jax.tasks.humaneval import HumanEval
from codet5p_jax.tasks.math_programming import MathProgramming
from codet5p_jax.tasks.mbpp import MBPP
from codet5p_jax.tasks.prompts import PreparableTask, Task


def test_a_task_is_made_by_the_name_of_its_module():
  assert make_task('humaneval') == HumanEval()
  assert make_task('mbpp', {'num_asserts': 1}) == MBPP(num_asserts=1)
  stops = {'stop_strings': ['\n\n']}
  assert make_task('math_programming', stops) == MathProgramming(['\n\n'])


def test_all_that_generation_and_scoring_call_is_there():
  for name in ('humaneval', 'mbpp', 'math_programming'):
    made = make_task(name)
    assert isinstance(made, Task)
    assert isinstance(made, PreparableTask) == (name != 'humaneval')


def test_a_new_task_needs_no_edit_elsewhere(tmp_path, monkeypatch):
  (tmp_path / 'riddles.py').write_text(textwrap.dedent('''
      """Riddles."""

      import dataclasses


      @dataclasses.dataclass(frozen=True)
      class Riddles:
        """Asks nothing."""

        hints: int = 0

        read_problems = prompt = completion = str


      TASK = Riddles
  '''))
  monkeypatch.setattr(tasks, '__path__', [*tasks.__path__, str(tmp_path)])
  assert make_task('riddles', {'hints': 3}).hints == 3
  monkeypatch.delitem(sys.modules, 'codet5p_jax.tasks.riddles')


@pytest.mark.parametrize(
    ('name', 'fields', 'expected'),
    [
        ('human_eval', None, 'among humaneval, math_programming, mbpp, found'),
        # It is there, but no task.
        ('arithmetic', None, 'among humaneval, math_programming, mbpp, found'),
        ('humaneval', {'instrct': True}, 'no field instrct; did you mean inst'),
        ('humaneval', {'instruct': 1}, 'True or False as instruct of the task'),
        ('mbpp', {'stop_strings': 'x'}, "as stop_strings .*found 'x'; set it"),
        ('mbpp', {3: 4}, 'the task mbpp has no field 3'),
    ],
)
def test_what_no_task_has_is_one_clear_line(name, fields, expected):
  with pytest.raises(UserError, match=expected) as error:
    make_task(name, fields)
  assert '\n' not in str(error.value)
