"""Stage 1 with and without its causal-LM objectives: the paper's ablation.

Pretrains the tiny model on a corpus folder twice for each seed, once with span
denoising alone and once with all three objectives, for the same number of steps
and rows a step, through the gin files of a real run. Along the way both are
evaluated on the same held-out rows: how well do they complete code, given
nothing (causal_lm) or a prefix (seq2seq_causal_lm), and how well do they fill
gaps? The paper (table 7) fine-tunes a 770M model afterwards and finds line
completion and program synthesis much worse without.

Seen with the defaults over the standard library and the installed packages
(Python, 6.3 million tokens), three seeds, nats a token, mean (range):

| validation loss   | denoising alone        | all three              | unigram|
|-------------------|------------------------|------------------------|--------|
| causal_lm         | 6.402 (6.292 to 6.568) | 5.372 (5.340 to 5.406) | 5.937  |
| seq2seq_causal_lm | 6.512 (6.404 to 6.665) | 5.482 (5.459 to 5.517) | 5.891  |
| span_denoising    | 6.018 (5.956 to 6.081) | 5.596 (5.548 to 5.649) | 5.512  |

Writes curves.png and table.md beside the runs, and prints the table. A run that
is there is not made again.

  python benchmarks/causal_lm_ablation.py --corpus_dir=runs/corpus \
    --work_dir=runs/ablation
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

LENGTHS = (
    'DENOISING_SOURCE_LENGTH=128',
    'DENOISING_TARGET_LENGTH=48',
    'DENOISING_BATCH_SCALE=1',
    'SEQ2SEQ_ROW_LENGTH=130',
    'SEQ2SEQ_SOURCE_LENGTH=128',
    'SEQ2SEQ_TARGET_LENGTH=128',
    'CAUSAL_LM_TARGET_LENGTH=128',
)
# The step from which on the causal-LM objectives take part.
SETTINGS = {'denoising alone': None, 'all three': 0}
OBJECTIVES = ('causal_lm', 'seq2seq_causal_lm', 'span_denoising')


def train(options: argparse.Namespace, setting: str, seed: int) -> list[dict]:
  """Makes a run; returns its evaluations."""
  name = f'{setting.replace(" ", "_")}_{seed}'
  run_dir = pathlib.Path(options.work_dir) / name
  first_step = SETTINGS[setting]
  # Objectives that never begin are evaluated all the same.
  first_step = options.steps if first_step is None else first_step
  subprocess.run(
      [
          sys.executable, '-m', 'codet5p_jax.main', 'train',
          '--gin_file=models/tiny.gin',
          '--gin_file=objectives/stage_1.gin',
          '--gin_file=runs/pretrain.gin',
          f'DATA_DIR={options.corpus_dir}',
          f'RUN_DIR={run_dir}',
          f'SEED={seed}',
          f'TRAIN_STEPS={options.steps}',
          f'CAUSAL_LM_FIRST_STEP={first_step}',
          f'EVALUATE_EVERY={max(options.steps // 6, 1)}',
          f'CHECKPOINT_EVERY={options.steps}',
          f'BATCH_SIZE={options.batch_size}',
          f'LEARNING_RATE={options.learning_rate}',
          f'WARMUP_STEPS={max(options.steps // 10, 1)}',
          'DTYPE=float32',
          'REMAT_POLICY=none',
          *LENGTHS,
      ],
      check=True,
  )  # fmt: skip
  rows = map(json.loads, (run_dir / 'metrics.jsonl').read_text().splitlines())
  return [row for row in rows if row['kind'] == 'evaluation']


def table(results: dict[str, list[list[dict]]]) -> str:
  """Final validation losses in nats a token: mean and range over the seeds."""
  lines = [
      '| validation loss | ' + ' | '.join(results) + ' | unigram entropy |',
      '|---|' + '---|' * (len(results) + 1),
  ]
  for objective in OBJECTIVES:
    cells = []
    for runs in results.values():
      losses = [run[-1][f'{objective}/loss'] for run in runs]
      cells.append(
          f'{statistics.mean(losses):.3f} ({min(losses):.3f} to '
          f'{max(losses):.3f})'
      )
    last = next(iter(results.values()))[0][-1]
    entropy = last[f'{objective}/unigram_entropy']
    lines.append(f'| {objective} | {" | ".join(cells)} | {entropy:.3f} |')
  return '\n'.join(lines)


def draw(results: dict[str, list[list[dict]]], path: pathlib.Path) -> None:
  """Draws a panel for each objective, a line for each run."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(
      1, len(OBJECTIVES), figsize=(12, 4), layout='constrained'
  )
  for axis, objective in zip(axes, OBJECTIVES, strict=True):
    for number, (setting, runs) in enumerate(results.items()):
      for index, run in enumerate(runs):
        axis.plot(
            [row['step'] for row in run],
            [row[f'{objective}/loss'] for row in run],
            color=f'C{number}',
            label=None if index else setting,
        )
    axis.set(title=objective, xlabel='step', ylabel='validation loss (nats)')
    axis.legend()
  figure.savefig(path, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--corpus_dir', required=True)
  parser.add_argument('--work_dir', required=True)
  parser.add_argument('--steps', type=int, default=600)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--learning_rate', type=float, default=6e-3)
  options = parser.parse_args()
  results = {
      setting: [train(options, setting, seed) for seed in range(options.seeds)]
      for setting in SETTINGS
  }
  folder = pathlib.Path(options.work_dir)
  text = table(results)
  (folder / 'table.md').write_text(f'{text}\n')
  draw(results, folder / 'curves.png')
  print(
      f'{options.steps} steps of {options.batch_size} rows, {options.seeds} '
      f'seeds; nats a token, mean (range):\n{text}'
  )


if __name__ == '__main__':
  main()
