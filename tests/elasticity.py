"""Changes the machine under a run, and compares it with one left alone.

A run is told to end and goes on with another number of devices or processes,
twice. At each switch a copy of its folder goes on as before. Both must have the
same losses at the next step, up to the order of sums, and nearly the same in
all of the fifty steps that follow: then they see the same examples in the same
order. (Dropout is by place in the batch, so order matters to a loss.)

The last column tells what those differences are worth: by how much a loss
changes from one step to the next of its objective (the median), as it would if
a step had the examples of its neighbour. The learning rate is a tenth of that
of chaos.py: the larger it is, the faster roundings grow in so small a model.

  .venv/bin/python -m tests.elasticity        # five to ten minutes, two cores

Exit status 1 if they differ by more. XLA ends processes with many emulated
devices (status -6, "rendezvous") on a machine that is too busy to run them.
"""

import argparse
import dataclasses
import pathlib
import shutil
import signal
import statistics
import sys
import tempfile
import time

from tqdm import tqdm

from tests import chaos

# (processes, devices of each).
PLANS = {
    '8, 4, 8 devices': ((1, 8), (1, 4), (1, 8)),
    '1, 2, 1 processes': ((1, 4), (2, 2), (1, 4)),
}
FIRST_STOP = 30
STEPS_LATER = 50
LAST = 200
AT_ONCE, LATER = 1e-5, 1e-3

# {step: {objective's loss: value}}.
Losses = dict[int, dict[str, float]]


def losses(run_dir: pathlib.Path) -> Losses:
  """The losses in training."""
  from codet5p_jax.training.run_folder import read_metrics

  return {
      row['step']: {k: v for k, v in row.items() if k.endswith('/loss')}
      for row in read_metrics(run_dir / 'metrics.jsonl')
      if row['kind'] == 'train'
  }


def difference(found: Losses, expected: Losses, step: int) -> float:
  """The largest relative difference of any loss of a step."""
  if found[step].keys() != expected[step].keys():
    return float('inf')
  return max(
      abs(found[step][name] - loss) / abs(loss)
      for name, loss in expected[step].items()
  )


def usual_change(of: Losses, steps: range) -> float:
  """The median relative change of a loss from a step to its next."""
  changes, before = [], {}
  for step in steps:
    for name, loss in of[step].items():
      if name in before:
        changes.append(abs(loss - before[name]) / abs(loss))
    before |= of[step]
  return statistics.median(changes)


def go_on(
    variant: chaos.Variant,
    run_dir: pathlib.Path,
    place: tuple[int, int],
    until: int,
) -> int:
  """Goes on with a run, and tells it to end at a step; returns the last one."""
  processes, devices = place
  run = chaos.Run(
      dataclasses.replace(variant, num_processes=processes), run_dir, devices
  )
  while run.is_alive() and run.steps() < until:
    time.sleep(0.01)
  if run.is_alive():
    run.processes[-1].send_signal(signal.SIGTERM)
  statuses = run.wait(600)
  if set(statuses) != {chaos.PREEMPTED}:
    raise SystemExit(
        f'{run_dir} on {place} (processes, devices), told to end at step '
        f'{until}: statuses {statuses}; {run.last_words()}'
    )
  return max(
      int(path.name)
      for path in (run_dir / 'checkpoints').iterdir()
      if path.name.isdecimal()
  )


def main() -> int:
  argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
  folder = pathlib.Path(tempfile.mkdtemp(prefix='elasticity_'))
  [stage_1] = [
      v for v in chaos.make_variants(folder) if v.name == 'stage 1, 1 process'
  ]
  variant = dataclasses.replace(
      stage_1,
      arguments=(
          *stage_1.arguments, f'TRAIN_STEPS={LAST}', 'LEARNING_RATE=1e-3',
          'CHECKPOINT_EVERY=1000', 'EVALUATE_EVERY=1000',
      ),
  )  # fmt: skip
  rows, failures = [], []
  # A run to begin with, and two from each switch.
  num_runs = sum(2 * len(places) - 1 for places in PLANS.values())
  with tqdm(total=num_runs, unit=' runs', desc='elasticity') as bar:
    for name, places in PLANS.items():
      bar.set_postfix_str(name)
      run_dir = folder / name.replace(', ', '_').replace(' ', '_')
      step = go_on(variant, run_dir, places[0], FIRST_STOP)
      bar.update()
      for before, after in zip(places, places[1:]):
        alone = run_dir.with_name(f'{run_dir.name}_{step}_alone')
        shutil.copytree(run_dir, alone)
        until = step + STEPS_LATER + 1
        go_on(variant, alone, before, until)
        bar.update()
        saved = go_on(variant, run_dir, after, until)
        bar.update()
        expected, found = losses(alone), losses(run_dir)
        at_once = difference(found, expected, step + 1)
        steps = range(step + 1, step + STEPS_LATER + 1)
        later = max(difference(found, expected, s) for s in steps)
        words = f'{before} -> {after}'
        rows.append(
            f'{words:18}{step:6}{at_once:12.1e}{later:12.1e}'
            f'{usual_change(expected, steps):14.1e}'
        )
        if not (at_once <= AT_ONCE and later <= LATER):
          failures.append(
              f'{words} at step {step}: expected {AT_ONCE:g} and {LATER:g} at '
              f'most; compare {run_dir}/metrics.jsonl with {alone}'
          )
        step = saved
  print('\nRelative differences of losses of a run that went on with other')
  print('(processes, devices of each) from its copy that did not:')
  print(
      f'{"switch":18}{"step":>6}{"next step":>12}{"in the 50":>12}'
      f'{"usual change":>14}'
  )
  for row in [*rows, *failures]:
    print(row)
  if not failures:
    shutil.rmtree(folder)
  return 1 if failures else 0


if __name__ == '__main__':
  sys.exit(main())
