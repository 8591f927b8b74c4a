"""Converts a synthetic CodeT5+ 2B, and measures memory and time.

Makes a folder in the released layout (one pytorch_model.bin of 6.4 GB: random
float16 under the names of the released model, masks of bytes), and converts it
to ours, and that back, each in a child process. Reports

* anonymous resident memory (RssAnon in /proc/<pid>/status; pages of mapped
  files do not count, for the system takes those back when it needs them), the
  largest seen, over that of the same program when it has imported what it
  needs and has compiled one module;
* the time, against copying the source's bytes with `shutil.copyfile`.

Needs 20 GB of disk and PyTorch.

  python benchmarks/convert.py --folder /scratch
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

# What a child runs. It waits for a line before the conversion, so that its
# memory can be looked at.
CHILD = '''
import sys
import jax, torch
import orbax.checkpoint, safetensors.numpy
from codet5p_jax.runs.convert import convert
jax.jit(lambda x: x @ x.T)(jax.numpy.ones((64, 64))).block_until_ready()
print('ready', flush=True)
sys.stdin.readline()
convert(sys.argv[1], sys.argv[2])
'''


def make_model(layers: int | None):
  """Returns the configuration of 2B, or of its first layers."""
  import dataclasses

  from codet5p_jax import configuration

  configuration.load(['models/deep_2b.gin'])
  model = configuration.macro('MODEL')
  if layers is None:
    return model
  return dataclasses.replace(
      model,
      encoder=dataclasses.replace(model.encoder, num_layers=layers),
      decoder=dataclasses.replace(model.decoder, num_layers=layers),
  )


def write_source(folder: pathlib.Path, layers: int | None) -> None:
  """Writes the synthetic folder."""
  import json

  import torch

  from codet5p_jax.conversion.codegen import COMPOSITE
  from codet5p_jax.conversion.huggingface_folder import our_shapes
  from codet5p_jax.conversion.tables import their_shapes

  model = make_model(layers)
  shapes = their_shapes(COMPOSITE.rows(model), our_shapes(model))
  generator = torch.Generator().manual_seed(0)
  tensors = {}
  for name, shape in shapes.items():
    tensors[name] = torch.empty(shape, dtype=torch.float16)
    tensors[name].normal_(0, 0.02, generator=generator)
    if name.endswith(('ln_1.weight', 'ln_f.weight')):
      tensors[name] += 1
  for name, shape in COMPOSITE.buffers(model).items():
    tensors[name] = torch.tril(torch.ones(shape, dtype=torch.uint8))
  folder.mkdir()
  torch.save(tensors, folder / 'pytorch_model.bin')
  config = COMPOSITE.write_config(model) | {'torch_dtype': 'float16'}
  (folder / 'config.json').write_text(json.dumps(config))


def anonymous_bytes(process: int) -> int:
  """Returns RssAnon of a process, 0 when it has ended."""
  try:
    status = pathlib.Path(f'/proc/{process}/status').read_text()
    return 1024 * int(re.search(r'RssAnon:\s+(\d+)', status)[1])
  except (OSError, TypeError):
    return 0


def convert(source: pathlib.Path, target: pathlib.Path) -> dict[str, float]:
  """Converts in a child; returns bytes and seconds."""
  process = subprocess.Popen(
      [sys.executable, '-c', CHILD, str(source), str(target)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  assert process.stdout.readline() == 'ready\n'
  base = anonymous_bytes(process.pid)
  begin = time.perf_counter()
  process.stdin.write('\n')
  process.stdin.close()
  largest = base
  while process.poll() is None:
    largest = max(largest, anonymous_bytes(process.pid))
    time.sleep(0.02)
  assert process.returncode == 0
  return {
      'seconds': time.perf_counter() - begin,
      'base': base,
      'over': largest - base,
  }


def copy(source: pathlib.Path, target: pathlib.Path) -> float:
  """Copies a file, onto the disk; returns seconds."""
  begin = time.perf_counter()
  shutil.copyfile(source, target)
  with open(target, 'rb') as file:
    os.fsync(file.fileno())
  return time.perf_counter() - begin


def compare(one: pathlib.Path, other: pathlib.Path) -> int:
  """Compares all tensors of two folders; returns their number."""
  from codet5p_jax.conversion.tensor_files import TensorFiles

  first, second = TensorFiles(one), TensorFiles(other)
  assert first.shapes.keys() == second.shapes.keys()
  for name in first.shapes:
    x, y = first.read(name), second.read(name)
    assert (x.dtype, x.shape) == (y.dtype, y.shape), name
    assert np.array_equal(x.view(np.uint8), y.view(np.uint8)), name
  return len(first.shapes)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--folder', help='where 20 GB are free')
  parser.add_argument('--layers', type=int, help='of each stack, for a trial')
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
    folder = pathlib.Path(name)
    # In a child too: 6.4 GB of tensors are no part of what is measured.
    code = (
        f'import pathlib; from benchmarks.convert import write_source; '
        f'write_source(pathlib.Path({name!r}, "theirs"), {arguments.layers})'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
    file = folder / 'theirs/pytorch_model.bin'
    seconds = copy(file, folder / 'copy')
    (folder / 'copy').unlink()
    print(
        f'{file.stat().st_size / 1e9:.2f} GB; copied in {seconds:.0f} s',
        flush=True,
    )
    for source, target in (('theirs', 'ours'), ('ours', 'back')):
      numbers = convert(folder / source, folder / target)
      print(
          f'{source} to {target}: {numbers["seconds"]:.0f} s, '
          f'{numbers["seconds"] / seconds:.1f} times the copy; anonymous '
          f'memory {numbers["over"] / 1e9:.2f} GB over '
          f'{numbers["base"] / 1e9:.2f} GB',
          flush=True,
      )
    count = compare(folder / 'theirs', folder / 'back')
    print(f'{count} tensors are bit by bit the same after both ways')


if __name__ == '__main__':
  main()
