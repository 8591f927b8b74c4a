"""Times a prepared corpus on its way to batches, against what training takes.

Reads the batches of a finished run as its training did, on one core: its own
objectives, batch size, vocabulary and corpus. Prints the ratio of their speed
to the steps per second that the run's own metrics tell, and the time of the
first batch at steps 0, 10,000 and 10 million: starting late costs nothing.

  JAX_PLATFORMS=cpu python benchmarks/input_pipeline.py --run_dir=runs/pretrain
"""

import argparse
import json
import os
import statistics
import time


def open_batches(run_dir: str):
  """The batches of a run, freshly opened."""
  from codet5p_jax.sharding import make_mesh
  from codet5p_jax.training.batches import TrainBatches, training_examples
  from codet5p_jax.training.run_folder import rebuild, read_config
  from codet5p_jax.training.train_step import StepConfig, make_train_step
  from codet5p_jax.data.vocabularies import load_vocabulary

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
  return TrainBatches(step_config, train_step, examples)


def seconds_to_first_batch(run_dir: str, step: int) -> float:
  batches = open_batches(run_dir)
  begin = time.perf_counter()
  batches.at(step)
  return time.perf_counter() - begin


def consumed_steps_per_second(run_dir: str) -> float:
  """The median over the run's rows of metrics."""
  with open(f'{run_dir}/metrics.jsonl', encoding='utf-8') as file:
    rows = [json.loads(line) for line in file]
  return statistics.median(
      row['steps_per_second'] for row in rows if row['kind'] == 'train'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--run_dir', required=True)
  parser.add_argument('--steps', type=int, default=200)
  options = parser.parse_args()
  # One core, as beside a training that uses the others.
  os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
  consumed = consumed_steps_per_second(options.run_dir)
  for step in (0, 10_000, 10**7):
    times = [seconds_to_first_batch(options.run_dir, step) for _ in range(5)]
    print(f'first batch at step {step:,}: {statistics.median(times):.4f} s')
  batches = open_batches(options.run_dir)
  begin, tokens = time.perf_counter(), 0
  for step in range(options.steps):
    for batch in batches.at(step).values():
      tokens += int(batch['decoder_loss_weights'].sum())
  seconds = time.perf_counter() - begin
  made = options.steps / seconds
  print(
      f'{made:.1f} steps/s of batches, {tokens / seconds:,.0f} target tokens/s; '
      f'the run took {consumed:.2f} steps/s: ratio {made / consumed:.1f}'
  )


if __name__ == '__main__':
  main()
