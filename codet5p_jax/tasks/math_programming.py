"""Word problems answered by programs: MathQA-Python, GSM8K-Python, GSM-hard.

A program assigns `answer` (spec 7.2). It is judged by execution: wrapped as the
body of `problem()`, it is what `score` runs for a problem in HumanEval's shape,
whose test compares numbers.
"""

import ast
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from codet5p_jax.errors import UserError
from codet5p_jax.tasks import problem_files
from codet5p_jax.tasks.arithmetic import (
    NotArithmetic,
    compute,
    evaluate,
    parse_expression,
)
from codet5p_jax.tasks.problem_files import Row
from codet5p_jax.tasks.prompts import (
    INDENTATION,
    Prepared,
    Prompt,
    check_stop_strings,
    cut_at_stop_strings,
)

# Between a program's answer and the right one; as math.isclose's `abs_tol`.
_TOLERANCE = 1e-4
_HEADER = 'def problem():\n'
_RETURN = f'{INDENTATION}return answer\n'
_STEP = re.compile(r'<<(.*?)>>')


@dataclasses.dataclass(frozen=True)
class MathProgramming:
  """Problems of MathQA-Python as mxeval has them, or of `prepare`.

  Attributes:
    stop_strings: each ends what a model wrote. Models fine-tuned on pairs end
      by themselves.
  """

  stop_strings: Sequence[str] = ()

  def __post_init__(self):
    check_stop_strings(self.stop_strings)

  def read_problems(self, path: str) -> list[dict[str, Any]]:
    rows = problem_files.read_problems(path, 'prompt', 'description', 'test')
    return [row.fields for row in rows]

  def prompt(self, problem: Mapping[str, Any]) -> Prompt:
    return Prompt(str(problem['task_id']), problem_source(problem))

  def completion(self, problem: Mapping[str, Any], text: str) -> str:
    """The body of `problem()`."""
    del problem
    return body(cut_at_stop_strings(text, self.stop_strings))

  def prepare(self, row: Row, split: str) -> Prepared:
    """What a row of a dataset gives; its fields tell which it is.

    - MathQA-Python as mxeval has it (`canonical_solution`), or as released
      (`text`, `code`; the answer would need execution, so it makes no problem
      for scoring).
    - GSM8K (`question`, `answer`). Its pair is the program that its chain of
      `<<expression=value>>` converts to, see `program_of_chain`.
    - GSM-hard of PAL (`input`, `code`, `target`): problems alone, for its
      programs are of another kind.

    Raises:
      UserError: the row is of none of them.
    """
    fields = row.fields
    if 'canonical_solution' in fields:
      return _prepare_mathqa(row)
    if 'text' in fields and 'code' in fields:
      source = '\n'.join(split_constants(row.text('text')))
      target = row.text('code').strip()
      # MBPP has the same fields.
      if not re.search(r'^answer\b', target, re.MULTILINE):
        return Prepared(None, None, 'no_answer')
      return Prepared(None, {'source': source, 'target': target})
    if 'question' in fields:
      return _prepare_gsm8k(row, split)
    if 'input' in fields:
      return _prepare_gsm_hard(row, split)
    raise UserError(
        f'expected the fields canonical_solution, text and code, question and '
        f'answer, or input, code and target in {row.place}, found '
        f'{", ".join(fields) or "none"}; give a file of MathQA-Python, GSM8K '
        f'or GSM-hard'
    )


def split_constants(text: str) -> tuple[str, ...]:
  """Splits a problem of MathQA from the constants that stand at its end.

  >>> split_constants('how many tickets are 2 x 3 ? n0 = 2.0 n1 = 3.0')
  ('how many tickets are 2 x 3 ?', 'n0 = 2.0', 'n1 = 3.0')
  """
  begin = re.search(r'(?:\s+n\d+ = \S+)*\s*\Z', text).start()
  constants = re.findall(r'n\d+ = \S+', text[begin:])
  return text[:begin].strip(), *constants


def problem_source(problem: Mapping[str, Any]) -> str:
  """A problem's text, and a line for each constant that is given with it.

  MathQA's constants stand in the docstring of its prompt alone.
  """
  docstring = re.search('"""(.*)"""', problem['prompt'], re.DOTALL)
  if docstring:
    return '\n'.join(split_constants(docstring[1]))
  return problem['description']


def body(program: str) -> str:
  """Makes a program that assigns `answer` the body of a function.

  >>> body('n0 = 2.0\\nanswer = n0 * 3')
  '    n0 = 2.0\\n    answer = n0 * 3\\n    return answer\\n'
  """
  lines = program.rstrip('\n').split('\n')
  # Lines without text too, as MathQA's own.
  return ''.join(f'{INDENTATION}{line}\n' for line in lines) + _RETURN


def program_of_chain(answer: str) -> str:
  """Converts GSM8K's chain of steps into a program.

  Each step is an assignment to a temporary t0, t1, ..., the last one to
  `answer`. A number that an earlier step gave is that step's temporary (the
  latest such), any other a constant n0, n1, ..., assigned before all steps.

  >>> print(program_of_chain('Half: <<48/2=24>>24.\\nAll: <<48+24=72>>72.'))
  n0 = 48
  n1 = 2
  t0 = n0 / n1
  answer = n0 + t0

  Args:
    answer: the worked answer, with or without its last line.

  Raises:
    NotArithmetic: a step is no arithmetic, or its value no number.
  """
  naming = _Naming({}, {})
  assignments = []
  steps = _STEP.findall(answer)
  for number, step in enumerate(steps):
    expression, _, value = step.partition('=')
    tree = parse_expression(expression)
    evaluate(tree, {})
    name = 'answer' if number == len(steps) - 1 else f't{number}'
    assignments.append(f'{name} = {ast.unparse(naming.visit(tree))}')
    naming.temporaries[evaluate(parse_expression(value), {})] = name
  constants = [f'{name} = {n!r}' for n, name in naming.constants.items()]
  return '\n'.join(constants + assignments)


@dataclasses.dataclass
class _Naming(ast.NodeTransformer):
  """Replaces the numbers of expressions by names.

  Attributes:
    temporaries: the value that a step states to the name of its result.
    constants: any other number to its name, in order of appearance.
  """

  temporaries: dict[int | float, str]
  constants: dict[int | float, str]

  def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
    # A step may have given the negative number itself.
    if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
      if name := self.temporaries.get(-node.operand.value):
        return ast.Name(name)
    return self.generic_visit(node)

  def visit_Constant(self, node: ast.Constant) -> ast.Name:
    if name := self.temporaries.get(node.value):
      return ast.Name(name)
    fresh = f'n{len(self.constants)}'
    return ast.Name(self.constants.setdefault(node.value, fresh))


def _prepare_mathqa(row: Row) -> Prepared:
  problem = row.fields
  row.text('prompt')
  row.text('description')
  lines = row.text('canonical_solution').split('\n')
  # The body of a function: what `body` makes of a program.
  program = '\n'.join(line.removeprefix(INDENTATION) for line in lines[:-2])
  if body(program) != problem['canonical_solution']:
    return Prepared(problem, None, 'other_program')
  pair = {'source': problem_source(problem), 'target': program}
  return Prepared(problem, pair)


def _prepare_gsm8k(row: Row, split: str) -> Prepared:
  question, worked = row.text('question').strip(), row.text('answer')
  gold = _gold_answer(row)
  task_id = f'GSM8K/{split}/{row.number - 1}'
  problem = _numeric_problem(task_id, question, gold)
  program, reason = _checked_program(worked, gold)
  if reason:
    return Prepared(problem, None, reason)
  problem['canonical_solution'] = body(program)
  return Prepared(problem, {'source': question, 'target': program})


def _checked_program(worked: str, gold: float) -> tuple[str, str | None]:
  """The program of a chain, and one word for what is wrong with it, or None.

  - no_chain: no step at all.
  - not_arithmetic: a step that is no arithmetic.
  - other_answer: the program computes another value than the answer, mostly
    because words alone take the last step.
  """
  if not _STEP.search(worked):
    return '', 'no_chain'
  try:
    program = program_of_chain(worked)
    value = compute(program)['answer']
  except NotArithmetic:
    return '', 'not_arithmetic'
  is_right = math.isclose(value, gold, abs_tol=_TOLERANCE)
  return program, None if is_right else 'other_answer'


def _gold_answer(row: Row) -> float:
  """The number after ####."""
  typed = row.text('answer').rpartition('####')[2].strip()
  try:
    gold = float(typed.replace(',', ''))
  except ValueError:
    gold = math.nan
  if '####' not in row.text('answer') or not math.isfinite(gold):
    raise UserError(
        f'expected an answer that ends with #### and a number in {row.place}, '
        f'found {row.text("answer")[-60:]!r}; mend or remove the row'
    )
  return gold


def _prepare_gsm_hard(row: Row, split: str) -> Prepared:
  target = row.field('target', int, float)
  if not math.isfinite(target):
    raise UserError(
        f'expected a finite number as target in {row.place}, found {target}; '
        f'mend or remove the row'
    )
  task_id = f'GSM-hard/{split}/{row.number - 1}'
  problem = _numeric_problem(task_id, row.text('input').strip(), float(target))
  program = row.text('code').strip('\n') + '\nanswer = solution()'
  problem['canonical_solution'] = body(program)
  return Prepared(problem, None, 'problems_alone')


def _numeric_problem(
    task_id: str, description: str, answer: float
) -> dict[str, Any]:
  """A problem as `score` reads them; no docstring, which a text might end."""
  return {
      'task_id': task_id,
      'prompt': _HEADER,
      'entry_point': 'problem',
      'description': description,
      'test': (
          'import math\n\n\ndef check(candidate):\n'
          f'{INDENTATION}assert math.isclose('
          f'candidate(), {answer!r}, abs_tol={_TOLERANCE})\n'
      ),
  }


TASK = MathProgramming
