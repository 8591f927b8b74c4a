import json
import os
import pathlib

import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.tasks.mbpp import MBPP
from codet5p_jax.tasks.problem_files import Row

ASSERTS = ['assert add(1, 2) == 3', 'assert add(2, 2) == 4\n']
PROBLEM = {
    'text': 'Add two numbers.',
    'code': 'def add(a, b):\r\n    return a + b\r\n',
    'task_id': 601,
    'test_list': ASSERTS,
}
DOCSTRING = (
    '"""\nAdd two numbers.\nassert add(1, 2) == 3\nassert add(2, 2) == 4\n"""\n'
)


def examples_file(tmp_path, task_ids):
  """A file of solved problems, numbered by their constants."""
  path = tmp_path / 'mbpp.jsonl'
  rows = [
      {
          'text': f'Return {n}.',
          'code': f'def f():\r\n    return {n}',
          'task_id': n,
          'test_list': [f'assert f() == {n}'],
      }
      for n in task_ids
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def test_a_prompt_is_a_docstring_of_task_and_asserts():
  prompt = MBPP().prompt(PROBLEM)
  assert prompt.prompt_id == '601'
  assert (prompt.encoder_text, prompt.decoder_text) == (DOCSTRING, None)
  sanitized = {
      'prompt': 'Add two numbers.', 'task_id': 601, 'test_list': ASSERTS
  }  # fmt: skip
  assert MBPP().prompt(sanitized) == prompt


@pytest.mark.parametrize(('num_asserts', 'shown'), [(0, 0), (1, 1), (9, 2)])
def test_as_many_asserts_are_shown_as_are_asked_for(num_asserts, shown):
  text = MBPP(num_asserts=num_asserts).prompt(PROBLEM).encoder_text
  assert text.count('assert') == shown


def test_examples_begin_with_the_second_problem_and_come_solved(tmp_path):
  path = examples_file(tmp_path, range(1, 12))
  text = MBPP(path, num_examples=2).prompt(PROBLEM).encoder_text
  assert text == (
      '"""\nReturn 2.\nassert f() == 2\n"""\ndef f():\n\treturn 2\n\n'
      '"""\nReturn 3.\nassert f() == 3\n"""\ndef f():\n\treturn 3\n\n'
  ) + DOCSTRING
  assert MBPP(path).prompt(PROBLEM).encoder_text == DOCSTRING
  ten = MBPP(path, num_examples=10, indent_with_tabs=False).prompt(PROBLEM)
  numbers = [2, 3, 4, 5, 6, 7, 8, 9, 10, 1]
  places = [ten.encoder_text.index(f'\n    return {n}\n') for n in numbers]
  assert places == sorted(places)
  assert 'return 11' not in ten.encoder_text


def test_a_completion_is_a_whole_program():
  text = 'import re\ndef g():\n\tif 1:\n\t\tpass\ndef f(): pass\n"""\nNext'
  assert MBPP().completion(PROBLEM, text) == (
      'import re\ndef g():\n    if 1:\n        pass\ndef f(): pass'
  )
  spaces = MBPP(indent_with_tabs=False, stop_strings=('X',))
  assert spaces.completion(PROBLEM, '\ta\nassert bX') == '\ta\nassert b'


@pytest.mark.parametrize(
    ('task_id', 'split'),
    [(601, 'train'), (974, 'train'), (511, 'validation'), (600, 'validation'),
     (11, 'test'), (510, 'test')],
)  # fmt: skip
def test_a_row_gives_problem_and_pair_in_its_split_alone(task_id, split):
  row = Row(1, 'mbpp.jsonl', PROBLEM | {'task_id': task_id})
  for other in ('train', 'validation', 'test'):
    prepared = MBPP().prepare(row, other)
    assert (prepared is not None) == (other == split)
  prepared = MBPP().prepare(row, split)
  assert prepared.problem == row.fields
  assert prepared.pair == {
      'source': DOCSTRING, 'target': 'def add(a, b):\n\treturn a + b'
  }  # fmt: skip


def test_examples_are_in_no_split():
  for task_id in (1, 10, 975):
    row = Row(1, 'mbpp.jsonl', PROBLEM | {'task_id': task_id})
    assert MBPP().prepare(row, 'test') is MBPP().prepare(row, 'train') is None


def test_pairs_may_be_indented_with_spaces():
  pair = MBPP(indent_with_tabs=False).prepare(
      Row(1, 'mbpp.jsonl', PROBLEM), 'train'
  ).pair  # fmt: skip
  assert pair['target'] == 'def add(a, b):\n    return a + b'


def test_all_problems_are_read_the_sanitized_too():
  if not (data := os.environ.get('CODET5P_TEST_DATA')):
    pytest.skip('CODET5P_TEST_DATA names no folder with MBPP')
  whole = pathlib.Path(data, 'mbpp', 'mbpp.jsonl.gz')
  sanitized = pathlib.Path(data, 'mbpp', 'sanitized-mbpp.json.gz')
  task = MBPP(str(whole), num_examples=3)
  for path, count in ((whole, 974), (sanitized, 427)):
    problems = task.read_problems(str(path))
    assert len(problems) == count
    for problem in problems:
      text = task.prompt(problem).encoder_text
      assert text.count('"""') == 8
      # Some have tabs, others four spaces in their texts.
      shown = text.replace('\t', ' ' * 4)
      for line in problem['test_list']:
        assert line.strip().replace('\t', ' ' * 4) in shown
      assert '\r' not in text


@pytest.mark.parametrize(
    ('fields', 'expected'),
    [
        ({'num_examples': 11, 'examples': 'x'}, '0 to 10, .* found 11 of x'),
        ({'num_examples': 1}, 'a file of examples if any, found 1 of None'),
        ({'num_asserts': -1}, 'num_asserts of 0 or more, found -1'),
        ({'stop_strings': ('',)}, 'at least one character'),
    ],
)
def test_fields_that_make_no_sense_are_one_clear_line(fields, expected):
  with pytest.raises(UserError, match=expected) as error:
    MBPP(**fields)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({'text': 3}, r'the field text, a text, in row 1 of .*text = 3'),
        ({'test_list': 'assert'}, 'the field test_list, a list'),
        ({'test_list': ['a', 2]}, "texts as test_list in row 1 .*'a', 2"),
    ],
)
def test_a_row_that_is_no_problem_is_one_clear_line(
    tmp_path, changes, expected
):
  path = tmp_path / 'mbpp.json'
  path.write_text(json.dumps([PROBLEM | changes]))
  with pytest.raises(UserError, match=expected) as error:
    MBPP().read_problems(str(path))
  assert '\n' not in str(error.value)


def test_a_split_or_an_example_that_is_not_there_is_one_clear_line(tmp_path):
  with pytest.raises(UserError, match='among train, validation, test, found x'):
    MBPP().prepare(Row(1, 'mbpp.jsonl', PROBLEM), 'x')
  task = MBPP(examples_file(tmp_path, (2, 4)), num_examples=3)
  with pytest.raises(UserError, match='problem 3 of MBPP, the next example'):
    task.prompt(PROBLEM)
