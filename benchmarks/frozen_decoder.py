"""Times a step of the frozen-decoder model on a GPU, against PyTorch.

The model is CodeT5+ 2B: encoder, bridge and cross-attention are trained, in
float32 with bfloat16 computation; the decoder is frozen, in bfloat16. Both
sides make the same updates from the same batch: cross-entropy of the targets,
the gradient clipped to a global norm of 1, AdamW. PyTorch runs the classes that
our exported folders carry (conversion/huggingface/), with its fused AdamW and
no gradient asked of what is frozen. Ours is timed a second time with an int8
decoder, and a third time with nothing frozen, which tells what freezing saves.

Each side has a process and the GPU of its own, one after the other; a line is
the median of the steps after the first two, with the memory at its peak.

One NVIDIA H200 (JAX 0.11.2, PyTorch 2.11), sources and targets of 512 tokens:

  batch  side                              ms a step  tokens/s  peak GB
     16  codet5p_jax, frozen in bfloat16       178.5    91,800     19.6
     16  codet5p_jax, frozen in int8           179.3    91,400     14.9
     16  torch, frozen in bfloat16             349.3    46,900     38.6
      4  codet5p_jax, frozen in bfloat16        54.2    75,500     19.6
      4  codet5p_jax, nothing frozen           169.4    24,200     69.1

So 1.96 times the tokens of the PyTorch classes, which compute attention in
float32 as the released ones do, in half of the memory; and freezing makes a
step 3.1 times as fast. The peak of ours is that of drawing the first weights.

  PYTHONPATH=. python benchmarks/frozen_decoder.py --batch_size 16
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import pathlib
import statistics
import time

LENGTH = 512
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 0.1, 1.0
TRAINABLE = (
    'encoder/.*',
    'encoder_to_decoder/.*',
    'decoder/last_layer/cross_attention/.*',
)
VOCAB_SIZE = 51200
ENCODER = {'emb_dim': 1024, 'num_layers': 20, 'num_heads': 16, 'rotary_dim': 32}
DECODER = {'emb_dim': 2560, 'num_layers': 32, 'num_heads': 32, 'rotary_dim': 64}


def batch(batch_size):
  import numpy as np

  rng = np.random.default_rng(0)
  shape = (batch_size, LENGTH)
  return {
      'sources': rng.integers(0, 50000, shape).astype(np.int32),
      'targets': rng.integers(0, 50000, shape).astype(np.int32),
  }


def jax_side(options, trainable, frozen_dtype):
  import jax
  import numpy as np

  from codet5p_jax import sharding
  from codet5p_jax.models.codegen import CodeGenConfig
  from codet5p_jax.models.computation import Computation
  from codet5p_jax.models.shallow_encoder_deep_decoder import (
      ShallowEncoderDeepDecoderConfig,
  )
  from codet5p_jax.objectives.sequence_to_sequence import SequenceToSequence
  from codet5p_jax.training import optimizers
  from codet5p_jax.training.train_step import StepConfig, make_train_step

  def stack(sizes):
    return CodeGenConfig(
        vocab_size=VOCAB_SIZE,
        head_dim=sizes['emb_dim'] // sizes['num_heads'],
        mlp_dim=4 * sizes['emb_dim'],
        **sizes,
    )

  objective = SequenceToSequence(LENGTH, LENGTH, prompt_to_decoder=True)
  config = StepConfig(
      ShallowEncoderDeepDecoderConfig(stack(ENCODER), stack(DECODER)),
      [objective],
      optimizers.AdamW(
          LEARNING_RATE, 1, 10**9, WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM
      ),
      options.batch_size,
      computation=Computation(remat_policy=options.remat_policy),
      trainable=trainable,
      frozen_dtype=frozen_dtype,
  )
  mesh = sharding.make_mesh(config.mesh_shape, jax.devices()[:1])
  made = make_train_step(config, mesh)
  arrays = batch(options.batch_size)
  features = {
      'encoder_input_tokens': arrays['sources'],
      'decoder_target_tokens': arrays['targets'],
      'decoder_loss_weights': np.ones(arrays['targets'].shape, np.float32),
  }
  batches = {
      objective.name: jax.device_put(
          {name: x[None] for name, x in features.items()}, made.batch_sharding
      )
  }
  state = made.init({})

  def step():
    nonlocal state
    state, metrics = made.step(state, batches)
    total, weight = metrics[f'{objective.name}/loss']
    jax.block_until_ready(state)
    return float(total / weight)

  def peak_bytes():
    return jax.devices()[0].memory_stats()['peak_bytes_in_use']

  return step, peak_bytes, jax.devices()[0].device_kind


def torch_side(options):
  import sys

  import torch

  # As a folder's remote code is loaded: two modules of one package.
  folder = pathlib.Path('codet5p_jax/conversion/huggingface')
  package = 'carried_code'
  modules = {}
  for name in ('configuration_codet5p', 'modeling_codet5p'):
    spec = importlib.util.spec_from_file_location(
        f'{package}.{name}', folder / f'{name}.py'
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(package, type(sys)(package)).__path__ = [str(folder)]
    sys.modules[f'{package}.{name}'] = module
    spec.loader.exec_module(module)
    modules[name] = module

  def stack(sizes, **more):
    return {
        'vocab_size': VOCAB_SIZE,
        'n_embd': sizes['emb_dim'],
        'n_layer': sizes['num_layers'],
        'n_head': sizes['num_heads'],
        'rotary_dim': sizes['rotary_dim'],
        'n_positions': LENGTH,
        'n_ctx': LENGTH,
        **more,
    }

  config = modules['configuration_codet5p'].CodeT5pConfig(
      encoder=stack(ENCODER),
      decoder=stack(DECODER, is_decoder=True, add_cross_attention=True),
  )
  torch.manual_seed(0)
  with torch.device('cuda'):
    model = modules['modeling_codet5p'].CodeT5pEncoderDecoderModel(config)
  model.train()
  trained = []
  for name, parameter in model.named_parameters():
    if name.startswith('decoder.') and 'crossattention' not in name:
      parameter.requires_grad_(False)
      parameter.data = parameter.data.to(torch.bfloat16)
    else:
      trained.append(parameter)
  optimizer = torch.optim.AdamW(
      trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
  )
  arrays = {
      name: torch.tensor(x, dtype=torch.long, device='cuda')
      for name, x in batch(options.batch_size).items()
  }
  start = torch.full((options.batch_size, 1), 50256, device='cuda')
  inputs = {
      'input_ids': arrays['sources'],
      'decoder_input_ids': torch.cat([start, arrays['targets'][:, :-1]], 1),
      'labels': arrays['targets'],
  }

  def step():
    optimizer.zero_grad()
    with torch.autocast('cuda', torch.bfloat16):
      loss = model(**inputs, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
    optimizer.step()
    torch.cuda.synchronize()
    return loss.item()

  return step, torch.cuda.max_memory_allocated, torch.cuda.get_device_name()


SIDES = {
    'codet5p_jax, frozen in bfloat16': (TRAINABLE, 'bfloat16'),
    'codet5p_jax, frozen in int8': (TRAINABLE, 'int8'),
    'codet5p_jax, nothing frozen': (('.*',), 'bfloat16'),
    'torch, frozen in bfloat16': None,
}


def measure(options, side, connection):
  if SIDES[side] is None:
    step, peak_bytes, device = torch_side(options)
  else:
    step, peak_bytes, device = jax_side(options, *SIDES[side])
  losses, seconds = [], []
  for _ in range(options.steps + 2):
    begin = time.perf_counter()
    losses.append(step())
    seconds.append(time.perf_counter() - begin)
  connection.send({
      'side': side,
      'device': device,
      'compile_seconds': seconds[0],
      'median_seconds': statistics.median(seconds[2:]),
      'fastest': min(seconds[2:]),
      'slowest': max(seconds[2:]),
      'first_loss': losses[0],
      'peak_gb': peak_bytes() / 1e9,
  })


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--remat_policy', default='full')
  parser.add_argument('--only', default='')
  options = parser.parse_args()
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  context = multiprocessing.get_context('spawn')
  for side in SIDES:
    if options.only not in side:
      continue
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(options, side, sender))
    process.start()
    sender.close()
    try:
      result = receiver.recv()
    except EOFError:
      print(json.dumps({'side': side, 'failed': True}), flush=True)
      continue
    finally:
      process.join()
    tokens = options.batch_size * 2 * LENGTH
    result['tokens_per_second'] = tokens / result['median_seconds']
    print(json.dumps(result), flush=True)


if __name__ == '__main__':
  main()
