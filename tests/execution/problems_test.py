"""Tests of problems as programs, small ones and those of the benchmarks."""

import json
import os
from pathlib import Path

import pytest
from codet5p_jax.errors import UserError
from codet5p_jax.execution.problems import (
    read_completions,
    read_executable_problems,
)
from codet5p_jax.execution.sandbox import PASSED
from codet5p_jax.tasks.problem_files import read_rows

_HUMANEVAL = {
    'task_id': 'HumanEval/0', 'prompt': 'def f(x):\n', 'entry_point': 'f',
    'test': 'def check(candidate):\n  assert candidate(1) == 2\n'}  # fmt: skip
_HUMANEVAL_X = {
    'task_id': 'Python/0', 'prompt': 'def g():\n  return 1\ndef f(x):\n',
    'declaration': 'def g():\n  return 1\ndef f(x):\n',
    'test': 'def check(f):\n  assert f(1) == 2\ncheck(f)'}  # fmt: skip
_MATHQA = {
    'task_id': 'MathQA/0', 'prompt': 'def f(x):\n', 'entry_point': 'f',
    'test': 'candidate = f\nassert candidate(1) == 2\ndef check(x): pass\n'}
_MBPP = {
    'task_id': 7, 'text': 'Add.', 'code': 'class Pair: pass\ndef sum(a): ...',
    'test_list': ['assert sum(1) == 2', 'assert sum(p.x) == 4'],
    'test_setup_code': 'p = Pair()', 'challenge_test_list': []}  # fmt: skip
_SANITIZED = {
    'task_id': 8, 'prompt': 'Add.', 'code': 'def f(x): return x + 1',
    'test_imports': ['import math'],
    'test_list': ['assert f(math.floor(1.5)) == 2']}  # fmt: skip


@pytest.fixture
def write(tmp_path):
  def write(*rows, name='rows.jsonl'):
    path = tmp_path / name
    path.write_text('\n'.join(map(json.dumps, rows)))
    return str(path)

  return write


def data(name):
  folder = os.environ.get('CODET5P_TEST_DATA')
  if not folder:
    pytest.skip('needs the benchmarks: set CODET5P_TEST_DATA')
  return str(Path(folder) / name)


@pytest.mark.parametrize(('row', 'completion'), [
    (_HUMANEVAL, '  return x + 1'), (_HUMANEVAL_X, '  return x + g()'),
    (_MATHQA, '  return x + 1'), (_SANITIZED, 'def f(x): return x + 1'),
    (_MBPP, 'class Pair:\n  x = 3\ndef sum(a): return a + 1'),
], ids=lambda row: str(row['task_id']) if isinstance(row, dict) else '')
def test_every_format_tells_right_from_wrong(row, completion, write, box):
  problems = read_executable_problems(write(row))
  (problem,) = problems.values()
  wrong = completion.replace('+', '-')
  programs = [problem.program(text, 10.0) for text in (completion, wrong, '')]
  outcomes = dict(box.run(programs))
  assert [outcomes[i][0].status == PASSED for i in range(3)] == [
      True, False, False]  # fmt: skip


def test_tests_may_be_others_than_the_problems_own(write):
  (problem,) = read_executable_problems(write(_HUMANEVAL)).values()
  assert problem.program('', 1.0, ('assert f(3) == 4',)).tests == (
      'assert f(3) == 4',)  # fmt: skip


def test_a_check_is_called_once(write):
  rows = [_HUMANEVAL, _HUMANEVAL_X, {**_HUMANEVAL, 'task_id': 2, 'test': 'x('}]
  problems = list(read_executable_problems(write(*rows)).values())
  assert [problem.tests.count('\ncheck(f)') for problem in problems] == [
      1, 1, 1]  # fmt: skip


def test_sources_that_do_not_parse_test_no_names(write):
  rows = [{**_MBPP, 'code': 'def ('},
          {**_MBPP, 'task_id': 8, 'test_list': ['assert (']}]  # fmt: skip
  for problem in read_executable_problems(write(*rows)).values():
    assert problem.tested == ()


@pytest.mark.parametrize(('rows', 'message'), [
    ([{'task_id': 'a', 'test': 'x', 'prompt': ''}], 'field entry_point'),
    ([{'task_id': 'a', 'entry_point': 'f', 'prompt': ''}], 'field test'),
    ([{'task_id': 'a', 'entry_point': 'f', 'test': ''}], 'field prompt'),
    ([{'prompt': ''}], 'field task_id'),
    ([{**_MBPP, 'test_list': 'x'}], 'field test_list'),
    ([{**_MBPP, 'test_list': []}], 'asserts as test_list .* found none'),
    ([{**_MBPP, 'test_list': [1]}], 'list of texts as test_list'),
    ([{**_SANITIZED, 'test_imports': 'import math'}], 'field test_imports'),
    ([{**_MBPP, 'test_setup_code': 3}], 'field test_setup_code'),
    ([{**_MBPP, 'code': None}], 'field code'),
    ([{**_HUMANEVAL, 'entry_point': ''}], "under test in row 1 .*, found ''"),
    ([{**_HUMANEVAL_X, 'declaration': 'x = 1'}], "found 'x = 1'"),
    ([_HUMANEVAL, _MBPP, _HUMANEVAL], 'HumanEval/0 in rows 1 and 3'),
])  # fmt: skip
def test_problems_that_are_none_are_named(rows, message, write):
  with pytest.raises(UserError, match=message):
    read_executable_problems(write(*rows))


def test_completions_are_kept_in_order_and_may_be_empty(write):
  problems = read_executable_problems(write(_HUMANEVAL, _MBPP))
  samples = write(
      {'task_id': '7', 'completion': 'b'}, {'task_id': 7, 'completion': ''},
      {'task_id': 'HumanEval/0', 'completion': 'a', 'log_probability': -1.0},
      name='samples.jsonl')  # fmt: skip
  assert list(read_completions(samples, problems).items()) == [
      ('HumanEval/0', ['a']), ('7', ['b', ''])]


@pytest.mark.parametrize(('rows', 'message'), [
    ([{'task_id': 7, 'completion': ''}], 'found none of HumanEval/0;'),
    ([{'task_id': 9, 'completion': ''}], 'row 1 of .*, found 9;'),
    ([{'task_id': 7, 'completion': None}], 'field completion'),
    ([{'task_id': 7}], 'field completion'),
    ([{'completion': ''}], 'field task_id'),
])  # fmt: skip
def test_samples_that_are_none_are_named(rows, message, write):
  problems = read_executable_problems(write(_HUMANEVAL, _MBPP))
  with pytest.raises(UserError, match=message):
    read_completions(write(*rows, name='samples.jsonl'), problems)


def test_tasks_without_samples_are_left_out_if_that_is_meant(write):
  problems = read_executable_problems(write(_HUMANEVAL, _MBPP))
  samples = write({'task_id': 7, 'completion': 'a'}, name='samples.jsonl')
  assert read_completions(samples, problems, partial=True) == {'7': ['a']}


@pytest.mark.parametrize(('name', 'field', 'step', 'failing'), [
    ('humaneval/HumanEval.jsonl.gz', 'canonical_solution', 1, set()),
    ('humaneval_x/humaneval_python.jsonl.gz', 'canonical_solution', 4, set()),
    # Without the 123rd, which computes for ten seconds.
    ('mbpp/mbpp.jsonl.gz', 'code', 9, {'341', '596', '642'}),
    ('mathqa_python/mathqa-test-python_v1.jsonl.gz', 'canonical_solution', 19,
     None),
])  # fmt: skip
def test_reference_solutions_pass(name, field, step, failing, box):
  path = data(name)
  problems = list(read_executable_problems(path).values())[::step]
  rows = read_rows(path)[::step]
  programs = [problem.program(row.fields[field], 20.0)
              for problem, row in zip(problems, rows)]  # fmt: skip
  failed = {problems[i].task_id: outcomes[0].error
            for i, outcomes in box.run(programs)
            if outcomes[0].status != PASSED}  # fmt: skip
  if failing is None:  # Some import what is not of the standard library.
    assert all('scipy' in error for error in failed.values())
    assert len(failed) < 0.05 * len(problems)
  else:
    assert failed.keys() <= failing


def test_no_empty_completion_passes(box):
  problems = read_executable_problems(data('humaneval/HumanEval.jsonl.gz'))
  programs = [problem.program('', 20.0) for problem in problems.values()]
  assert len(programs) == 164
  assert not any(outcomes[0].status == PASSED
                 for _, outcomes in box.run(programs))  # fmt: skip
