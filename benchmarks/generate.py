"""Times greedy generation against transformers with PyTorch.

Both sides generate as many tokens from prompts of one batch, with random
weights of the same sizes, and neither may end early. They take turns on the
same cores or the same GPU, each in a process of its own (see train_step.py), so
that whatever else the machine does falls on both; each pair of turns gives one
ratio.

- `t5`: CodeT5+ 220M against transformers' T5, which caches keys and values as
  we do.
- `composite`: stacks as wide as those of CodeT5+ 2B, with fewer layers, against
  the PyTorch class that exported folders carry, without a cache
  (`use_cache=False`): the released class never uses one, and so computes the
  whole prefix again for every token.

A token cannot be had before the weights of the decoder, and the keys and values
so far, are read from memory once. So the time of a token is also told as a
share of what the device's memory gives: as fast as the product of a vector and
a matrix of 1 GB is read.

  JAX_PLATFORMS=cpu python benchmarks/generate.py --pairs 3
  python benchmarks/generate.py --device gpu --dtype bfloat16 \\
    --batch_size 1 --batch_size 32
"""

import argparse
import dataclasses
import importlib.util
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

PROMPT_LENGTH = 128
NEW_TOKENS = {'t5': 64, 'composite': 256}
NEVER = -7  # An end token that no model generates.
ENCODER_LAYERS, DECODER_LAYERS = 1, 2  # Of the composite.
SIDES = ('codet5p_jax', 'torch')


@dataclasses.dataclass(frozen=True)
class Case:
  """What both sides generate."""

  workload: str
  batch_size: int
  dtype: str
  device: str
  threads: int

  @property
  def new_tokens(self) -> int:
    return NEW_TOKENS[self.workload]


def make_config(workload: str):
  from codet5p_jax import configuration

  preset = {'t5': 't5_220m', 'composite': 'deep_2b'}[workload]
  configuration.load([f'models/{preset}.gin'])
  model = configuration.macro('MODEL')
  if workload == 't5':
    return model
  return dataclasses.replace(
      model,
      encoder=dataclasses.replace(model.encoder, num_layers=ENCODER_LAYERS),
      decoder=dataclasses.replace(model.decoder, num_layers=DECODER_LAYERS),
  )


def make_prompts(case: Case) -> np.ndarray:
  numbers = np.random.default_rng(0)
  return numbers.integers(3, 32_000, (case.batch_size, PROMPT_LENGTH))


def jax_side(case: Case) -> tuple[Callable[[int], int], dict[str, float]]:
  """Returns a function that generates, and what a token takes of memory.

  The function takes how many tokens each row shall get, and returns how many
  all got. The rest are the bytes read for a token of every row, and the bytes a
  second that the memory gives.
  """
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from codet5p_jax.decoding.prefill import Prompts, decoding_params
  from codet5p_jax.decoding.sampler import Sampler, row_keys
  from codet5p_jax.decoding.sampling import Sampling
  from codet5p_jax.models.computation import Computation

  if jax.default_backend() != case.device:
    raise SystemExit(f'JAX has no {case.device} here, it computes on '
                     f'{jax.default_backend()}')
  config = make_config(case.workload)
  model = config.make_model(Computation(case.dtype, scan_layers=False))
  params = decoding_params(
      nn.unbox(jax.jit(model.init_params)(jax.random.key(0))), case.dtype
  )
  batch = case.batch_size
  sources = jnp.asarray(make_prompts(case), jnp.int32)
  targets = jnp.full((batch, 1), config.decoder_start_id)
  if config.prompt_to_decoder:
    targets = sources
  prompts = Prompts(sources, targets, jnp.full(batch, targets.shape[1]))
  sampler = Sampler(model, Sampling(temperature=0.0), NEVER)
  keys = row_keys(jax.random.key(0), jnp.arange(batch), 0, 1)

  def start(count):
    return sampler.begin(
        *sampler.read(params, prompts),
        keys,
        jnp.full(batch, count),
        max_new_tokens=case.new_tokens,
    )

  def generate(count):
    samples = sampler.go_on(params, start(count), count)
    return int(np.sum(np.asarray(samples.tokens) >= 0))

  # What follows from the source alone was computed as it was read.
  weights = [
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
      if not is_unread(jax.tree_util.keystr(path), case.workload)
  ]
  kept = jax.tree.leaves(start(1).continuations.cache)
  return generate, {
      'bytes': float(sum(leaf.nbytes for leaf in [*weights, *kept])),
      'bytes_per_second': memory_speed(jax),
  }


def is_unread(path: str, workload: str) -> bool:
  """Whether a step that adds a token has no need of a parameter."""
  is_read_once = "['encoder']" in path or (
      'cross_attention' in path and ("['key']" in path or "['value']" in path)
  )
  # Of a table that is no output head, a few rows are read.
  return is_read_once or (workload != 't5' and 'token_embedder' in path)


def memory_speed(jax) -> float:
  """Bytes a second of a product of a vector and a matrix of 1 GB."""
  matrix = jax.numpy.ones((16_384, 16_384))
  vector = jax.numpy.ones(16_384)
  multiply = jax.jit(jax.numpy.matmul)
  seconds = []
  for _ in range(6):
    begin = time.perf_counter()
    multiply(vector, matrix).block_until_ready()
    seconds.append(time.perf_counter() - begin)
  return matrix.nbytes / min(seconds)


def torch_side(case: Case) -> tuple[Callable[[int], int], dict[str, float]]:
  """Returns a function that generates, see `jax_side`, and nothing else."""
  import torch

  torch.set_num_threads(case.threads)
  torch.manual_seed(0)
  device = {'cpu': 'cpu', 'gpu': 'cuda'}[case.device]
  config = make_config(case.workload)
  make = {'t5': torch_t5, 'composite': torch_composite}[case.workload]
  model, options = make(config)
  model = model.to(device, getattr(torch, case.dtype))
  sources = torch.tensor(make_prompts(case), device=device)
  given = {'input_ids': sources, 'attention_mask': torch.ones_like(sources)}
  if config.prompt_to_decoder:
    given['decoder_input_ids'] = sources

  def generate(count):
    with torch.no_grad():
      tokens = model.generate(
          **given,
          do_sample=False,
          min_new_tokens=count,
          max_new_tokens=count,
          **options,
      )
    begin = given.get('decoder_input_ids', sources[:, :1]).shape[1]
    return tokens[:, begin:].cpu().numel()

  return generate, {}


def torch_t5(config):
  import transformers

  model = transformers.T5ForConditionalGeneration(
      transformers.T5Config(
          vocab_size=config.vocab_size,
          d_model=config.emb_dim,
          d_kv=config.head_dim,
          num_heads=config.num_heads,
          d_ff=config.mlp_dim,
          num_layers=config.num_encoder_layers,
          num_decoder_layers=config.num_decoder_layers,
          pad_token_id=config.pad_id,
          eos_token_id=config.eos_id,
          decoder_start_token_id=config.decoder_start_id,
      )
  )
  return model.eval(), {'use_cache': True}


def torch_composite(config):
  from codet5p_jax.conversion.families import family_of_config

  modeling = load_exported_classes()
  written = family_of_config(config).write_config(config)
  del written['model_type']
  model = modeling.CodeT5pEncoderDecoderModel(
      modeling.CodeT5pConfig(**written)
  )
  return model.eval(), {'use_cache': False}


def load_exported_classes():
  """The classes of exported folders, as a package of their own."""
  import codet5p_jax

  folder = pathlib.Path(codet5p_jax.__file__).parent / 'conversion/huggingface'
  name = 'exported_codet5p'
  spec = importlib.util.spec_from_loader(name, None, is_package=True)
  package = importlib.util.module_from_spec(spec)
  package.__path__ = [str(folder)]
  sys.modules[name] = package
  return importlib.import_module(f'{name}.modeling_codet5p')


def serve(connection, side: str, case: Case) -> None:
  """Generates whenever told to; the body of a side's process."""
  # Before JAX counts them: both sides share these cores.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case.threads])
  generate, facts = {'codet5p_jax': jax_side, 'torch': torch_side}[side](case)
  generate(2)  # Compiles, and touches all memory once.
  connection.send(facts)
  while count := connection.recv():
    begin = time.perf_counter()
    made = generate(count)
    connection.send((time.perf_counter() - begin, made))


def compare(case: Case, pairs: int) -> None:
  """Prints a line for each pair of turns and the median of their ratios."""
  context = multiprocessing.get_context('spawn')
  connections, processes, facts = {}, [], {}
  for side in SIDES:
    connections[side], theirs = context.Pipe()
    process = context.Process(
        target=serve, args=(theirs, side, case), daemon=True
    )
    process.start()
    processes.append(process)
    theirs.close()
    facts |= connections[side].recv()

  def take(side, count):
    connections[side].send(count)
    seconds, made = connections[side].recv()
    assert made == case.batch_size * count, (side, made, count)
    return seconds

  count = case.new_tokens
  print(f'{case.workload}, {case.dtype}: batch {case.batch_size}, prompts of '
        f'{PROMPT_LENGTH} tokens, {count} new ones')
  ratios, steps = [], []
  for pair in range(pairs):
    speeds, told = [], []
    for side in SIDES:
      first, whole = take(side, 1), take(side, count)
      step = (whole - first) / (count - 1)
      speeds.append(case.batch_size * count / whole)
      told.append(f'{side} {speeds[-1]:.2f} tok/s ({first:.2f} s to the first '
                  f'token, {step * 1e3:.1f} ms each further one)')
      if side == 'codet5p_jax':
        steps.append(step)
    ratios.append(speeds[0] / speeds[1])
    print(f'pair {pair}: {"; ".join(told)}; ratio {ratios[-1]:.2f}', flush=True)
  for connection, process in zip(connections.values(), processes, strict=True):
    connection.send(0)
    process.join()
  speed = facts['bytes'] / statistics.median(steps)
  print(f'{case.workload}: median ratio of tokens/s '
        f'{statistics.median(ratios):.2f}; codet5p_jax reads '
        f'{facts["bytes"] / 1e9:.3f} GB for a token of each row, '
        f'{speed / 1e9:.1f} GB/s, {speed / facts["bytes_per_second"]:.0%} of '
        f'the {facts["bytes_per_second"] / 1e9:.1f} GB/s that the memory '
        f'gives\n', flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pairs', type=int, default=3)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--workload', choices=tuple(NEW_TOKENS), action='append')
  parser.add_argument('--batch_size', type=int, action='append')
  parser.add_argument(
      '--dtype', choices=('float32', 'bfloat16'), default='float32'
  )
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  options = parser.parse_args()
  for library in ('torch', 'transformers'):
    if importlib.util.find_spec(library) is None:
      print(f'skipped: no {library}; install the extra "torch" to compare')
      return
  # Both sides share the memory of a GPU.
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  for workload in options.workload or NEW_TOKENS:
    for batch_size in options.batch_size or (4,):
      compare(
          Case(workload, batch_size, options.dtype, options.device,
               options.threads),
          options.pairs,
      )


if __name__ == '__main__':
  main()
