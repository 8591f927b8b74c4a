"""Times a prepared corpus on its way to batches, against what training takes.

Reads the batches of a finished run as its training did, on one core: its own
objectives, batch size, vocabulary and corpus. Prints the ratio of their speed
to the steps per second that the run's own metrics tell, and how long a batch
takes at the first step at which all objectives take part, 10,000 steps and 10
million steps later, the corpus opened anew each time: starting late costs
nothing.

  JAX_PLATFORMS=cpu python benchmarks/input_pipeline.py --run_dir=runs/pretrain
"""

import argparse
import itertools
import json
import os
import statistics
import time


def open_batches(run_dir: str):
  """A run's step configuration, and its batches freshly opened."""
  from codet5p_jax.data.vocabularies import load_vocabulary
  from codet5p_jax.sharding import make_mesh
  from codet5p_jax.training.batches import TrainBatches, training_examples
  from codet5p_jax.training.run_folder import read_config, rebuild
  from codet5p_jax.training.train_step import StepConfig, make_train_step

  config = rebuild(read_config(run_dir))
  fields = StepConfig.__dataclass_fields__
  step_config = StepConfig(
      **{name: value for name, value in config.items() if name in fields}
  )
  vocabulary = load_vocabulary(f'{run_dir}/vocabulary')
  train_step = make_train_step(step_config, make_mesh(step_config.mesh_shape))
  examples = {
      o.name: training_examples(
          o, config['data_dir'], vocabulary, step_config.seed
      )
      for o in step_config.objectives
  }
  return step_config, TrainBatches(step_config, train_step, examples)


def seconds_at(run_dir: str, step: int, objective: str) -> tuple[int, float]:
  """The next step that holds an objective alone, and its first batch's time."""
  from codet5p_jax.training.train_step import microbatch_counts

  config, batches = open_batches(run_dir)
  step = next(
      s for s in itertools.count(step)
      if microbatch_counts(config, s).keys() == {objective}
  )  # fmt: skip
  begin = time.perf_counter()
  batches.at(step)
  return step, time.perf_counter() - begin


def consumed_steps_per_second(run_dir: str) -> float:
  """The median over the run's rows of metrics."""
  with open(f'{run_dir}/metrics.jsonl', encoding='utf-8') as file:
    rows = [json.loads(line) for line in file]
  return statistics.median(
      row['steps_per_second'] for row in rows if 'steps_per_second' in row
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--run_dir', required=True)
  parser.add_argument('--steps', type=int, default=200)
  options = parser.parse_args()
  # One core, as beside a training that uses the others.
  os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
  config, batches = open_batches(options.run_dir)
  first = max(objective.first_step for objective in config.objectives)
  for objective in config.objectives:
    for later in (0, 10_000, 10**7):
      times = []
      for _ in range(5):
        step, seconds = seconds_at(
            options.run_dir, first + later, objective.name
        )
        times.append(seconds)
      median = statistics.median(times)
      print(f'{objective.name}, step {step:,}: {median:.4f} s')
  begin = time.perf_counter()
  for step in range(first, first + options.steps):
    batches.at(step)
  made = options.steps / (time.perf_counter() - begin)
  consumed = consumed_steps_per_second(options.run_dir)
  print(
      f'{made:.1f} steps/s of batches on one core; the run took '
      f'{consumed:.2f} steps/s: ratio {made / consumed:.1f}'
  )


if __name__ == '__main__':
  main()
