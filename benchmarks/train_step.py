"""Times our train step on the CPU against transformers' T5 with PyTorch.

Both sides do the same work on the same batch: float32, no dropout, a padding
mask, the causal mask and the relative position bias on, the gradient clipped to
a global norm of 1, AdamW with weight decay (PyTorch's fused one, its fastest).
They take turns on the same cores, so that whatever else the machine does falls
on both; each pair of turns gives one ratio. Each has a process of its own, idle
while the other works: within one process, waiting threads of one library spin
on the cores that the other is timed on.

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
      optimizers.AdamW(LEARNING_RATE, 1, 10**9, WEIGHT_DECAY,
                       max_grad_norm=MAX_GRAD_NORM),
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
  batches = {'sequence_to_sequence': jax.device_put(
      {name: x[None] for name, x in features.items()}, compiled.batch_sharding)}
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
  t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(
      vocab_size=model.vocab_size, d_model=model.emb_dim, d_kv=model.head_dim,
      num_heads=model.num_heads, d_ff=model.mlp_dim, dropout_rate=0.0,
      num_layers=model.num_encoder_layers,
      num_decoder_layers=model.num_decoder_layers, decoder_start_token_id=0,
  )).train()
  norms = [p for p in t5.parameters() if p.ndim == 1]
  matrices = [p for p in t5.parameters() if p.ndim > 1]
  optimizer = torch.optim.AdamW(
      [{'params': matrices}, {'params': norms, 'weight_decay': 0.0}],
      lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
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


def serve(connection, side: str, options: argparse.Namespace) -> None:
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
    step = jax_side(model, batch, bool(options.scan_layers))
  step()  # Compiles, and touches all memory once.
  connection.send(None)
  while connection.recv():
    connection.send(measure(step))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--gin_file', default='models/t5_220m.gin')
  parser.add_argument('--scan_layers', type=int, default=1)
  options = parser.parse_args()
  for library in ('torch', 'transformers'):
    if importlib.util.find_spec(library) is None:
      print(f'skipped: no {library}; install the extra "torch" to compare')
      return

  context = multiprocessing.get_context('spawn')
  sides = {}
  for side in ('codet5p_jax', 'torch'):
    sides[side], theirs = context.Pipe()
    context.Process(
        target=serve, args=(theirs, side, options), daemon=True
    ).start()
    theirs.close()
    sides[side].recv()

  results = {side: [] for side in sides}
  print(f'pair    {"codet5p_jax":>22} {"torch":>22}  ratio of tokens/s, CPU-s')
  for pair in range(options.steps):
    for side, connection in sides.items():
      connection.send(True)
      results[side].append(connection.recv())
    (ours, our_cpu, a), (theirs, their_cpu, b) = (
        results[side][-1] for side in sides
    )
    print(
        f'{pair:4} {ours:7.2f} s {our_cpu:6.2f} CPU-s {a:5.2f}'
        f' {theirs:7.2f} s {their_cpu:6.2f} CPU-s {b:5.2f}'
        f'{theirs / ours:7.3f} {their_cpu / our_cpu:7.3f}',
        flush=True,
    )
  tokens = BATCH * (SOURCE_LENGTH + TARGET_LENGTH)
  for side, rows in results.items():
    seconds = statistics.median(row[0] for row in rows)
    print(f'{side:12} {seconds:6.2f} s a step, {tokens / seconds:6.1f} tokens/s')
  ratios = [
      theirs[0] / ours[0]
      for ours, theirs in zip(results['codet5p_jax'], results['torch'])
  ]
  print(f'median ratio {statistics.median(ratios):.3f}')


if __name__ == '__main__':
  main()
