"""Scores what a model wrote, by running it."""

import dataclasses
import inspect
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from codet5p_jax.arguments import nearest
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.execution.isolation import BUBBLEWRAP, NONE
from codet5p_jax.execution.problems import (
    Problem,
    read_completions,
    read_executable_problems,
)
from codet5p_jax.execution.sandbox import (
    MOST_SECONDS,
    PASSED,
    STATUSES,
    Outcome,
    Sandbox,
)
from codet5p_jax.metrics import codet, pass_at_k
from codet5p_jax.storage import check_output, local_path
from codet5p_jax.training.run_folder import write_result

_logger = logging.getLogger(__name__)


def score(
    metric: str,
    problems: str | None = None,
    samples: str | None = None,
    tests: str | None = None,
    output: str | None = None,
    k: Sequence[int] | None = None,
    timeout: int | float | None = None,
    test_timeout: int | float | None = None,
    tests_per_sample: int | None = None,
    workers: int | None = None,
    sandbox: str | None = None,
    allow_code_execution: bool = False,
    partial: bool = False,
) -> None:
  """Scores what a model wrote, and writes a JSON file that says all about it.

  Args:
    metric: pass_at_k, or codet (pass@k of the solutions that agree best with
      tests that the model wrote).
    problems: HumanEval's problems or others of that shape (HumanEval-X, MBXP,
      MathQA-Python), or MBPP's; rows of JSON, may be gzipped.
    samples: rows of task_id and completion; what follows the prompt, for MBPP
      whole programs.
    tests: for codet, rows of task_id and completion; what a model wrote after
      `assert `.
    output: the file to write.
    k: of pass@k, by default 1,10,100.
    timeout: seconds for each program with its tests; 3 by default.
    test_timeout: for codet, seconds for each test that a model wrote; 0.1 by
      default.
    tests_per_sample: for codet, how many assertions of each row of `tests`
      count; 5 by default.
    workers: how many programs run at a time; by default one a core.
    sandbox: bubblewrap, or none to run the programs with all your rights.
    allow_code_execution: runs what a model wrote; without it nothing is run.
    partial: whether tasks without samples are left out.

  Raises:
    UserError: a file is not as it should be, execution is not allowed, or a
      sandbox cannot be had. Nothing is written then.
  """
  given = dict(
      problems=problems, samples=samples, tests=tests, output=output, k=k,
      timeout=timeout, test_timeout=test_timeout,
      tests_per_sample=tests_per_sample, workers=workers, sandbox=sandbox,
      allow_code_execution=allow_code_execution or None,
      partial=partial or None)  # fmt: skip
  given = {name: value for name, value in given.items() if value is not None}
  if metric not in METRICS:
    raise UserError(
        f'expected a metric among {", ".join(METRICS)}, found '
        f'{metric}{nearest(metric, METRICS)}'
    )
  parameters = inspect.signature(METRICS[metric]).parameters
  for name in given:
    if name not in {*parameters, 'output'}:
      raise UserError(f'{metric} takes no --{name}; leave it out')
  required = [n for n, p in parameters.items() if p.default is p.empty]
  for name in (*required, 'output'):
    if name not in given:
      raise UserError(f'{metric} needs --{name}; give --{name}=value')
  path = local_path(given.pop('output'))
  check_output(path, problems, samples, tests)
  result = METRICS[metric](**given)
  write_result(path, {'metric': metric, **result})
  shares = [f'{name} {result[name]:.3f}' for name in result if '@' in name]
  counts = [f'{count} {name}' for name, count in result['totals'].items()]
  print(f'{", ".join(shares)}; {", ".join(counts)}'.replace('_', ' '))
  _logger.info('Wrote %s.', path)


def _score_pass_at_k(
    problems: str,
    samples: str,
    k: Sequence[int] = (1, 10, 100),
    timeout: int | float = 3.0,
    workers: int | None = None,
    sandbox: str = BUBBLEWRAP,
    allow_code_execution: bool = False,
    partial: bool = False,
) -> dict[str, Any]:
  """The share of problems of which one of k samples passes."""
  _require_seconds(timeout=timeout)
  known, completions = _read(problems, samples, k, partial)
  with _sandbox(sandbox, workers, allow_code_execution) as box:
    judged = _judge(box, known, completions, timeout)
  accounts = {task: _account(outcomes) for task, outcomes in judged.items()}
  return {
      **{f'pass@{size}': _mean([pass_at_k.pass_at_k(a['n'], a['c'], size)
                                for a in accounts.values()]) for size in k},
      'totals': _totals(judged),
      'settings': {'problems': problems, 'samples': samples, 'k': list(k),
                   'timeout': timeout, 'sandbox': sandbox, 'partial': partial},
      'problems': accounts,
  }  # fmt: skip


def _score_codet(
    problems: str,
    samples: str,
    tests: str,
    k: Sequence[int] = (1, 10, 100),
    timeout: int | float = 3.0,
    test_timeout: int | float = 0.1,
    tests_per_sample: int = 5,
    workers: int | None = None,
    sandbox: str = BUBBLEWRAP,
    allow_code_execution: bool = False,
    partial: bool = False,
) -> dict[str, Any]:
  """pass@k of one solution each of the groups that agree best on tests."""
  require_positive(tests_per_sample=tests_per_sample)
  _require_seconds(timeout=timeout, test_timeout=test_timeout)
  known, completions = _read(problems, samples, k, partial)
  written = read_completions(tests, known, partial=True)
  # The same assertion twice is one test.
  assertions = {
      task: tuple(dict.fromkeys(
          assertion for text in written.get(task, ())
          for assertion in codet.assertions(
              text, known[task].tested, tests_per_sample)))
      for task in completions
  }  # fmt: skip
  if not any(assertions.values()):
    _logger.warning(
        'No row of %s has an assertion about what is tested, so nothing tells '
        'the solutions apart.', tests)
  with _sandbox(sandbox, workers, allow_code_execution) as box:
    judged = _judge(box, known, completions, timeout)
    agreed = _judge(box, known, completions, test_timeout, assertions)
  accounts, ranked = {}, {}
  for task, outcomes in judged.items():
    groups = codet.grouped([
        [number for number, outcome in enumerate(of_solution)
         if outcome.status == PASSED] for of_solution in agreed[task]
    ])  # fmt: skip
    is_right = [outcome.status == PASSED for (outcome,) in outcomes]
    ranked[task] = groups, is_right
    accounts[task] = {
        **_account(outcomes),
        'tests': list(assertions[task]),
        'groups': [{'score': group.score, 'samples': list(group.solutions),
                    'tests': sorted(group.tests)} for group in groups],
    }  # fmt: skip
  return {
      **{f'pass@{size}': _mean([codet.ranked_pass_at_k(*of_task, size)
                                for of_task in ranked.values()])
         for size in k},
      'totals': _totals(judged),
      'settings': {'problems': problems, 'samples': samples, 'tests': tests,
                   'k': list(k), 'timeout': timeout,
                   'test_timeout': test_timeout,
                   'tests_per_sample': tests_per_sample, 'sandbox': sandbox,
                   'partial': partial},
      'problems': accounts,
  }  # fmt: skip


METRICS: dict[str, Callable[..., dict[str, Any]]] = {
    'pass_at_k': _score_pass_at_k,
    'codet': _score_codet,
}


def _require_seconds(**seconds: int | float) -> None:
  for name, value in seconds.items():
    if not 0 < value <= MOST_SECONDS:
      raise UserError(
          f'expected {name} of more than 0 seconds and at most a day, found '
          f'{value}; give another'
      )


def _read(
    problems: str, samples: str, k: Sequence[int], partial: bool
) -> tuple[dict[str, Problem], dict[str, list[str]]]:
  """Reads problems and samples, enough of them for every k.

  Raises:
    UserError: see `score`.
  """
  if not k:
    raise UserError('expected some k, found none; give --k=1,10')
  for size in k:
    require_positive(k=size)
  known = read_executable_problems(problems)
  completions = read_completions(samples, known, partial)
  for task, texts in completions.items():
    if max(k) > len(texts):
      raise UserError(
          f'expected at least {max(k)} samples of every task for '
          f'pass@{max(k)}, found {len(texts)} of {task}; give a smaller --k or '
          f'more samples'
      )
  return known, completions


def _sandbox(kind: str, workers: int | None, is_allowed: bool) -> Sandbox:
  """The sandbox, if programs may be run at all.

  Raises:
    UserError: they may not, or the sandbox cannot be had.
  """
  if not is_allowed:
    raise UserError(
        'expected --allow_code_execution, as this metric runs what a model '
        'wrote, found it missing; add it once you trust the sandbox with that'
    )
  if kind == NONE:
    _logger.warning(
        'Without a sandbox: what the model wrote runs with all your rights, '
        'and only its time and memory are bounded.')
  require_positive(workers=workers)
  return Sandbox(kind, workers or len(os.sched_getaffinity(0)))


def _judge(
    box: Sandbox,
    problems: Mapping[str, Problem],
    completions: Mapping[str, Sequence[str]],
    seconds: int | float,
    tests: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, list[list[Outcome]]]:
  """Runs every completion.

  Args:
    box: where.
    problems: by task.
    completions: by task.
    seconds: for each test.
    tests: by task, instead of the problems' own.

  Returns:
    By task, for each completion the outcome of each test.
  """
  places = [(task, number) for task, texts in completions.items()
            for number in range(len(texts))]  # fmt: skip
  programs = (
      problems[task].program(
          completions[task][number], float(seconds), tests and tests[task])
      for task, number in places
  )  # fmt: skip
  judged = {task: [[]] * len(texts) for task, texts in completions.items()}
  results = tqdm(
      box.run(programs),
      desc='Running programs' if tests is None else 'Running their tests',
      total=len(places), unit='program', disable=None)  # fmt: skip
  for place, outcomes in results:
    task, number = places[place]
    judged[task][number] = outcomes
  return judged


def _account(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
  """What became of the samples of one problem."""
  return {
      'n': len(outcomes),
      'c': sum(outcome.status == PASSED for (outcome,) in outcomes),
      'samples': [dataclasses.asdict(outcome) for (outcome,) in outcomes],
  }


def _totals(
    judged: Mapping[str, Sequence[Sequence[Outcome]]]
) -> dict[str, int]:
  """How many samples had which outcome."""
  counts = Counter(
      outcome.status for outcomes in judged.values() for (outcome,) in outcomes)
  return {status: counts[status] for status in STATUSES}


def _mean(values: Sequence[float]) -> float:
  return math.fsum(values) / len(values)
