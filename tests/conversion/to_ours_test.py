import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.conversion import gate
from codet5p_jax.conversion.tokenizer_files import write_tokenizer
from codet5p_jax.errors import UserError
from codet5p_jax.runs.convert import convert
from codet5p_jax.training.checkpoints.weights import (
    SavedWeights,
    load_weights,
)
from tests.conversion.conftest import MODELS


def to_ours(source, tmp_path):
  convert(str(source), str(tmp_path / 'ours'))
  return tmp_path / 'ours'


def test_a_vocabulary_larger_than_the_model_is_refused(
    make_folder, tmp_path, small_vocabularies
):
  source = make_folder('t5').write()
  write_tokenizer(small_vocabularies['codet5'], source)
  with pytest.raises(UserError, match='at most 131 ids, .*found one of 700'):
    to_ours(source, tmp_path)
  assert os.listdir(tmp_path) == ['theirs']


def test_a_converted_model_is_loaded_by_what_trains(
    make_folder, tmp_path
):
  """Scanned, padded and cast to float32, from float16 on disk."""
  folder = make_folder('codet5p_bimodal')
  ours = to_ours(folder.write(), tmp_path)
  model = MODELS['codet5p_bimodal'].make_model()
  abstract = jax.eval_shape(
      lambda: jax.tree.map(
          lambda x: x.value,
          model.init_params(jax.random.key(0)),
          is_leaf=lambda x: hasattr(x, 'value'),
      )
  )
  params, metadata = load_weights(ours / 'model', abstract)
  assert metadata['step'] == 0
  table = params['token_embedder']['embedding']
  assert table.shape == (256, 12) and table.dtype == jnp.float32
  np.testing.assert_array_equal(
      table[:131], folder.tensors['shared.weight'].astype(np.float32)
  )
  assert not table[131:].any()
  np.testing.assert_array_equal(
      params['decoder']['layers']['mlp']['wo']['kernel'][2],
      folder.tensors['decoder.block.2.layer.2.DenseReluDense.wo.weight'].T,
  )


def test_what_computes_something_else_is_deleted(
    make_folder, tmp_path, monkeypatch
):
  folder = make_folder('codegen')
  source = folder.write()
  ours = to_ours(source, tmp_path)
  monkeypatch.setattr(gate, 'TOLERANCE', 1e-12)
  for path, target in ((source, 'other'), (ours, 'back')):
    with pytest.raises(UserError, match='expected transformer.* to compute'):
      convert(str(path), str(tmp_path / target))
  assert sorted(os.listdir(tmp_path)) == ['ours', 'theirs']


def test_bits_that_are_not_those_written_are_noticed(
    make_folder, tmp_path, monkeypatch
):
  source = make_folder('codegen').write()
  read = SavedWeights.read

  def flip(self, path):
    leaf = np.array(read(self, path))
    if path == 'decoder/token_embedder/embedding':
      leaf.view(np.uint16)[77, 5] ^= 1
    return leaf

  monkeypatch.setattr(SavedWeights, 'read', flip)
  with pytest.raises(UserError, match='bits that were written, found others'):
    to_ours(source, tmp_path)
  assert os.listdir(tmp_path) == ['theirs']


def test_nan_leaves_nothing(make_folder, tmp_path):
  folder = make_folder('codegen')
  folder.tensors['transformer.ln_f.bias'][2] = np.nan
  with pytest.raises(UserError, match='NaN or infinity in decoder/final_layer'):
    to_ours(folder.write(), tmp_path)
  assert os.listdir(tmp_path) == ['theirs']
