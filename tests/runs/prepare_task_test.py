import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from codet5p_jax import main
from codet5p_jax.errors import UserError
from codet5p_jax.objectives.sequence_to_sequence import SequenceToSequence
from codet5p_jax.runs.prepare_task import prepare_task
from codet5p_jax.tasks.math_programming import MathProgramming
from codet5p_jax.tasks.problem_files import read_rows

ANSWERS = (
    '<<2*4=8>>8\n#### 8', 'Seven.\n#### 7', '<<2*4=8>>8\n#### 9', 'No.\n#### 0'
)  # fmt: skip
GSM8K = [
    {'question': f'Question {n}?', 'answer': answer}
    for n, answer in enumerate(ANSWERS)
]


@pytest.fixture
def source(tmp_path):
  """A function that writes rows, and returns the path."""

  def write(rows):
    path = tmp_path / 'source.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)

  return write


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_pairs_and_problems_are_written_and_what_is_left_out_is_counted(
    source, tmp_path, capsys
):
  output = tmp_path / 'pairs'
  command = ['prepare_task', '--task=math_programming', '--split=test']
  command += [f'--source={source(GSM8K)}', f'--output={output}']
  assert main.main(command) == 0
  assert capsys.readouterr().out.splitlines() == [
      'test_problems.jsonl: 4 rows',
      'test.jsonl: 1 rows',
      '  no pair, no_chain: 2',
      '  no pair, other_answer: 1',
  ]
  assert names(output) == ['test.jsonl', 'test_problems.jsonl']
  [pair] = SequenceToSequence(9, 9).rows(str(output), 'test', None)
  assert pair == {
      'source': 'Question 0?', 'target': 'n0 = 2\nn1 = 4\nanswer = n0 * n1'
  }  # fmt: skip
  problems = MathProgramming().read_problems(
      str(output / 'test_problems.jsonl')
  )
  task_ids = [problem['task_id'] for problem in problems]
  assert task_ids == [f'GSM8K/test/{n}' for n in range(4)]


def test_a_share_of_the_rows_is_kept_for_validation(source, tmp_path):
  rows = [
      {'question': f'{n}?', 'answer': f'<<{n}=1>>\n#### {n}'}
      for n in range(400)
  ]
  found = {}
  for name, given in (('a', rows), ('b', rows[::-1])):
    output = tmp_path / name
    prepare_task('math_programming', source(given), str(output), 'train', 0.25)
    assert names(output) == [
        'train.jsonl', 'train_problems.jsonl', 'validation.jsonl',
        'validation_problems.jsonl',
    ]  # fmt: skip
    objective = SequenceToSequence(9, 9)
    found[name] = [
        {pair['source'] for pair in objective.rows(str(output), split, None)}
        for split in ('train', 'validation')
    ]
  assert found['a'] == found['b']
  train, validation = found['a']
  assert not train & validation
  assert len(train | validation) == 400
  assert 70 <= len(validation) <= 130


def test_splits_of_one_file_go_to_one_folder(source, tmp_path):
  rows = [
      {'text': 'A', 'code': f'a = {n}', 'task_id': n, 'test_list': ['assert a']}
      for n in (1, 11, 601, 602, 511)
  ]
  for split in ('train', 'validation', 'test'):
    prepare_task('mbpp', source(rows), str(tmp_path / 'mbpp'), split)
  counts = {
      split: len(read_rows(str(tmp_path / 'mbpp' / f'{split}.jsonl')))
      for split in ('train', 'validation', 'test')
  }
  assert counts == {'train': 2, 'validation': 1, 'test': 1}


def test_fields_of_the_task_may_be_set(source, tmp_path):
  row = {'text': 'A', 'code': 'if a:\n    b', 'task_id': 11, 'test_list': []}
  fields = {'indent_with_tabs': False}
  prepare_task(
      'mbpp', source([row]), str(tmp_path), 'test', task_fields=fields
  )
  [pair] = read_rows(str(tmp_path / 'test.jsonl'))
  assert pair.text('target') == 'if a:\n    b'


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({'task': 'humaneval'}, 'something to prepare, found humaneval; give'),
        ({'task': 'gsm8k'}, 'a task among humaneval, math_programming, mbpp'),
        ({'split': 'dev'}, 'among train, validation, test, found dev; set'),
        ({'validation_share': 1.0}, 'below 1, .* found 1.0 of train'),
        ({'validation_share': -0.1}, 'found -0.1 of train'),
        ({'validation_share': 0.1, 'split': 'test'}, 'found 0.1 of test'),
        ({'task': 'mbpp'}, 'the field task_id, a whole number, in row 1'),
        ({'source': '/nowhere'}, 'rows in /nowhere, found: No such file'),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    source, tmp_path, changes, expected
):
  given = {
      'task': 'math_programming', 'source': source(GSM8K),
      'output': str(tmp_path / 'new'),
  }  # fmt: skip
  with pytest.raises(UserError, match=expected) as error:
    prepare_task(**given | changes)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'new').exists()


def test_a_file_without_rows_of_the_split_is_one_clear_line(source, tmp_path):
  rows = source([{'task_id': 2}])
  with pytest.raises(UserError, match='or a problem in .*, found none; check'):
    prepare_task('mbpp', rows, str(tmp_path / 'new'), 'test')
  assert not (tmp_path / 'new').exists()


def test_a_bad_row_at_the_end_writes_nothing(source, tmp_path):
  rows = source([*GSM8K, {'question': 'How?', 'answer': '8'}])
  with pytest.raises(UserError, match='a number in row 5 of'):
    prepare_task('math_programming', rows, str(tmp_path / 'new'))
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
    ('split', 'problems', 'pairs', 'reasons'),
    [
        ('train', 7473, 6999,
         ['other_answer: 377', 'no_chain: 95', 'not_arithmetic: 2']),
        ('test', 1319, 1208, ['other_answer: 93', 'no_chain: 18']),
    ],
)  # fmt: skip
def test_the_yield_of_gsm8k(split, problems, pairs, reasons, tmp_path):
  if not (data := os.environ.get('CODET5P_TEST_DATA')):
    pytest.skip('CODET5P_TEST_DATA names no folder with GSM8K')
  path = pathlib.Path(data, 'gsm8k', f'{split}.jsonl.gz')
  # In a process of its own, where types are not checked: ten times as fast.
  printed = subprocess.check_output(
      [sys.executable, '-m', 'codet5p_jax.main', 'prepare_task',
       '--task=math_programming', f'--split={split}', f'--source={path}',
       f'--output={tmp_path}'], text=True,
  )  # fmt: skip
  assert printed.splitlines() == [
      f'{split}_problems.jsonl: {problems:,} rows',
      f'{split}.jsonl: {pairs:,} rows',
      *(f'  no pair, {reason}' for reason in reasons),
  ]
  gold = {
      row.text('question').strip(): row.text('answer').split('####')[1]
      for row in read_rows(str(path))
  }
  line = r'(n\d+ = [\d.e+-]+\n)*(t\d+ = {0}\n)*answer = {0}'
  line = line.format(r'[-nt\d +*/()]+')
  for row in read_rows(str(tmp_path / f'{split}.jsonl')):
    program = row.text('target')
    assert re.fullmatch(line, program)
    names = {}
    exec(program, names)  # Python's own arithmetic, and nothing else in it.
    expected = float(gold[row.text('source')].replace(',', ''))
    assert math.isclose(names['answer'], expected, abs_tol=1e-4)
  asked = MathProgramming().read_problems(
      str(tmp_path / f'{split}_problems.jsonl')
  )
  assert len({p['description'] for p in asked}) == len(gold)
