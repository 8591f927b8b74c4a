"""Problems of executable benchmarks, as programs to run.

The format of a row follows from its fields: with `test`, the shape of
openai/human-eval, which HumanEval-X, MBXP and MathQA-Python have too; with
`test_list`, that of MBPP, whose completions are whole programs.
"""

import ast
import dataclasses
import warnings
from collections.abc import Iterable, Mapping

from codet5p_jax.errors import UserError
from codet5p_jax.execution.sandbox import Program
from codet5p_jax.tasks.problem_files import Row, read_problems, read_rows


@dataclasses.dataclass(frozen=True)
class Problem:
  """A problem and its tests.

  Attributes:
    task_id: its name.
    prompt: what a completion is appended to; empty where completions are whole
      programs.
    tests: the source of its tests.
    tested: the names that are under test.
    setup: source that makes what the tests use of the program's own classes.
  """

  task_id: str
  prompt: str
  tests: str
  tested: tuple[str, ...]
  setup: str = ''

  def program(
      self,
      completion: str,
      seconds: float,
      tests: tuple[str, ...] | None = None,
  ) -> Program:
    """The program of a completion.

    Args:
      completion: what follows the prompt.
      seconds: of wall time for each test.
      tests: sources to test it with instead of the problem's, not trusted.
    """
    return Program(
        solution=self.prompt + completion,
        tests=(self.tests,) if tests is None else tests,
        tested=self.tested,
        seconds=seconds,
        prompt=self.prompt,
        setup=self.setup,
        trusted=tests is None,
    )


def read_executable_problems(path: str) -> dict[str, Problem]:
  """Reads problems, by their task ids.

  Raises:
    UserError: the file or a row of it is not as it should be.
  """
  problems = map(to_problem, read_problems(path))
  return {problem.task_id: problem for problem in problems}


def read_completions(
    path: str, problems: Mapping[str, Problem], partial: bool = False
) -> dict[str, list[str]]:
  """Reads what a model wrote for each of the problems.

  Args:
    path: rows of `task_id` and `completion`.
    problems: by task ids.
    partial: whether problems may have no row.

  Returns:
    The completions of each problem that has one, in the order of the problems
    and, of one problem, in that of the rows.

  Raises:
    UserError: the file or a row of it is not as it should be, a row is of no
      problem, or a problem has no row.
  """
  found: dict[str, list[str]] = {task_id: [] for task_id in problems}
  for row in read_rows(path):
    if 'prompt_id' in row.fields and 'task_id' not in row.fields:
      raise UserError(
          f'expected the field task_id in {row.place}, found prompt_id, as '
          f'`codet5p generate` writes it; make completions of these samples '
          f'with `codet5p postprocess`'
      )
    task_id = str(row.field('task_id', str, int))
    if task_id not in found:
      raise UserError(
          f'expected a task of the problems in {row.place}, found {task_id}; '
          f'give the problems that the samples were made for'
      )
    found[task_id].append(row.text('completion'))
  missing = [task_id for task_id, texts in found.items() if not texts]
  if missing and not partial:
    others = f' and {len(missing) - 1} others' if len(missing) > 1 else ''
    raise UserError(
        f'expected samples of every task in {path}, found none of '
        f'{missing[0]}{others}; add them, or leave those tasks out with '
        f'--partial'
    )
  return {task_id: texts for task_id, texts in found.items() if texts}


def to_problem(row: Row) -> Problem:
  """Makes a problem of a row of a file.

  Raises:
    UserError: a field is missing, or of another type.
  """
  task_id = str(row.field('task_id', str, int))
  if 'test_list' in row.fields:
    return _of_mbpp(task_id, row)
  entry_point = _entry_point(row)
  tests = row.text('test')
  if not _calls_check(tests):
    tests += f'\ncheck({entry_point})\n'
  return Problem(task_id, row.text('prompt'), tests, (entry_point,))


def _entry_point(row: Row) -> str:
  """The function under test; HumanEval-X has it in its declaration alone."""
  if 'entry_point' in row.fields or 'declaration' not in row.fields:
    name = row.text('entry_point')
  else:
    # The last function, as helpers stand before it.
    declared = row.text('declaration').rpartition('def ')[2]
    name = declared.partition('(')[0].strip()
  if not name.isidentifier():
    raise UserError(
        f'expected the name of a function under test in {row.place}, found '
        f'{name!r:.60}; mend or remove the row'
    )
  return name


def _calls_check(tests: str) -> bool:
  """Whether the tests call their function by themselves."""
  return any(
      isinstance(statement, ast.Expr)
      and isinstance(statement.value, ast.Call)
      and isinstance(statement.value.func, ast.Name)
      and statement.value.func.id == 'check'
      for statement in _statements(tests)
  )


def _of_mbpp(task_id: str, row: Row) -> Problem:
  asserts = row.texts('test_list')
  if not asserts:
    raise UserError(
        f'expected asserts as test_list in {row.place}, found none, which '
        f'every program would pass; mend or remove the row'
    )
  imports = row.texts('test_imports') if 'test_imports' in row.fields else []
  tests = '\n'.join([*imports, *asserts])
  setup, code = (
      row.text(name) if name in row.fields else ''
      for name in ('test_setup_code', 'code')
  )
  # What the reference defines and the tests name, such as a function `sum`; the
  # tests' own name for it would be Python's.
  tested = _names(tests.split('\n')) & _definitions(code)
  return Problem(task_id, '', tests, tuple(sorted(tested)), setup)


def _names(sources: Iterable[str]) -> set[str]:
  """The names that sources read."""
  return {
      node.id
      for source in sources
      for statement in _statements(source)
      for node in ast.walk(statement)
      if isinstance(node, ast.Name)
  }


def _definitions(source: str) -> set[str]:
  """The functions and classes that a source defines."""
  return {
      node.name for node in _statements(source)
      if isinstance(node, ast.FunctionDef | ast.ClassDef)}  # fmt: skip


def _statements(source: str) -> list[ast.stmt]:
  """The statements of a source; none if it is no Python."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # About its escapes, which are not ours.
    try:
      return ast.parse(source).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
      return []
