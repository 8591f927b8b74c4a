import json

import pytest

from codet5p_jax import main
from codet5p_jax.errors import UserError
from codet5p_jax.runs.postprocess import postprocess

PROBLEMS = [
    {'task_id': 'H/1', 'prompt': 'def f():\n'},
    {'task_id': 'H/0', 'prompt': 'def g():\n'},
    {'task_id': 'H/2', 'prompt': 'def h():\n'},
]
SAMPLES = [
    {'prompt_id': 'H/0', 'sample': 1, 'completion': '\treturn 1\n\nprint(2)',
     'log_probability': -2.5},
    {'prompt_id': 'H/1', 'sample': 0, 'completion': '', 'step': 7},
    {'prompt_id': 'H/0', 'sample': 0, 'completion': '\tpass  # é\u2028'},
]  # fmt: skip


@pytest.fixture
def files(tmp_path):
  """The arguments of a call that works."""
  paths = {
      'problems': str(tmp_path / 'problems.jsonl'),
      'samples': str(tmp_path / 'raw.jsonl'),
      'output': str(tmp_path / 'new' / 'samples.jsonl'),
  }
  write(paths['problems'], PROBLEMS)
  write(paths['samples'], SAMPLES)
  return paths


def write(path, rows):
  with open(path, 'w') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)


def read(path):
  with open(path) as file:
    return [json.loads(line) for line in file]


def test_every_sample_becomes_a_completion_in_order(files, capsys):
  command = [f'--{name}={path}' for name, path in files.items()]
  assert main.main(['postprocess', '--task=humaneval', *command]) == 0
  assert read(files['output']) == [
      {'task_id': 'H/0', 'sample': 1, 'completion': '    return 1\n',
       'log_probability': -2.5},
      {'task_id': 'H/1', 'sample': 0, 'completion': '', 'step': 7},
      {'task_id': 'H/0', 'sample': 0, 'completion': '    pass  # é\u2028'},
  ]  # fmt: skip
  assert '3 samples of 2 of 3 problems' in capsys.readouterr().out


def test_fields_of_the_task_may_be_set(files):
  flags = [f'--{name}={path}' for name, path in files.items()]
  flags.append("--task_fields={'indent_with_tabs': False, 'stop_strings': []}")
  assert main.main(['postprocess', '--task=humaneval', *flags]) == 0
  assert [row['completion'] for row in read(files['output'])] == [
      row['completion'] for row in SAMPLES
  ]


def test_a_task_id_is_written_as_the_problem_has_it(files):
  problem = {'text': 'Add.', 'test_list': ['assert add(1, 2) == 3']}
  write(files['problems'], [{'task_id': 11, **problem}])
  write(
      files['samples'],
      [{'prompt_id': '11', 'sample': 0, 'completion': 'add = sum\nif x'},
       {'prompt_id': 11, 'sample': 1, 'completion': 'add = max'}],
  )  # fmt: skip
  postprocess('mbpp', **files)
  assert read(files['output']) == [
      {'task_id': 11, 'sample': 0, 'completion': 'add = sum'},
      {'task_id': 11, 'sample': 1, 'completion': 'add = max'},
  ]


@pytest.mark.parametrize(
    ('problems', 'samples', 'expected'),
    [
        (PROBLEMS, [*SAMPLES, {'prompt_id': 'H/9', 'sample': 0,
                               'completion': ''}], 'found H/9 in row 4 of'),
        (PROBLEMS, [*SAMPLES, SAMPLES[1]], 'sample 0 of H/1 in rows 2 and 4'),
        (PROBLEMS, [{'prompt_id': 'H/0', 'sample': 0}], 'the field completion'),
        (PROBLEMS, [{'sample': 0, 'completion': ''}], 'the field prompt_id, a'),
        (PROBLEMS, [{'prompt_id': 'H/0', 'completion': ''}], 'field sample, a'),
        (PROBLEMS, [], 'raw.jsonl, found an empty file'),
        (PROBLEMS * 2, SAMPLES, 'found H/1 in rows 1 and 4'),
        ([], SAMPLES, 'problems.jsonl, found an empty file'),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_writes_nothing(
    files, problems, samples, expected, tmp_path
):
  write(files['problems'], problems)
  write(files['samples'], samples)
  with pytest.raises(UserError, match=expected) as error:
    postprocess('humaneval', **files)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'new').exists()


def test_fields_are_those_of_generation(files):
  told = {'task': {'name': 'humaneval', 'indent_with_tabs': False}}
  rows = [{**row, 'settings': told} for row in SAMPLES]
  write(files['samples'], rows)
  postprocess('humaneval', **files)
  assert read(files['output'])[0]['completion'] == '\treturn 1\n'
  postprocess('humaneval', **files, task_fields={'indent_with_tabs': True})
  assert read(files['output'])[0]['completion'] == '    return 1\n'
  with pytest.raises(UserError, match='of the task mbpp, found humaneval in'):
    postprocess('mbpp', **files)


def test_samples_are_not_replaced_by_what_is_made_of_them(files):
  before = read(files['samples'])
  with pytest.raises(UserError, match='expected another file to write than'):
    postprocess('humaneval', **{**files, 'output': files['samples']})
  assert read(files['samples']) == before


def test_a_row_that_is_no_json_is_named(files):
  with open(files['samples'], 'a') as file:
    file.writelines(['\n'] * 13 + ['{"prompt_id": "H/0", "sam\n'])
  with pytest.raises(UserError, match='expected JSON in row 17 of'):
    postprocess('humaneval', **files)


def test_an_unknown_task_is_one_clear_line(files):
  with pytest.raises(UserError, match='expected a task among humaneval, '):
    postprocess('humanevl', **files)
