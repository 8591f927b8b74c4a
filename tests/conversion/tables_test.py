import dataclasses
import json
import math
import re

import gin
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from codet5p_jax import configuration
from codet5p_jax.conversion.families import (
    FAMILIES,
    family_of,
    family_of_config,
)
from codet5p_jax.conversion.huggingface_folder import our_shapes
from codet5p_jax.conversion.tables import (
    find_tensors,
    fold_names,
    require_agreement,
    their_shapes,
)
from codet5p_jax.errors import UserError
from codet5p_jax.models.bimodal import BimodalConfig, EmbeddingConfig
from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.shallow_encoder_deep_decoder import (
    ShallowEncoderDeepDecoderConfig,
)
from codet5p_jax.models.t5 import T5Config
from tests.conversion.conftest import MODELS

# Distinct weights, and the keys of the released files with their masks.
RELEASED = {
    't5_220m': (257, 257),
    't5_770m': (509, 509),
    'bimodal_220m': (261, 261),
    'embedding_110m': (101, 101),
    'deep_2b': (429, 482),
    'deep_6b': (437, 491),
    'deep_16b': (445, 500),
    'instruct_16b': (445, 500),
}
# Spec 0.2 and 1.1: weights in float16, and masks of bytes.
BYTES = {
    't5_220m': 2 * 222_882_048,
    't5_770m': 2 * 737_639_424,
    'bimodal_220m': 2 * 223_082_754,
    'embedding_110m': 2 * 109_806_208,
    'deep_2b': 6_447_152_128,
    'deep_6b': 15_105_998_848,
    'deep_16b': 33_218_048_000,
    'instruct_16b': 33_218_048_000,
}
SIZES = st.integers(1, 5)


@st.composite
def models(draw, kind):
  """A configuration of a family, of any small sizes."""

  def codegen(num_layers=SIZES):
    heads = 4 * draw(st.integers(1, 2))
    width = 2 * draw(st.integers(1, 3))
    return CodeGenConfig(
        vocab_size=5,
        emb_dim=heads * width,
        num_layers=draw(num_layers),
        num_heads=heads,
        head_dim=width,
        rotary_dim=2,
        mlp_dim=draw(SIZES),
    )

  if kind == 'codegen':
    return codegen()
  if kind == 'codet5p':
    return ShallowEncoderDeepDecoderConfig(
        codegen(), codegen(st.integers(2, 5))
    )
  sizes = {
      'vocab_size': draw(SIZES),
      'emb_dim': draw(SIZES),
      'num_heads': draw(SIZES),
      'head_dim': draw(SIZES),
      'mlp_dim': draw(SIZES),
      'num_encoder_layers': draw(SIZES),
      'relative_attention_num_buckets': 4 * draw(SIZES),
  }
  if kind == 'codet5p_embedding':
    return EmbeddingConfig(**sizes, projection_dim=draw(SIZES))
  if kind == 'codet5p_bimodal':
    return BimodalConfig(
        **sizes, num_decoder_layers=draw(SIZES), projection_dim=draw(SIZES)
    )
  return T5Config(**sizes, num_decoder_layers=draw(SIZES))


@pytest.mark.parametrize('kind', FAMILIES)
@hypothesis.given(st.data(), st.integers(0, 2**32 - 1))
@hypothesis.settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
def test_every_tensor_of_any_sizes_comes_back_bit_by_bit(kind, data, seed):
  model = data.draw(models(kind))
  rows = family_of_config(model).rows(model)
  shapes = our_shapes(model)
  numbers = np.random.default_rng(seed)
  taken = []
  for row in rows:
    ours = [shapes[path].shape for path in row.paths]
    tensor = numbers.integers(
        0, 2**16, row.layout.their_shape(ours), np.uint16
    )
    leaves = row.layout.to_ours(tensor, ours)
    assert [leaf.shape for leaf in leaves] == ours
    np.testing.assert_array_equal(row.layout.to_theirs(leaves), tensor)
    taken += row.paths
  # Each leaf of the network is made, once.
  assert sorted(taken) == sorted(shapes)
  assert len({row.theirs for row in rows}) == len(rows)


@pytest.mark.parametrize('model_type', FAMILIES)
def test_a_configuration_survives_both_directions(model_type):
  family, model = FAMILIES[model_type], MODELS[model_type]
  config = json.loads(json.dumps(family.write_config(model)))
  assert family_of(config['model_type'], 'here') is family
  assert family_of_config(model) is family
  assert family.read_config(config) == model


@pytest.mark.parametrize('model_type', ['codegen', 'codet5p'])
def test_special_tokens_that_a_configuration_lacks_are_the_end_of_a_text(
    model_type,
):
  """Absent or null, as in the released files (spec 1.3)."""
  family, model = FAMILIES[model_type], MODELS[model_type]
  config = family.write_config(model)
  for absent in (False, True):
    for part in (config, config.get('encoder', {}), config.get('decoder', {})):
      for name in ('pad', 'eos', 'decoder_start'):
        part[f'{name}_token_id'] = None
        if absent:
          del part[f'{name}_token_id']
    found = family.read_config(config)
    assert (found.pad_id, found.eos_id, found.decoder_start_id) == (
        50256, 50256, 50256
    )  # fmt: skip


def test_special_tokens_of_the_decoder_count_where_the_composite_names_none():
  family, model = FAMILIES['codet5p'], MODELS['codet5p']
  config = family.write_config(model) | {
      'pad_token_id': None, 'eos_token_id': 21, 'decoder_start_token_id': None
  }  # fmt: skip
  config['decoder'] |= {
      'pad_token_id': 31, 'eos_token_id': 32, 'decoder_start_token_id': 33
  }  # fmt: skip
  found = family.read_config(config)
  assert found == dataclasses.replace(
      model, pad_id=31, eos_id=21, decoder_start_id=33
  )


@pytest.mark.parametrize('model_type', FAMILIES)
def test_special_tokens_are_written_wherever_they_are_looked_for(model_type):
  family, model = FAMILIES[model_type], MODELS[model_type]
  config = family.write_config(model)
  ids = {
      'pad_token_id': model.pad_id,
      'eos_token_id': model.eos_id,
      'decoder_start_token_id': model.decoder_start_id,
  }
  assert len({*ids.values(), 50256}) == 4
  assert ids.items() <= config.items()
  assert ids.items() <= family.token_ids(model).items()
  for stack in ('encoder', 'decoder'):
    found = config.get(stack, {'eos_token_id': model.eos_id})
    assert found['eos_token_id'] == model.eos_id


@pytest.mark.parametrize('name', RELEASED)
def test_released_models_have_the_released_tensors_and_bytes(name):
  model = configuration_of(name)
  family = family_of_config(model)
  tensors = tensor_bytes(family, model)
  masks = family.buffers(model)
  assert (len(tensors) - len(masks), len(tensors)) == RELEASED[name]
  assert sum(tensors.values()) == BYTES[name]
  assert all(re.fullmatch(family.ignored, mask) for mask in masks)


def test_the_composite_has_the_names_of_the_released_index():
  """Spec 2.2, the tensors of one layer and those outside layers."""
  names = set(tensor_bytes(FAMILIES['codet5p'], configuration_of('deep_16b')))
  layer = {
      'ln_1.weight', 'ln_1.bias', 'attn.qkv_proj.weight',
      'attn.out_proj.weight', 'attn.causal_mask', 'mlp.fc_in.weight',
      'mlp.fc_in.bias', 'mlp.fc_out.weight', 'mlp.fc_out.bias',
  }  # fmt: skip
  cross_attention = {
      f'crossattention.{name}'
      for name in (
          'q_attn.weight', 'qkv_proj.weight', 'out_proj.weight', 'causal_mask'
      )
  }  # fmt: skip
  expected = {
      'encoder.wte.weight', 'encoder.ln_f.weight', 'encoder.ln_f.bias',
      'enc_to_dec_proj.weight', 'enc_to_dec_proj.bias',
      'decoder.transformer.wte.weight', 'decoder.transformer.ln_f.weight',
      'decoder.transformer.ln_f.bias', 'decoder.lm_head.weight',
      'decoder.lm_head.bias',
  }  # fmt: skip
  expected |= {f'encoder.h.{i}.{name}' for i in range(20) for name in layer}
  decoder = 'decoder.transformer.h'
  expected |= {f'{decoder}.{i}.{name}' for i in range(34) for name in layer}
  expected |= {f'{decoder}.33.{name}' for name in cross_attention}
  assert names == expected


def tensor_bytes(family, model):
  """Returns the bytes of each tensor of a folder in float16, by name."""
  weights = their_shapes(family.rows(model), our_shapes(model))
  return {name: 2 * math.prod(shape) for name, shape in weights.items()} | {
      name: math.prod(shape) for name, shape in family.buffers(model).items()
  }


def configuration_of(name):
  """Returns the model of a shipped gin file."""
  configuration.load([f'models/{name}.gin'])
  try:
    return configuration.macro('MODEL')
  finally:
    gin.clear_config()


def found_tensors(model_type):
  family, model = FAMILIES[model_type], MODELS[model_type]
  expected = their_shapes(family.rows(model), our_shapes(model))
  found = {
      name: jax.ShapeDtypeStruct(shape, jnp.float16)
      for name, shape in expected.items()
  }
  return family, expected, found


def test_all_that_is_wrong_with_tensors_is_named_in_one_line():
  family, expected, found = found_tensors('t5')
  for layer in range(3):
    del found[f'decoder.block.{layer}.layer.2.layer_norm.weight']
  found['encoder.block.1.adapter.weight'] = found['shared.weight']
  found['encoder.final_layer_norm.weight'] = jax.ShapeDtypeStruct(
      (13,), np.float32
  )
  found['encoder.block.0.layer.0.layer_norm.weight'] = jax.ShapeDtypeStruct(
      (12,), np.int8
  )
  with pytest.raises(UserError) as error:
    find_tensors(family, expected, found, 'here')
  message = str(error.value)
  assert '\n' not in message
  for words in (
      '3 missing (decoder.block.{0-2}.layer.2.layer_norm.weight)',
      '1 unexpected (encoder.block.1.adapter.weight)',
      '1 of shape [13] instead of [12] (encoder.final_layer_norm.weight)',
      '1 of int8 (encoder.block.0.layer.0.layer_norm.weight)',
  ):
    assert words in message


def test_masks_of_any_size_are_no_weights():
  for model_type in ('codegen', 'codet5p'):
    family, expected, found = found_tensors(model_type)
    prefix = 'transformer' if model_type == 'codegen' else 'decoder.transformer'
    found[f'{prefix}.h.1.attn.causal_mask'] = jax.ShapeDtypeStruct(
        (1, 1, 9, 9), np.uint8
    )
    names = find_tensors(family, expected, found, 'here')
    assert names == {name: name for name in expected}


def test_names_of_layers_are_folded():
  names = [f'encoder/layers_{i}/a' for i in (3, 0, 1)] + ['b.7.c', 'd']
  assert fold_names(names) == ['encoder/layers_{0-1,3}/a', 'b.7.c', 'd']


def test_a_configuration_that_contradicts_the_tensors_is_told_field_by_field():
  config = {
      'd_model': 768, 'd_ff': 3072, 'encoder': {'n_layer': 4}, 'embed_dim': '9'
  }  # fmt: skip
  measured = {
      'd_model': 1024, 'd_ff': 3072, 'encoder.n_layer': 3, 'd_kv': 64,
      'embed_dim': 9,
  }  # fmt: skip
  with pytest.raises(UserError) as error:
    require_agreement(config, measured)
  assert 'd_model is 768 but 1024 by the tensors' in str(error.value)
  assert 'encoder.n_layer is 4 but 3 by the tensors' in str(error.value)
  assert "embed_dim is '9' but 9 by the tensors" in str(error.value)
  assert 'd_ff' not in str(error.value) and 'd_kv' not in str(error.value)
  require_agreement(config, {'d_model': 768, 'unknown': None})


@pytest.mark.parametrize('absent', [False, True])
@pytest.mark.parametrize(
    ('model_type', 'theirs', 'ours', 'default'),
    [
        ('t5', 'num_decoder_layers', 'num_decoder_layers', 2),
        (
            't5',
            'relative_attention_max_distance',
            'relative_attention_max_distance',
            128,
        ),
        ('t5', 'decoder_start_token_id', 'decoder_start_id', 0),
        ('codegen', 'n_inner', 'mlp_dim', 4 * 80),
        ('codegen', 'layer_norm_epsilon', 'layer_norm_epsilon', 1e-5),
        ('codet5p', 'indent_with_tabs', 'indent_with_tabs', True),
    ],
)
def test_a_field_that_is_absent_or_null_has_its_default(
    model_type, theirs, ours, default, absent
):
  family, model = FAMILIES[model_type], MODELS[model_type]
  config = family.write_config(model) | {theirs: None}
  if absent:
    del config[theirs]
  assert family.read_config(config) == dataclasses.replace(
      model, **{ours: default}
  )


def test_an_epsilon_may_be_written_as_an_integer():
  for model_type in ('t5', 'codegen'):
    family, model = FAMILIES[model_type], MODELS[model_type]
    config = family.write_config(model) | {'layer_norm_epsilon': 1}
    epsilon = family.read_config(config).layer_norm_epsilon
    assert isinstance(epsilon, float) and epsilon == 1


@pytest.mark.parametrize(
    ('model_type', 'changes', 'match'),
    [
        ('t5', {'d_model': None}, 'd_model in .* an integer, found none'),
        ('t5', {'d_model': 7.5}, 'd_model in .* an integer, found 7.5'),
        ('t5', {'d_model': True}, 'd_model in .* an integer, found True'),
        ('t5', {'num_decoder_layers': '3'}, "_layers .* an integer, found '3'"),
        (
            't5',
            {'relative_attention_max_distance': '128'},
            "max_distance in config.json to be an integer, found '128'",
        ),
        (
            't5',
            {'decoder_start_token_id': 'a'},
            "decoder_start_token_id .* an integer, found 'a'",
        ),
        ('codegen', {'n_inner': '53'}, "n_inner .* an integer, found '53'"),
        (
            'codegen',
            {'layer_norm_epsilon': '1e-5'},
            "layer_norm_epsilon in .* a number, found '1e-5'",
        ),
        ('t5', {'feed_forward_proj': 'gated-gelu'}, "'relu'.*'gated-gelu'"),
        ('t5', {'tie_word_embeddings': False}, 'tie_word_embeddings.*False'),
        ('codegen', {'activation_function': 'relu'}, "'gelu_new'.*'relu'"),
        ('codegen', {'n_head': 7}, 'a multiple of n_head, found 80 and 7'),
        ('codegen', {'n_head': 0}, 'a multiple of n_head, found 80 and 0'),
        ('codet5p', {'encoder': None}, 'encoder in config.json to hold'),
        (
            'codet5p',
            {'indent_with_tabs': 1},
            'indent_with_tabs in .* true or false, found 1',
        ),
    ],
)
def test_what_our_networks_do_not_compute_is_refused(
    model_type, changes, match
):
  family = FAMILIES[model_type]
  config = family.write_config(MODELS[model_type]) | changes
  with pytest.raises(UserError, match=match) as error:
    family.read_config(config)
  assert '\n' not in str(error.value)


def test_what_is_no_family_is_refused():
  with pytest.raises(UserError, match="among t5, .*found 'llama'"):
    family_of('llama', 'config.json')
  with pytest.raises(UserError, match='found None'):
    family_of(None, 'config.json')
  model = dataclasses.make_dataclass('Other', [])()
  with pytest.raises(UserError, match='released family, found a Other'):
    family_of_config(model)
