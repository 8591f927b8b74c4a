"""Stage 2 with and without its parts: the paper's ablation, at small scale.

Trains the tiny model on the pairs of a corpus folder in several settings, with
several seeds, for the same number of steps and pairs, through the gin files of
a real run, and measures on packages that no run saw how well the code of a text
is found among a thousand: mean reciprocal rank (MRR) of the encoder, and of its
first codes after re-ranking by the matching decoder. The paper (table 7) finds
for a 770M model, fine-tuned afterwards, 77.4 with all, 74.8 without matching
and 76.8 without causal LM.

Seen with the defaults after `make pretrain` (1.5 million parameters, 150 steps
of 64 of 32,486 pairs, 50 minutes on two cores), mean of three seeds (range):

| setting            | MRR of the encoder        | re-ranked                 |
|--------------------|---------------------------|---------------------------|
| all losses         | 0.0726 (0.0711 to 0.0735) | 0.0554 (0.0547 to 0.0562) |
| contrastive alone  | 0.0781 (0.0719 to 0.0814) |                           |
| without causal LMs | 0.0721 (0.0625 to 0.0817) | 0.0597 (0.0505 to 0.0648) |
| nothing of stage 1 | 0.0667 (0.0607 to 0.0757) | 0.0516 (0.0431 to 0.0612) |
| all of stage 1     | 0.0172 (0.0090 to 0.0231) | 0.0139 (0.0081 to 0.0174) |
| BM25               | 0.4211                    |                           |
| chance             | 0.0075                    |                           |

So at this size the paper's findings are not to be seen. Contrast needs no other
loss: matching is not learned in so short a time (accuracy 66.7 %, which is that
of always "no"), and ranking by it is ranking by noise. The causal LMs neither
help nor hinder. Of stage 1 the embeddings and the decoder may help to find
codes (in two seeds of three) and do help to write them: the loss of text to
code is 4.58 with them and 6.12 without. Its encoder is of no use here, see
ARCHITECTURE.md. And who only wants to find codes is best served by BM25.

Every run that ends is a line of RESULTS; those that are there are not made
again. Prints the table.

  python benchmarks/stage_2_ablation.py --corpus_dir=runs/corpus \
    --stage_1=runs/pretrain --work_dir=runs/ablation_2
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

ALL = ('contrastive', 'matching', 'text_to_code', 'code_to_text')
# Of each setting: the losses, and what comes from stage 1. Where not all of it
# does, the encoder is drawn, as in the main job (ARCHITECTURE.md tells why).
BUT_ENCODER = 'token_embedder|decoder'
SETTINGS = {
    'all losses': (ALL, BUT_ENCODER),
    'contrastive alone': (ALL[:1], BUT_ENCODER),
    'without causal LMs': (ALL[:2], BUT_ENCODER),
    'nothing of stage 1': (ALL, None),
    'all of stage 1': (ALL, 'token_embedder|encoder|decoder'),
}
COLUMNS = {
    'MRR of the encoder': 'mrr',
    'MRR re-ranked': 'mrr_reranked',
    'matching loss': 'matching_loss',
    'matching accuracy': 'matching_accuracy',
}
# What decides what a run comes to.
ARGUMENTS = ('corpus_dir', 'stage_1', 'steps', 'batch_size', 'learning_rate')


def run(*words: str) -> None:
  subprocess.run([sys.executable, '-m', 'codet5p_jax.main', *words], check=True)


def init_from(stage_1: str, part: str | None) -> str:
  """The setting INIT_FROM."""
  if part is None:
    return 'INIT_FROM=()'
  rest = 'projection|matching_head|temperature'
  if 'encoder' not in part.split('|'):
    rest = f'encoder|{rest}'
  return f'INIT_FROM={[(stage_1, part, None), ("fresh", rest, None)]}'


def measure(options: argparse.Namespace, setting: str, seed: int) -> dict:
  """Makes a run and evaluates it; returns its row."""
  losses, part = SETTINGS[setting]
  name = f'{setting.replace(" ", "_")}_{seed}'
  run_dir = pathlib.Path(options.work_dir) / name
  begin = time.monotonic()
  run(
      'train',
      '--gin_file=models/bimodal_tiny.gin',
      '--gin_file=objectives/stage_2.gin',
      '--gin_file=runs/pretrain.gin',
      f'DATA_DIR={options.corpus_dir}',
      f'RUN_DIR={run_dir}',
      init_from(options.stage_1, part),
      f'LOSSES={losses}',
      f'SEED={seed}',
      f'TRAIN_STEPS={options.steps}',
      f'EVALUATE_EVERY={options.steps}',
      f'CHECKPOINT_EVERY={options.steps}',
      f'BATCH_SIZE={options.batch_size}',
      f'LEARNING_RATE={options.learning_rate}',
      'WARMUP_STEPS=20',
      'DTYPE=float32',
      'REMAT_POLICY=none',
      'TEXT_LENGTH=32',
      'CODE_LENGTH=64',
      'LOSS_TILE_LENGTH=16',
      'QUEUE_SIZE=512',
      'MOMENTUM=0.98',
  )
  seconds = time.monotonic() - begin
  run(
      'evaluate',
      '--gin_file=runs/evaluate.gin',
      f'RUN_DIR={run_dir}',
      'SPLIT=test',
      'POOL_SIZE=1000',
      'RERANK=8',
  )
  values = json.loads((run_dir / 'evaluation/test/metrics.json').read_text())
  return {
      'setting': setting,
      'seed': seed,
      **{name: getattr(options, name) for name in ARGUMENTS},
      'seconds': round(seconds, 1),
      **{
          name.removeprefix('bimodal/'): value
          for name, value in values.items()
          if name.startswith('bimodal/')
      },
  }


def table(rows: list[dict]) -> str:
  """Mean and range over the seeds."""
  lines = [
      f'| setting | {" | ".join(COLUMNS)} |',
      '|---' * (len(COLUMNS) + 1) + '|',
  ]
  for setting in SETTINGS:
    of_setting = [row for row in rows if row['setting'] == setting]
    cells = []
    for name in COLUMNS.values():
      found = [row[name] for row in of_setting if name in row]
      cells.append(
          f'{statistics.mean(found):.4f} ({min(found):.4f} to '
          f'{max(found):.4f})' if found else ''
      )
    if of_setting:
      lines.append(f'| {setting} | {" | ".join(cells)} |')
  for name in ('BM25', 'chance'):
    value = rows[0][f'mrr_{name.lower()}']
    lines.append(f'| {name} | {value:.4f} |' + ' |' * (len(COLUMNS) - 1))
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--corpus_dir', required=True)
  parser.add_argument('--stage_1', required=True)
  parser.add_argument('--work_dir', required=True)
  parser.add_argument(
      '--results', type=pathlib.Path,
      default=pathlib.Path(__file__).with_suffix('.jsonl'),
  )  # fmt: skip
  parser.add_argument('--steps', type=int, default=150)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--learning_rate', type=float, default=1e-3)
  options = parser.parse_args()
  rows = []
  if options.results.exists():
    rows = list(map(json.loads, options.results.read_text().splitlines()))
    # Those of other arguments do not compare.
    rows = [
        row for row in rows
        if all(row[name] == getattr(options, name) for name in ARGUMENTS)
    ]  # fmt: skip
  for seed in range(options.seeds):
    for setting in SETTINGS:
      if any((row['setting'], row['seed']) == (setting, seed) for row in rows):
        continue
      rows.append(measure(options, setting, seed))
      with options.results.open('a') as file:
        file.write(json.dumps(rows[-1]) + '\n')
  print(table(rows))


if __name__ == '__main__':
  main()
