"""Folders as the exporter makes them, loaded as users do.

Is skipped, when pytest looks for doctests here, without torch and transformers.
Tests that import it skip before: a skipped import leaves half a module behind.
"""

import contextlib
import json
import shutil
import sys

import numpy as np
import pytest

from codet5p_jax.conversion.remote_code import find_remote_code

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
safetensors_numpy = pytest.importorskip('safetensors.numpy')

BATCH, SOURCE_LENGTH, TARGET_LENGTH = 3, 7, 5


def draw(shapes, seed=0):
  """Weights that hide nothing; masks are what they are."""
  numbers = np.random.default_rng(seed)
  tensors = {}
  for name, shape in shapes.items():
    if name.endswith('causal_mask'):
      tensors[name] = np.tri(shape[-1], dtype=np.uint8)[None, None]
      continue
    if name.endswith('bias'):
      values = numbers.normal(0, 0.5, shape)
    elif len(shape) == 1:
      values = numbers.uniform(0.5, 1.5, shape)
    elif name.endswith(('wte.weight', 'shared.weight')):
      values = numbers.normal(0, 1, shape)
    else:
      values = numbers.normal(0, 1.3 * shape[-1] ** -0.5, shape)
    tensors[name] = values.astype(np.float32)
  return tensors


def write_folder(folder, model_type, config, tensors):
  """Writes a folder as the exporter does."""
  code = find_remote_code(model_type)
  config = config | {
      'model_type': model_type,
      'architectures': [code.architecture],
      'auto_map': code.auto_map,
  }
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config))
  for file in code.files:
    shutil.copy(file, folder)
  safetensors_numpy.save_file(
      tensors, folder / 'model.safetensors', metadata={'format': 'pt'}
  )
  return folder


@contextlib.contextmanager
def code_kept_in(folder):
  """Keeps transformers' copies of folders' code out of the home folder."""
  package = 'transformers_modules'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
        transformers.dynamic_module_utils, 'HF_MODULES_CACHE', str(folder)
    )
    patch.syspath_prepend(str(folder))
    # Python would look for more modules of the package where the first was.
    for name in [x for x in sys.modules if x.split('.')[0] == package]:
      patch.delitem(sys.modules, name)
    yield
    for name in [x for x in sys.modules if x.split('.')[0] == package]:
      del sys.modules[name]


def load(automatic, folder, **options):
  """Loads as users do; every tensor must be accounted for."""
  model, found = getattr(transformers, automatic).from_pretrained(
      folder, trust_remote_code=True, output_loading_info=True, **options
  )
  assert not any(found[x] for x in ('missing_keys', 'unexpected_keys'))
  assert not found['mismatched_keys']
  return model.eval()


def make_batch(seed=1):
  """Ids and masks of a batch, padded on the right."""
  numbers = np.random.default_rng(seed)
  lengths = np.array([[SOURCE_LENGTH, 4, 6], [2, TARGET_LENGTH, 3]])
  padded = (SOURCE_LENGTH, TARGET_LENGTH)
  ids = [numbers.integers(3, 80, (BATCH, length)) for length in padded]
  masks = [
      (np.arange(length) < of_row[:, None]).astype(int)
      for length, of_row in zip(padded, lengths, strict=True)
  ]
  names = ('input_ids', 'decoder_input_ids')
  names += ('attention_mask', 'decoder_attention_mask')
  return {
      name: torch.from_numpy(array)
      for name, array in zip(names, ids + masks, strict=True)
  }


def run(model, batch, **more):
  with torch.no_grad():
    return model(**(batch | more))
