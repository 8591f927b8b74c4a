import dataclasses

import numpy as np
import pytest

from codet5p_jax.conversion import gate
from codet5p_jax.conversion.families import FAMILIES
from codet5p_jax.conversion.huggingface_folder import open_huggingface_folder
from codet5p_jax.errors import UserError


def compare(folder, **changes):
  """Compares a folder with itself, read through its table; changes leaves."""

  def read(path):
    leaf = folder.read(path)
    return changes[path](leaf) if path in changes else leaf

  return gate.compare_modules(folder, folder.read_theirs, read)


@pytest.mark.parametrize('model_type', FAMILIES)
def test_every_module_of_a_right_table_agrees(make_folder, model_type):
  folder = open_huggingface_folder(make_folder(model_type).write())
  read = []
  difference = gate.compare_modules(
      folder,
      folder.read_theirs,
      lambda path: read.append(path) or folder.read(path),
  )
  assert 0 < difference < gate.TOLERANCE / 10
  # Nothing is left out.
  assert set(read) == set(folder.shapes)


@pytest.mark.parametrize('model_type', FAMILIES)
def test_one_wrong_number_in_any_leaf_is_noticed(make_folder, model_type):
  """But for tables of embeddings, of which some rows are compared."""
  folder = open_huggingface_folder(make_folder(model_type).write())
  for path in folder.shapes:
    if path.endswith('layers_1/mlp/wi/kernel') or 'layers_' not in path:

      def spoil(leaf):
        leaf = np.array(leaf)
        leaf[(0,) * leaf.ndim] += 30
        return leaf

      with pytest.raises(UserError, match='compute the same'):
        compare(folder, **{path: spoil})


@pytest.mark.parametrize(
    ('model_type', 'path', 'change', 'module'),
    [
        (
            'codegen',
            'decoder/layers_1/self_attention/query/kernel',
            lambda leaf: np.roll(leaf, 1, axis=1),
            'transformer.h.1',
        ),
        (
            'codet5p',
            'decoder/last_layer/cross_attention/value/kernel',
            lambda leaf: np.roll(leaf, 1, axis=2),
            'decoder.transformer.h.2',
        ),
        (
            't5',
            'encoder/relative_position_bias/embedding',
            lambda leaf: leaf[::-1],
            'encoder.block.0.layer.0.SelfAttention.relative_attention_bias',
        ),
        (
            'codet5p_embedding',
            'projection/kernel',
            lambda leaf: leaf[::-1],
            'proj',
        ),
    ],
)
def test_a_wrong_layout_is_noticed_and_its_module_named(
    make_folder, model_type, path, change, module
):
  folder = open_huggingface_folder(make_folder(model_type).write())
  with pytest.raises(UserError, match=f'expected {module} to compute') as error:
    compare(folder, **{path: change})
  assert '\n' not in str(error.value)


def test_a_wrong_configuration_is_noticed(make_folder):
  """What no tensor shows: rotary width, epsilon, distance of the buckets."""
  for model_type, field, value in (
      ('codegen', 'rotary_dim', 8),
      ('codegen', 'layer_norm_epsilon', 0.2),
      ('t5', 'relative_attention_max_distance', 31),
      ('t5', 'layer_norm_epsilon', 0.2),
  ):
    folder = open_huggingface_folder(
        make_folder(model_type, name=field).write()
    )
    other = dataclasses.replace(
        folder, config={**folder.config, field: value}
    )
    with pytest.raises(UserError, match='compute the same'):
      gate.compare_modules(other, folder.read_theirs, folder.read)


@pytest.mark.parametrize('absent', [False, True])
@pytest.mark.parametrize(
    ('model_type', 'field'),
    [
        ('codegen', 'layer_norm_epsilon'),
        ('codet5p', 'layer_norm_epsilon'),
        ('t5', 'relative_attention_max_distance'),
    ],
)
def test_a_configuration_that_leaves_a_default_out_can_be_compared(
    make_folder, model_type, field, absent
):
  theirs = make_folder(model_type)
  parts = [theirs.config]
  if model_type == 'codet5p':
    parts = [theirs.config['encoder'], theirs.config['decoder']]
  for part in parts:
    part[field] = None
    if absent:
      del part[field]
  folder = open_huggingface_folder(theirs.write())
  compare(folder)


def test_nan_does_not_pass(make_folder):
  folder = open_huggingface_folder(make_folder('codegen').write())
  path = 'decoder/layers_0/mlp/wo/bias'
  with pytest.raises(UserError, match='differ by nan'):
    compare(folder, **{path: lambda leaf: leaf * np.nan})
