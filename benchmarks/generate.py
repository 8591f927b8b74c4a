"""Times greedy generation on the CPU against transformers with PyTorch.

Both sides generate as many tokens from prompts of one batch, in float32, with
random weights of the same sizes, and neither may end early. They take turns on
the same cores, each in a process of its own (see train_step.py), so that
whatever else the machine does falls on both; each pair of turns gives one
ratio.

- `t5`: CodeT5+ 220M against transformers' T5, which caches keys and values as
  we do.
- `composite`: stacks as wide as those of CodeT5+ 2B, with fewer layers, against
  the PyTorch class that exported folders carry, without a cache
  (`use_cache=False`): the released class never uses one, and so computes the
  whole prefix again for every token.

  JAX_PLATFORMS=cpu python benchmarks/generate.py --pairs 3
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

BATCH, PROMPT_LENGTH = 4, 128
NEW_TOKENS = {'t5': 64, 'composite': 256}
NEVER = -7  # An end token that no model generates.
ENCODER_LAYERS, DECODER_LAYERS = 2, 4  # Of the composite.
SIDES = ('codet5p_jax', 'torch')

KEEP_FREED_MEMORY = {
    'MALLOC_ARENA_MAX': '1',
    'MALLOC_MMAP_MAX_': '0',
    'MALLOC_TRIM_THRESHOLD_': str(2**40),
}


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


def make_prompts() -> np.ndarray:
  numbers = np.random.default_rng(0)
  return numbers.integers(3, 32_000, (BATCH, PROMPT_LENGTH))


def jax_side(workload: str) -> Callable[[], int]:
  """Returns a function that generates, and returns how many tokens."""
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from codet5p_jax.decoding.prefill import Prompts
  from codet5p_jax.decoding.sampler import Sampler, row_keys
  from codet5p_jax.decoding.sampling import Sampling
  from codet5p_jax.models.computation import Computation

  config = make_config(workload)
  model = config.make_model(Computation('float32', scan_layers=False))
  params = nn.unbox(jax.jit(model.init_params)(jax.random.key(0)))
  sources = jnp.asarray(make_prompts(), jnp.int32)
  targets = jnp.full((BATCH, 1), config.decoder_start_id)
  if config.prompt_to_decoder:
    targets = sources
  prompts = Prompts(sources, targets, jnp.full(BATCH, targets.shape[1]))
  count = NEW_TOKENS[workload]
  sampler = Sampler(model, Sampling(temperature=0.0), NEVER)
  keys = row_keys(jax.random.key(0), jnp.arange(BATCH), 0, 1)

  def generate():
    samples = sampler.start(
        params, prompts, keys, jnp.full(BATCH, count), max_new_tokens=count
    )
    samples = sampler.go_on(params, samples, count)
    return int(np.sum(np.asarray(samples.tokens) >= 0))

  return generate


def torch_side(workload: str, threads: int) -> Callable[[], int]:
  """Returns a function that generates, and returns how many tokens."""
  import torch

  torch.set_num_threads(threads)
  torch.manual_seed(0)
  config = make_config(workload)
  make = {'t5': torch_t5, 'composite': torch_composite}[workload]
  model, options = make(config)
  sources = torch.tensor(make_prompts())
  given = {'input_ids': sources, 'attention_mask': torch.ones_like(sources)}
  if config.prompt_to_decoder:
    given['decoder_input_ids'] = sources
  count = NEW_TOKENS[workload]

  def generate():
    with torch.no_grad():
      tokens = model.generate(
          **given,
          do_sample=False,
          min_new_tokens=count,
          max_new_tokens=count,
          **options,
      )
    return BATCH * count if tokens.shape[1] > count else 0

  return generate


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


def serve(connection, side: str, workload: str, threads: int) -> None:
  """Generates whenever told to; the body of a side's process."""
  # Before JAX counts them: both sides share these cores.
  cores = sorted(os.sched_getaffinity(0))[:threads]
  os.sched_setaffinity(0, cores)
  os.environ['JAX_PLATFORMS'] = 'cpu'
  generate = (
      torch_side(workload, len(cores))
      if side == 'torch'
      else jax_side(workload)
  )
  generate()  # Compiles, and touches all memory once.
  connection.send(None)
  while connection.recv():
    begin = time.perf_counter()
    count = generate()
    connection.send((time.perf_counter() - begin, count))


def compare(workload: str, options: argparse.Namespace) -> None:
  """Prints a line for each pair of turns and the median of their ratios."""
  context = multiprocessing.get_context('spawn')
  connections, processes = {}, []
  for side in SIDES:
    connections[side], theirs = context.Pipe()
    process = context.Process(
        target=serve,
        args=(theirs, side, workload, options.threads),
        daemon=True,
    )
    process.start()
    processes.append(process)
    theirs.close()
    connections[side].recv()

  expected = BATCH * NEW_TOKENS[workload]
  print(f'{workload}: batch {BATCH}, prompts of {PROMPT_LENGTH} tokens, '
        f'{NEW_TOKENS[workload]} new ones')
  print('pair   codet5p_jax         torch  ratio of tokens/s')
  ratios = []
  for pair in range(options.pairs):
    speeds = {}
    for side, connection in connections.items():
      connection.send(True)
      seconds, count = connection.recv()
      assert count == expected, (side, count, expected)
      speeds[side] = count / seconds
    ratios.append(speeds['codet5p_jax'] / speeds['torch'])
    told = ''.join(f'{speeds[side]:8.2f} tok/s' for side in SIDES)
    print(f'{pair:4}{told} {ratios[-1]:8.2f}', flush=True)
  for connection, process in zip(connections.values(), processes, strict=True):
    connection.send(False)
    process.join()
  print(f'{workload}: median ratio {statistics.median(ratios):.2f}\n',
        flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pairs', type=int, default=3)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--workload', choices=tuple(NEW_TOKENS), action='append')
  options = parser.parse_args()
  for library in ('torch', 'transformers'):
    if importlib.util.find_spec(library) is None:
      print(f'skipped: no {library}; install the extra "torch" to compare')
      return
  os.environ.update(KEEP_FREED_MEMORY)  # Read as a process starts.
  for workload in options.workload or NEW_TOKENS:
    compare(workload, options)


if __name__ == '__main__':
  main()
