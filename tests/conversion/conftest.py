"""Tiny models of each family, in Hugging Face's layout, of random bits."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from codet5p_jax.conversion.families import FAMILIES
from codet5p_jax.conversion.huggingface_folder import our_shapes
from codet5p_jax.conversion.tables import their_shapes
from codet5p_jax.models.bimodal import BimodalConfig, EmbeddingConfig
from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.shallow_encoder_deep_decoder import (
    ShallowEncoderDeepDecoderConfig,
)
from codet5p_jax.models.t5 import T5Config
from tests.data.conftest import (  # noqa: F401. Fixtures, for tests here too.
    small_codegen_files,
    small_codet5_files,
    small_vocabularies,
    training_texts,
)

# All sizes differ. CodeGen's fused layout needs heads in fours, and a width
# that they divide.
T5_SIZES = {
    'vocab_size': 131,
    'emb_dim': 12,
    'num_heads': 5,
    'head_dim': 7,
    'mlp_dim': 29,
    'num_encoder_layers': 2,
    'relative_attention_num_buckets': 16,
    'relative_attention_max_distance': 20,
    'layer_norm_epsilon': 0.03,
    'pad_id': 8,
    'eos_id': 9,
    'decoder_start_id': 10,
}
ENCODER = CodeGenConfig(
    vocab_size=131,
    emb_dim=24,
    num_layers=2,
    num_heads=4,
    head_dim=6,
    rotary_dim=4,
    mlp_dim=31,
    layer_norm_epsilon=0.02,
)
DECODER = dataclasses.replace(
    ENCODER,
    emb_dim=80,
    num_layers=3,
    num_heads=8,
    head_dim=10,
    rotary_dim=6,
    mlp_dim=53,
    layer_norm_epsilon=0.05,
)
# Within the vocabulary, as transformers asks for.
IDS = {'pad_id': 11, 'eos_id': 12, 'decoder_start_id': 13}
MODELS = {
    't5': T5Config(**T5_SIZES, num_decoder_layers=3),
    'codet5p_bimodal': BimodalConfig(
        **T5_SIZES, num_decoder_layers=3, projection_dim=17
    ),
    'codet5p_embedding': EmbeddingConfig(**T5_SIZES, projection_dim=17),
    'codegen': dataclasses.replace(DECODER, **IDS),
    'codet5p': ShallowEncoderDeepDecoderConfig(ENCODER, DECODER, **IDS),
}


def draw_tensors(model_type, model, dtype=np.float16, seed=0):
  """Returns random weights of order one by their names; buffers too."""
  family = FAMILIES[model_type]
  numbers = np.random.default_rng(seed)
  shapes = their_shapes(family.rows(model), our_shapes(model))
  tensors = {
      name: (0.3 * numbers.standard_normal(shape)).astype(dtype)
      for name, shape in shapes.items()
  }
  # The order of a released file says nothing: not that of the table.
  numbers.shuffle(names := list(tensors))
  tensors = {name: tensors[name] for name in names}
  return tensors | {
      name: np.tril(np.ones(shape, np.uint8))
      for name, shape in family.buffers(model).items()
  }


@dataclasses.dataclass
class Folder:
  """A folder in Hugging Face's layout, to be written in any form.

  Attributes:
    path: where.
    config: config.json.
    tensors: by name.
  """

  path: object
  config: dict
  tensors: dict

  def write(self, form='safetensors', shards=1, index=True):
    self.path.mkdir(parents=True, exist_ok=True)
    (self.path / 'config.json').write_text(json.dumps(self.config))
    stem = {'safetensors': 'model', 'bin': 'pytorch_model'}[form]
    places = {}
    for number in range(1, shards + 1):
      name = f'{stem}.{form}'
      if shards > 1:
        name = f'{stem}-{number:05}-of-{shards:05}.{form}'
      part = dict(list(self.tensors.items())[number - 1 :: shards])
      places |= dict.fromkeys(part, name)
      write_tensors(self.path / name, part)
    if shards > 1 and index:
      content = {'metadata': {}, 'weight_map': places}
      path = self.path / f'{stem}.{form}.index.json'
      path.write_text(json.dumps(content))
    return self.path


def write_tensors(path, tensors):
  if path.suffix == '.bin':
    torch = pytest.importorskip('torch')
    torch.save(
        {name: torch.from_numpy(array) for name, array in tensors.items()},
        path,
    )
    return
  from safetensors.numpy import save_file

  save_file(tensors, path, metadata={'format': 'pt'})


def random_folder(
    above, model_type, name='theirs', dtype=np.float16, seed=0
):
  """Returns a Folder of random weights, not yet written."""
  model = MODELS[model_type]
  config = FAMILIES[model_type].write_config(model)
  tensors = draw_tensors(model_type, model, dtype, seed)
  config = config | {'torch_dtype': np.dtype(dtype).name}
  return Folder(above / name, config, tensors)


@pytest.fixture
def make_folder(tmp_path):
  """See `random_folder`."""
  return functools.partial(random_folder, tmp_path)
