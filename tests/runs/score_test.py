"""Tests of `codet5p score`, through the command line."""

import json
import shutil

import pytest
from codet5p_jax import main
from codet5p_jax.runs import score as score_module

_PROBLEMS = [
    {'task_id': f'T/{i}', 'prompt': f'def f{i}(x):\n', 'entry_point': f'f{i}',
     'test': f'def check(candidate):\n  assert candidate(1) == {i}\n'
             f'  assert candidate(4) == {i + 3}\n'}
    for i in (0, 5)
]  # fmt: skip
_RIGHT, _WRONG = '  return x + {}\n', '  return x * 10\n'


def samples_of(task, number, *bodies):
  return [{'task_id': f'T/{task}', 'completion': body.format(number)}
          for body in bodies]  # fmt: skip


_SAMPLES = [
    *samples_of(0, -1, _RIGHT, _WRONG, '', _RIGHT),
    *samples_of(5, 4, '  while True: pass', '  import os; os._exit(0)', _RIGHT,
                _WRONG),
]  # fmt: skip


@pytest.fixture
def score(tmp_path, capsys, monkeypatch):
  """Runs the command on rows; returns its status, what it wrote and said."""
  monkeypatch.chdir(tmp_path)

  def write(name, rows):
    if rows is not None:
      text = rows if isinstance(rows, str) else '\n'.join(
          map(json.dumps, rows))
      (tmp_path / name).write_text(text)

  def score(metric, *flags, problems=_PROBLEMS, samples=_SAMPLES, tests=None):
    write('problems.jsonl', problems)
    write('samples.jsonl', samples)
    write('tests.jsonl', tests)
    status = main.main([
        'score', metric, '--problems=problems.jsonl',
        '--samples=samples.jsonl', '--output=out/result.json', *flags])
    path = tmp_path / 'out' / 'result.json'
    result = json.loads(path.read_text()) if path.exists() else None
    said = capsys.readouterr()
    if result:
      assert f'pass@1 {result["pass@1"]:.3f}' in said.out
      assert f' {result["totals"]["timed_out"]} timed out' in said.out
    return status, result, said.err

  return score


_ALLOWED = ('--allow_code_execution', '--workers=1')


@pytest.fixture
def bubblewrap():
  if shutil.which('bwrap') is None:
    pytest.skip('needs bubblewrap (Debian package bubblewrap)')


def test_pass_at_k_is_written_with_what_became_of_every_sample(
    score, bubblewrap
):
  status, result, _ = score(
      'pass_at_k', '--k=1,2', '--timeout=2', *_ALLOWED)
  assert status == 0
  # 2 of 4 and 1 of 4 pass.
  assert result['pass@1'] == pytest.approx((0.5 + 0.25) / 2)
  assert result['pass@2'] == pytest.approx((1 - 1 / 6 + 1 - 3 / 6) / 2)
  assert result['totals'] == {
      'passed': 3, 'failed': 3, 'timed_out': 1, 'crashed': 1}
  of_first = result['problems']['T/0']
  assert (of_first['n'], of_first['c']) == (4, 2)
  assert [sample['status'] for sample in of_first['samples']] == [
      'passed', 'failed', 'failed', 'passed']
  of_second = result['problems']['T/5']['samples']
  assert [sample['status'] for sample in of_second] == [
      'timed_out', 'crashed', 'passed', 'failed']
  assert of_second[3]['error'] == 'AssertionError'
  assert of_first['samples'][2]['error'].startswith('IndentationError')
  assert result['format_version'] == 1 and result['metric'] == 'pass_at_k'
  assert result['settings']['k'] == [1, 2]
  assert result['settings']['timeout'] == 2


def test_codet_ranks_solutions_by_the_tests_of_the_model(score, bubblewrap):
  samples = [
      *samples_of(0, -1, _WRONG, _RIGHT, _RIGHT, '  return x * 10 + 0'),
      *samples_of(5, 4, _WRONG, _RIGHT),
  ]  # fmt: skip
  tests = [
      {'task_id': 'T/0', 'completion': 'f0(2) == 1\nassert f0(3) == 2\nassert '
                                       'f0(9) == 8'},
      {'task_id': 'T/0', 'completion': 'f0(2)==1\nassert f0(2) == 20'},
      {'task_id': 'T/5', 'completion': 'f5(1) == 10'},
  ]  # fmt: skip
  status, result, _ = score(
      'codet', '--tests=tests.jsonl', '--k=1,2', '--tests_per_sample=2',
      '--test_timeout=5', *_ALLOWED, samples=samples, tests=tests)  # fmt: skip
  assert status == 0
  of_first = result['problems']['T/0']
  assert of_first['tests'] == [
      'assert f0(2) == 1', 'assert f0(3) == 2', 'assert f0(2) == 20']
  assert [(g['samples'], g['tests']) for g in of_first['groups']] == [
      ([1, 2], [0, 1]), ([0, 3], [2])]
  assert of_first['groups'][0]['score'] == pytest.approx(2 * 2 ** 0.5)
  # Of the second, a wrong test puts the wrong solution first.
  assert [g['samples'] for g in result['problems']['T/5']['groups']] == [
      [0], [1]]
  assert (result['pass@1'], result['pass@2']) == (0.5, 1.0)
  assert result['totals']['passed'] == 3


def test_codet_without_any_test_leaves_all_solutions_in_one_group(
    score, bubblewrap, caplog
):
  status, result, _ = score(
      'codet', '--tests=tests.jsonl', '--k=1', '--timeout=2', *_ALLOWED,
      tests=[{'task_id': 'T/0', 'completion': 'nonsense'}])  # fmt: skip
  assert status == 0
  assert 'No row of tests.jsonl has an assertion about what' in caplog.text
  assert result['pass@1'] == pytest.approx((0.5 + 0.25) / 2)


def test_tasks_without_samples_are_left_out_with_partial(score, bubblewrap):
  flags = ('--k=1', *_ALLOWED)
  few = _SAMPLES[:4]
  status, result, said = score('pass_at_k', *flags, samples=few)
  assert status == 2 and result is None and 'none of T/5' in said
  status, result, _ = score('pass_at_k', '--partial', *flags, samples=few)
  assert status == 0 and result['pass@1'] == 0.5


def test_without_a_sandbox_only_if_spelled_out_and_with_a_warning(
    score, caplog
):
  status, result, _ = score(
      'pass_at_k', '--k=1', '--sandbox=none', *_ALLOWED, '--timeout=5',
      samples=samples_of(0, -1, _RIGHT) + samples_of(5, 4, _RIGHT))
  assert status == 0 and result['pass@1'] == 1.0
  warnings = [r for r in caplog.records if r.levelname == 'WARNING']
  assert [r.message for r in warnings] == [
      'Without a sandbox: what the model wrote runs with all your rights, and '
      'only its time and memory are bounded.']  # fmt: skip


@pytest.mark.parametrize(('flags', 'rows', 'said'), [
    ((), {}, '--allow_code_execution'),
    (('--k=1,5',), {}, 'at least 5 samples of every task for pass@5, found 4'),
    (('--k=0',), {}, 'k to be at least 1'),
    (('--k=()',), {}, 'some k'),
    (('--tests=x',), {}, 'pass_at_k takes no --tests'),
    (('--sandbox=docker',), {}, 'bubblewrap or none'),
    (('--timeout=0',), {}, 'timeout'),
    (('--timeout=86401',), {}, 'at most a day, found 86401'),
    (('--workers=0',), {}, 'workers to be at least 1, found 0'),
    (('--output=.',), {}, 'expected a file to write, found the folder'),
    (('--output=./samples.jsonl',), {}, 'found samples.jsonl for both'),
    (('--output=problems.jsonl/x',), {}, 'problems.jsonl is no folder that'),
    ((), {'samples': '{"task_id": "T/0", "completion": ""}\n{'},
     'JSON in row 2 of samples.jsonl'),
    ((), {'samples': ''}, 'rows in samples.jsonl'),
    ((), {'problems': [*_PROBLEMS, _PROBLEMS[0]]}, 'T/0 in rows 1 and 3'),
    ((), {'samples': [{'task_id': 'T/9', 'completion': ''}]}, 'found T/9'),
    ((), {'samples': [{'prompt_id': 'T/0', 'completion': ''}]},
     'found prompt_id, as `codet5p generate` writes it; make completions'),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(flags, rows, said, score):
  if flags != () or rows:
    flags = (*_ALLOWED, *flags)
  if not any(flag.startswith('--k=') for flag in flags):
    flags = (*flags, '--k=1')
  status, result, error = score('pass_at_k', *flags, **rows)
  assert status == 2 and result is None
  assert said in error and error.count('\n') == 1


@pytest.mark.parametrize(('arguments', 'said'), [
    (['codebleu'], 'expected a metric among pass_at_k, codet, found codebleu'),
    (['pass_at_k'], 'pass_at_k needs --problems'),
    (['codet', '--problems=p', '--samples=s'], 'codet needs --tests'),
    (['pass_at_k', '--problems=p', '--samples=s'], 'pass_at_k needs --output'),
])  # fmt: skip
def test_what_is_missing_is_named(arguments, said, capsys):
  assert main.main(['score', *arguments]) == 2
  assert said in capsys.readouterr().err


def test_an_interrupted_score_says_one_line_and_writes_nothing(
    score, bubblewrap, monkeypatch
):
  def interrupt(*arguments, **fields):
    raise KeyboardInterrupt

  monkeypatch.setattr(score_module, 'tqdm', interrupt)
  status, result, said = score('pass_at_k', '--k=1', *_ALLOWED)
  assert status == 130 and result is None
  assert said == 'codet5p: interrupted\n'
