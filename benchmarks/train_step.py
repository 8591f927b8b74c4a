"""Times our train step on the CPU against transformers' T5 with PyTorch.

Both sides do the same work on the same batch: float32, no dropout, a padding
mask, the causal mask and the relative position bias on, the gradient clipped to
a global norm of 1, AdamW with weight decay (PyTorch's fused one, its fastest).
They take turns on the same cores, so that whatever else the machine does falls
on both; each pair of turns gives one ratio. Our layers are timed unrolled and
scanned: a scan copies each layer's weights and gradients out of and into
stacks, which on a CPU costs some 8 %.

Two things would spoil the comparison:

- Within one process, waiting threads of one library spin on the cores that the
  other is timed on. So each side has a process of its own, idle in turn.
- XLA asks for its temporary memory, 3 GB here, anew every step. The system's
  allocator gives so large a piece back at once, and the kernel must clear it
  anew; on a virtual machine whose host takes idle pages away this doubles the
  time of a step. So the allocator of both sides keeps what it is given back.

  JAX_PLATFORMS=cpu python benchmarks/train_step.py --steps 5
"""

import argparse
import importlib.util
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np

BATCH, SOURCE_LENGTH, TARGET_LENGTH = 4, 256, 128
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 0.1, 1.0

KEEP_FREED_MEMORY = {
    'MALLOC_ARENA_MAX': '1',
    'MALLOC_MMAP_MAX_': '0',
    'MALLOC_TRIM_THRESHOLD_': str(2**40),
}

SIDES = ('codet5p_jax', 'torch')

Arrays = Mapping[str, np.ndarray]


def make_batch(vocab_size: int) -> Arrays:
  """Random rows, all but the first with padding (0) at their end."""
  rng = np.random.default_rng(0)

  def rows(length):
    lengths = np.linspace(length, 0.75 * length, BATCH).astype(int)[:, None]
    tokens = rng.integers(3, vocab_size, (BATCH, length), np.int32)
    return np.where(np.arange(length) < lengths, tokens, 0)

  return {'sources': rows(SOURCE_LENGTH), 'targets': rows(TARGET_LENGTH)}


def jax_side(model, batch: Arrays, scan_layers: bool) -> Callable[[], float]:
  """Returns a function that makes one update and returns the mean loss."""
  import jax

  from codet5p_jax import sharding
  from codet5p_jax.models.computation import Computation
  from codet5p_jax.objectives.sequence_to_sequence import SequenceToSequence
  from codet5p_jax.training import optimizers
  from codet5p_jax.training import train_step

  config = train_step.StepConfig(
      model,
      [SequenceToSequence(SOURCE_LENGTH, TARGET_LENGTH)],
      optimizers.AdamW(
          LEARNING_RATE, 1, 10**9, WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM
      ),
      BATCH,
      computation=Computation(dtype='float32', scan_layers=scan_layers),
  )
  mesh = sharding.make_mesh(config.mesh_shape, jax.devices()[:1])
  compiled = train_step.make_train_step(config, mesh)
  features = {
      'encoder_input_tokens': batch['sources'],
      'decoder_target_tokens': batch['targets'],
      'decoder_loss_weights': (batch['targets'] > 0).astype(np.float32),
  }
  batches = {
      'sequence_to_sequence': jax.device_put(
          {name: x[None] for name, x in features.items()},
          compiled.batch_sharding,
      )
  }
  state = compiled.init()

  def step():
    nonlocal state
    state, metrics = compiled.step(state, batches)
    total, weight = metrics['sequence_to_sequence/loss']
    jax.block_until_ready(state)
    return float(total / weight)

  return step


def torch_side(model, batch: Arrays, threads: int) -> Callable[[], float]:
  """Returns a function that makes one update and returns the mean loss."""
  import torch
  import transformers

  torch.set_num_threads(threads)
  torch.manual_seed(0)
  config = transformers.T5Config(
      vocab_size=model.vocab_size,
      d_model=model.emb_dim,
      d_kv=model.head_dim,
      num_heads=model.num_heads,
      d_ff=model.mlp_dim,
      num_layers=model.num_encoder_layers,
      num_decoder_layers=model.num_decoder_layers,
      dropout_rate=0.0,
      decoder_start_token_id=0,
  )
  t5 = transformers.T5ForConditionalGeneration(config).train()
  norms = [p for p in t5.parameters() if p.ndim == 1]
  matrices = [p for p in t5.parameters() if p.ndim > 1]
  optimizer = torch.optim.AdamW(
      [{'params': matrices}, {'params': norms, 'weight_decay': 0.0}],
      lr=LEARNING_RATE,
      weight_decay=WEIGHT_DECAY,
      fused=True,
  )
  sources = torch.tensor(batch['sources'], dtype=torch.long)
  targets = torch.tensor(batch['targets'], dtype=torch.long)
  inputs = {
      'input_ids': sources,
      'attention_mask': (sources > 0).long(),
      'labels': targets.masked_fill(targets == 0, -100),
  }

  def step():
    optimizer.zero_grad()
    loss = t5(**inputs).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(t5.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return loss.item()

  return step


def measure(step: Callable[[], float]) -> tuple[float, float, float]:
  """Returns seconds, seconds of all cores together, and the loss."""

  def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

  begin, cpu_begin = time.perf_counter(), cpu()
  loss = step()
  return time.perf_counter() - begin, cpu() - cpu_begin, loss


def serve(
    connection, side: str, options: argparse.Namespace, scan_layers: bool
) -> None:
  """Makes a measured step whenever told to; the body of a side's process."""
  # Before JAX counts them: both sides share these cores.
  cores = sorted(os.sched_getaffinity(0))[: options.threads]
  os.sched_setaffinity(0, cores)
  os.environ['JAX_PLATFORMS'] = 'cpu'

  from codet5p_jax import configuration

  configuration.load([options.gin_file])
  model = configuration.macro('MODEL')
  batch = make_batch(model.vocab_size)
  if side == 'torch':
    step = torch_side(model, batch, len(cores))
  else:
    step = jax_side(model, batch, scan_layers)
  for _ in range(2):  # Compiles, and touches all memory once.
    step()
  connection.send(None)
  while connection.recv():
    connection.send(measure(step))


def compare(options: argparse.Namespace, scan_layers: bool) -> None:
  """Prints a line for each pair of turns and the median of their ratios."""
  context = multiprocessing.get_context('spawn')
  connections, processes = {}, []
  for side in SIDES:
    connections[side], theirs = context.Pipe()
    processes.append(
        context.Process(
            target=serve,
            args=(theirs, side, options, scan_layers),
            daemon=True,
        )
    )
    processes[-1].start()
    theirs.close()
    connections[side].recv()

  form = 'scanned' if scan_layers else 'unrolled'
  print(f'Layers of codet5p_jax {form}:')
  print(f'pair {"codet5p_jax":>22} {"torch":>22}  ratio of tokens/s')
  seconds = {side: [] for side in SIDES}
  for pair in range(options.steps):
    line = f'{pair:4}'
    for side, connection in connections.items():
      connection.send(True)
      wall, cpu_seconds, loss = connection.recv()
      seconds[side].append(wall)
      line += f' {wall:6.2f} s {cpu_seconds:5.1f} CPU-s'
      line += f' {loss:5.2f}' if pair == 0 else ' ' * 6
    print(f'{line} {seconds["torch"][-1] / seconds["codet5p_jax"][-1]:7.3f}',
          flush=True)
  for connection, process in zip(connections.values(), processes, strict=True):
    connection.send(False)
    process.join()

  tokens = BATCH * (SOURCE_LENGTH + TARGET_LENGTH)
  for side in SIDES:
    median = statistics.median(seconds[side])
    print(f'{side}: {median:.2f} s a step, {tokens / median:.1f} tokens/s')
  ratios = [
      theirs / ours
      for ours, theirs in zip(
          seconds['codet5p_jax'], seconds['torch'], strict=True
      )
  ]
  print(f'median ratio {statistics.median(ratios):.3f}\n', flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--gin_file', default='models/t5_220m.gin')
  options = parser.parse_args()
  for library in ('torch', 'transformers'):
    if importlib.util.find_spec(library) is None:
      print(f'skipped: no {library}; install the extra "torch" to compare')
      return
  os.environ.update(KEEP_FREED_MEMORY)  # Read as a process starts.
  for scan_layers in (False, True):
    compare(options, scan_layers)


if __name__ == '__main__':
  main()
