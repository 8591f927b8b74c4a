"""Ends training runs at random moments, and compares what they come to.

A run that is never disturbed and one that is killed again and again must have
the same losses and, at the end, the same bits in every array of the last
checkpoint: parameters, optimizer and objective state. Runs are real ones of
`codet5p train`, of a tiny model, each in processes of their own.

Most kills end all processes of a run, as a cluster does once one is gone. Some
end one alone: the other must end by itself within `SURVIVOR_SECONDS`, since
its launcher cannot bring both together again before. After SIGTERM to one, all
must be saved within `NOTICE_SECONDS`, and a notice that is lost is a failure.

  .venv/bin/python -m tests.chaos --kills=100    # all, about half an hour
  .venv/bin/python -m tests.chaos --seconds=300  # as much as fits

Exit status 1 if a run ended in another way or too late, did not go on, or came
to something else; and if there is a kind of run that was never ended.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tqdm import tqdm

STEPS = 40
# What is about time or place differs from run to run.
ABOUT_TIME = (
    'input_wait_seconds',
    'train_seconds',
    'steps_per_second',
    'target_tokens_per_second',
    'mfu',
)
PREEMPTED = 75
# Clouds pull the plug so long after SIGTERM.
NOTICE_SECONDS = 30.0
# JAX takes 100 s to miss a process, and ours 25 s to take leave of it.
SURVIVOR_SECONDS = 150.0
# With which a process ends that another left: JAX aborts it, or it was waiting
# for the other, or stands still until its watchdog ends it.
SURVIVED = (-signal.SIGABRT, 1, 70)
# A run that has more steps to go than these cannot end before it is noticed.
STEPS_TO_NOTICE = 20
# Of the kills of several processes, one in so many is of one alone: the other
# takes long to notice.
ALONE_EVERY = 8
# Compiling takes most of the time, and how fast the steps are matters little.
XLA_FLAGS = (
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
)
CODEGEN = {
    'encoder': {'emb_dim': 8, 'num_layers': 2, 'head_dim': 2, 'mlp_dim': 20},
    'decoder': {'emb_dim': 24, 'num_layers': 3, 'head_dim': 6, 'mlp_dim': 28},
}
CODEGEN_SHARED = {'vocab_size': 600, 'num_heads': 4, 'rotary_dim': 2}
SPECIAL = {'pad_id': 0, 'eos_id': 2, 'decoder_start_id': 0}


@dataclasses.dataclass(frozen=True)
class Variant:
  """A kind of run.

  Attributes:
    name: for the table.
    arguments: of `codet5p train`.
    num_processes: of each run.
  """

  name: str
  arguments: tuple[str, ...]
  num_processes: int


@dataclasses.dataclass
class Tally:
  """What happened to the runs of a variant."""

  started: int = 0
  ended: int = 0
  in_start: int = 0
  in_save: int = 0
  alone: int = 0
  failures: list[str] = dataclasses.field(default_factory=list)
  compared: int = 0
  slowest_end: float = 0.0


class Run:
  """The processes of one start of a run; owns them."""

  def __init__(self, variant: Variant, run_dir: pathlib.Path, devices: int = 1):
    """Starts the processes.

    Args:
      variant: what to train.
      run_dir: of the run.
      devices: of each process, emulated.
    """
    self.run_dir = run_dir
    self.began = time.monotonic()
    self.began_at = time.time()
    self.log = run_dir.with_name(f'{run_dir.name}.log')
    port = free_port()
    self.processes = []
    for index in range(variant.num_processes):
      words = ['train', *variant.arguments, f'RUN_DIR={run_dir}']
      if variant.num_processes > 1:
        words += [
            f'--coordinator_address=localhost:{port}',
            f'--num_processes={variant.num_processes}',
            f'--process_id={index}',
        ]
      with open(self.log, 'ab') as log:
        self.processes.append(
            subprocess.Popen(
                [sys.executable, '-m', 'codet5p_jax.main', *words],
                env=environment(devices),
                stdout=log,
                stderr=log,
            )
        )

  def is_alive(self) -> bool:
    return any(process.poll() is None for process in self.processes)

  def steps(self) -> int:
    """The newest step in the metrics; 0 before the first."""
    path = self.run_dir / 'metrics.jsonl'
    if not path.exists():
      return 0
    last = path.read_bytes()[-2000:].rpartition(b'\n')[0].split(b'\n')[-1]
    try:
      return json.loads(last)['step']
    except ValueError:
      return 0

  def has_trained(self) -> bool:
    """Whether a step was made since this start."""
    path = self.run_dir / 'timeline.jsonl'
    if not path.exists():
      return False
    # The first process writes it.
    session = path.read_bytes().rpartition(b'{"kind": "start"')[2]
    its_own = f'"pid": {self.processes[0].pid},'.encode()
    return its_own in session and b'{"kind": "progress"' in session

  def is_saving(self) -> bool:
    """Whether a checkpoint of this start is unfinished."""
    # Others may lie there still, from a save that was killed before.
    for path in (self.run_dir / 'checkpoints').glob('*.orbax-checkpoint-tmp*'):
      with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ctime > self.began_at:
          return True
    return False

  def end(
      self, chance: random.Random, kind: signal.Signals, alone: bool
  ) -> None:
    """Sends a signal to one process, and kills the others too unless `alone`.

    Those that get SIGTERM tell the others.
    """
    processes = list(self.processes)
    chance.shuffle(processes)
    processes[0].send_signal(kind)
    if kind == signal.SIGKILL and not alone:
      for process in processes[1:]:
        time.sleep(chance.uniform(0, 0.5))
        process.kill()

  def wait(self, seconds: float = 400.0) -> list[int | None]:
    """Exit statuses; None of a process that had to be killed."""
    deadline = time.monotonic() + seconds
    statuses = []
    for process in self.processes:
      try:
        left = max(deadline - time.monotonic(), 0.1)
        statuses.append(process.wait(left))
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        statuses.append(None)
    return statuses

  def last_words(self) -> str:
    text = self.log.read_text(errors='replace').replace('\r', '\n')
    lines = [
        line
        for line in text.split('\n')
        if line.strip(' -')
        and '%|' not in line
        and not line.startswith('For simplicity, JAX has removed')
    ]
    return lines[-1][:300] if lines else '(nothing)'


def environment(devices: int = 1) -> dict[str, str]:
  """Of a process with so many emulated devices."""
  flags = (*XLA_FLAGS, f'--xla_force_host_platform_device_count={devices}')
  return os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join(flags)}


def free_port() -> int:
  with socket.socket() as place:
    place.bind(('localhost', 0))
    return place.getsockname()[1]


def codet5p(*words: object) -> None:
  """Runs a command to its end; ends this program if it fails."""
  ended = subprocess.run(
      [sys.executable, '-m', 'codet5p_jax.main', *map(str, words)],
      env=environment(),
      capture_output=True,
      text=True,
  )
  if ended.returncode:
    raise SystemExit(f'{words[0]} failed:\n{ended.stderr[-2000:]}')


def make_variants(folder: pathlib.Path) -> list[Variant]:
  """Makes corpora and frozen sources; returns what to train with them."""
  numbers = random.Random(0)
  names = ('alpha', 'beta', 'gamma', 'delta', 'epsilon', 'zeta', 'eta', 'theta')
  rows, pairs = [], []
  for origin in range(12):
    text = ''
    for index in range(12):
      a, b, c = numbers.sample(names, 3)
      head = f'def {a}_{index}({b}, {c}=None):\n'
      body = f'  return {b}[{index}] * {c} + {numbers.randrange(99)}\n\n\n'
      text += head + f'  """Makes {a} of {b} and {c}."""\n  {c} += {b}\n' + body
      pairs.append({'source': head, 'target': body})
    rows.append({'text': text, 'origin': f'package-{origin}', 'path': 'a.py',
                 'language': 'python', 'licence': 'mit'})  # fmt: skip
  write_rows(folder / 'rows.jsonl', rows)
  (folder / 'pairs').mkdir()
  write_rows(folder / 'pairs/train.jsonl', pairs[:-16])
  write_rows(folder / 'pairs/validation.jsonl', pairs[-16:])
  codet5p(
      'prepare_corpus',
      f'--sources={folder}/rows.jsonl',
      f'--corpus_dir={folder}/corpus',
      '--vocab_size=600',
      '--pairs',
  )
  shared = (
      f'TRAIN_STEPS={STEPS}',
      'BATCH_SIZE=8',
      'WARMUP_STEPS=2',
      'LEARNING_RATE=1e-2',
      'DTYPE=float32',
      'REMAT_POLICY=none',
      'LOG_EVERY=1',
      'EVALUATE_EVERY=7',
      'CHECKPOINT_EVERY=3',
      'DROPOUT_RATE=0.1',
      '--gin.train.evaluation_batch_count=2',
  )
  sizes = {
      'vocab_size': 600, 'emb_dim': 16, 'num_heads': 2, 'head_dim': 5,
      'mlp_dim': 18, 'num_encoder_layers': 1, 'num_decoder_layers': 2,
  }  # fmt: skip
  stage_1 = (
      '--gin_file=models/tiny.gin',
      '--gin_file=objectives/stage_1.gin',
      '--gin_file=runs/pretrain.gin',
      *(f'--gin.T5Config.{name}={size}' for name, size in sizes.items()),
      f'DATA_DIR={folder}/corpus',
      'CAUSAL_LM_FIRST_STEP=5',
      'DENOISING_SOURCE_LENGTH=32',
      'DENOISING_TARGET_LENGTH=14',
      'SEQ2SEQ_ROW_LENGTH=20',
      'SEQ2SEQ_SOURCE_LENGTH=21',
      'SEQ2SEQ_TARGET_LENGTH=22',
      'CAUSAL_LM_TARGET_LENGTH=16',
      'LOSS_TILE_LENGTH=8',
      *shared,
  )
  stage_2 = (
      '--gin_file=models/bimodal_tiny.gin',
      '--gin_file=objectives/stage_2.gin',
      '--gin_file=runs/pretrain.gin',
      *(f'--gin.BimodalConfig.{name}={size}' for name, size in sizes.items()),
      '--gin.BimodalConfig.projection_dim=12',
      f'DATA_DIR={folder}/corpus',
      'TEXT_LENGTH=14',
      'CODE_LENGTH=24',
      'QUEUE_SIZE=24',
      'LOSS_TILE_LENGTH=8',
      *shared,
  )
  special = [f'--gin.CodeGenConfig.{k}={v}' for k, v in SPECIAL.items()]

  def make_source(part: str) -> None:
    codet5p(
        'train',
        '--gin_file=models/codegen_350m.gin',
        '--gin_file=objectives/causal_lm.gin',
        '--gin_file=runs/pretrain.gin',
        *(
            f'--gin.CodeGenConfig.{name}={size}'
            for name, size in {**CODEGEN[part], **CODEGEN_SHARED}.items()
        ),
        *special,
        f'DATA_DIR={folder}/corpus',
        f'RUN_DIR={folder}/{part}',
        'TARGET_LENGTH=16',
        *shared,
        'TRAIN_STEPS=3',
    )

  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(make_source, CODEGEN))
  composite = 'ShallowEncoderDeepDecoderConfig'
  frozen = (
      '--gin_file=models/deep_tiny.gin',
      '--gin_file=runs/finetune.gin',
      '--gin_file=initial_weights/codegen.gin',
      f'ENCODER_FROM={folder}/encoder',
      f'DECODER_FROM={folder}/decoder',
      "MODEL_DECODER_MAP=(('decoder/layers_2/(.*)', "
      "'decoder/last_layer/\\\\1'),)",
      *(
          f'--gin.{part}/codegen.CodeGenConfig.{name}={size}'
          for part, own in CODEGEN.items()
          for name, size in {**own, **CODEGEN_SHARED}.items()
      ),
      *(f'--gin.{composite}.{k}={v}' for k, v in SPECIAL.items()),
      f'DATA_DIR={folder}/pairs',
      f'VOCABULARY_DIR={folder}/corpus/vocabulary',
      'SOURCE_LENGTH=24',
      'TARGET_LENGTH=28',
      *shared,
  )
  return [
      Variant(f'{name}, {count} process{"es" * (count > 1)}', arguments, count)
      for count in (1, 2)
      for name, arguments in (
          ('stage 1', stage_1),
          ('stage 2', stage_2),
          ('frozen decoder', frozen),
      )
  ]


def write_rows(path: pathlib.Path, rows: list[dict]) -> None:
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def outcome(run_dir: pathlib.Path) -> tuple[list[dict], dict[str, str]]:
  """Rows of the metrics without times, and digests of the last checkpoint."""
  import jax
  import numpy as np

  from codet5p_jax.training.checkpoints.restore import (
      read_leaves,
      read_metadata,
  )
  from codet5p_jax.training.run_folder import read_metrics

  rows = [
      {name: value for name, value in row.items() if name not in ABOUT_TIME}
      for row in read_metrics(run_dir / 'metrics.jsonl')
  ]
  digests = {}
  last = run_dir / 'checkpoints' / str(STEPS)
  arrays = read_metadata(last)['arrays']
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  for item in sorted({path.partition('/')[0] for path in arrays}):
    targets = {
        path.removeprefix(f'{item}/'): jax.ShapeDtypeStruct(
            tuple(entry['shape']), entry['dtype'], sharding=here
        )
        for path, entry in arrays.items()
        if path.startswith(f'{item}/')
    }
    found = read_leaves(last / item, targets)
    for path, array in found.items():
      content = np.ascontiguousarray(array).tobytes()
      digests[f'{item}/{path}'] = hashlib.sha256(content).hexdigest()
  return rows, digests


def wait_for_moment(
    run: Run, chance: random.Random, start_seconds: float, after_start: bool
) -> None:
  """Waits for a moment to end a run: starting, saving, or between."""
  kind = chance.random()
  if kind < 0.2 and not after_start:
    deadline = run.began + chance.uniform(0, start_seconds)
    while run.is_alive() and time.monotonic() < deadline:
      time.sleep(0.01)
    return
  while run.is_alive() and not run.has_trained():
    time.sleep(0.01)
  if kind < 0.6:
    while run.is_alive() and not run.is_saving():
      time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05))
  else:
    time.sleep(chance.uniform(0, 1.5))


def strike(
    run: Run,
    kind: signal.Signals,
    alone: bool,
    chance: random.Random,
    tally: Tally,
) -> bool:
  """Ends a run, and judges how it went; False if it was done by then."""
  is_starting, step = not run.has_trained(), run.steps()
  began = time.monotonic()
  run.end(chance, kind, alone)
  if kind == signal.SIGTERM:
    limit, allowed = NOTICE_SECONDS, {PREEMPTED}
  elif alone:
    limit, allowed = SURVIVOR_SECONDS, {-signal.SIGKILL, *SURVIVED}
  else:
    # JAX may be quicker to end one that is left for a moment.
    limit, allowed = 30.0, {-signal.SIGKILL, -signal.SIGABRT}
  statuses = run.wait(limit)
  seconds = time.monotonic() - began
  if set(statuses) == {0}:
    if kind == signal.SIGTERM and STEPS - step > STEPS_TO_NOTICE:
      tally.failures.append(
          f'{run.run_dir}: the notice at step {step} was lost'
      )
    return False
  if run.steps() == STEPS and kind == signal.SIGKILL:
    allowed.add(0)  # It was killed as the first one ended.
  tally.ended += 1
  tally.in_start += is_starting
  tally.in_save += kind == signal.SIGKILL and run.is_saving()
  tally.alone += alone
  if alone or kind == signal.SIGTERM:
    tally.slowest_end = max(tally.slowest_end, seconds)
  if not set(statuses) <= allowed:
    tally.failures.append(
        f'{run.run_dir}: statuses {statuses} {seconds:.0f} s after {kind.name}'
        f'{" to one" * alone}, expected {sorted(allowed)}; {run.last_words()}'
    )
  return True


def disturb(
    variant: Variant,
    folder: pathlib.Path,
    wanted: int,
    is_over: Callable[[], bool],
    kind: signal.Signals,
    chance: random.Random,
    bar: tqdm,
) -> Tally:
  """Ends runs of a variant `wanted` times, and compares each that finishes.

  Once at the least, even if `is_over` from the beginning.
  """
  tally = Tally()
  undisturbed = Run(variant, folder / 'undisturbed')
  while undisturbed.is_alive() and not undisturbed.has_trained():
    time.sleep(0.05)
  start_seconds = time.monotonic() - undisturbed.began
  if any(undisturbed.wait()):
    tally.failures.append(f'undisturbed: {undisturbed.last_words()}')
    return tally
  expected = outcome(folder / 'undisturbed')

  def wants_more() -> bool:
    return tally.ended < min(wanted, 1 if is_over() else wanted)

  run_dir = None
  while run_dir is not None or wants_more():
    run_dir = run_dir or folder / f'run_{tally.compared}'
    run = Run(variant, run_dir)
    tally.started += 1
    if wants_more():
      alone = (
          kind == signal.SIGKILL
          and variant.num_processes > 1
          and tally.ended % ALONE_EVERY == ALONE_EVERY // 2
      )
      # One that is alone at the roll call waits for the others for minutes.
      after_start = alone or kind == signal.SIGTERM
      wait_for_moment(run, chance, start_seconds, after_start)
      if run.is_alive() and strike(run, kind, alone, chance, tally):
        bar.update()
        continue
    statuses = run.wait()
    if any(statuses):
      tally.failures.append(
          f'{run_dir}: statuses {statuses}; {run.last_words()}'
      )
      return tally  # The next would fail alike, again and again.
    failures = compare(outcome(run_dir), expected)
    tally.failures += [f'{run_dir}: {failure}' for failure in failures]
    if not tally.failures:
      shutil.rmtree(run_dir)
    tally.compared += 1
    run_dir = None
  return tally


def compare(
    found: tuple[list[dict], dict[str, str]],
    expected: tuple[list[dict], dict[str, str]],
) -> list[str]:
  """Says in what a run came to something else; nothing if in nothing."""
  failures = []
  if found[0] != expected[0]:
    failures.append('other metrics than undisturbed')
  names = found[1].keys() | expected[1].keys()
  unlike = [n for n in sorted(names) if found[1].get(n) != expected[1].get(n)]
  if unlike:
    failures.append(f'other arrays: {unlike[:3]}')
  return failures


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--seconds', type=float, default=float('inf'))
  parser.add_argument('--signal', choices=('KILL', 'TERM'), default='KILL')
  parser.add_argument(
      '--only',
      action='append',
      metavar='TEXT',
      help='variants that have it in their names; repeatable',
  )
  parser.add_argument('--seed', type=int)
  parser.add_argument('--work_dir', type=pathlib.Path)
  options = parser.parse_args()
  seed = random.randrange(10**6) if options.seed is None else options.seed
  print(f'Seed {seed}.')
  folder = options.work_dir or pathlib.Path(tempfile.mkdtemp(prefix='chaos_'))
  folder.mkdir(parents=True, exist_ok=True)
  begin = time.monotonic()
  variants = [
      variant
      for variant in make_variants(folder)
      if any(text in variant.name for text in options.only or [''])
  ]
  kind = getattr(signal, f'SIG{options.signal}')
  tallies = {}
  with tqdm(total=options.kills, unit=' kills', desc='chaos') as bar:
    for index, variant in enumerate(variants):
      to_come = len(variants) - index
      wanted = max(round((options.kills - bar.n) / to_come), 1)
      left = begin + options.seconds - time.monotonic()
      until = time.monotonic() + left / to_come
      place = folder / f'variant_{index}'
      place.mkdir()
      tallies[variant.name] = disturb(
          variant,
          place,
          wanted,
          lambda until=until: time.monotonic() > until,
          kind,
          random.Random(seed + index),
          bar,
      )
  print(
      f'\n{"run":28}{"ended":>7}{"in start":>10}{"in save":>9}{"alone":>7}'
      f'{"compared":>10}{"failures":>10}{"slowest end":>13}'
  )
  for name, tally in tallies.items():
    if not (tally.ended and tally.compared):
      tally.failures.append(f'{name}: no run was ended and compared')
    print(
        f'{name:28}{tally.ended:7}{tally.in_start:10}{tally.in_save:9}'
        f'{tally.alone:7}{tally.compared:10}{len(tally.failures):10}'
        f'{tally.slowest_end:11.1f} s'
    )
  failures = [words for tally in tallies.values() for words in tally.failures]
  for words in failures:
    print(words)
  if not failures and options.work_dir is None:
    shutil.rmtree(folder)
  return 0 if tallies and not failures else 1


if __name__ == '__main__':
  sys.exit(main())
