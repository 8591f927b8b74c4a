"""T5 in Hugging Face's layout: 220M and 770M, bimodal, embedding.

Names and shapes: transformers' `T5ForConditionalGeneration`, and the released
repositories' own classes, which add `proj` and `itm_head`. The table of
embeddings goes by four names there, any of which a file may have; an export
has `shared.weight`, to which transformers ties the others. The temperature of
the similarities, which only training needs, has no place there. Nor have the
task tokens in the released config.json, which all have the same; an export has
a field for each.
"""

import re
from collections.abc import Mapping
from typing import Any

from codet5p_jax.conversion.layouts import (
    FROM_HEADS,
    SAME,
    TO_HEADS,
    TRANSPOSED,
)
from codet5p_jax.conversion.tables import (
    Family,
    Row,
    count_layers,
    field,
    require_field,
    sizes,
    within,
)
from codet5p_jax.models.bimodal import BimodalConfig, EmbeddingConfig
from codet5p_jax.models.t5 import T5Config

_TABLE_NAMES = (
    'shared.weight',
    'encoder.embed_tokens.weight',
    'decoder.embed_tokens.weight',
    'lm_head.weight',
)

_ATTENTION = (
    Row('q.weight', 'query/kernel', TO_HEADS),
    Row('k.weight', 'key/kernel', TO_HEADS),
    Row('v.weight', 'value/kernel', TO_HEADS),
    Row('o.weight', 'out/kernel', FROM_HEADS),
)
_MLP = (
    Row('wi.weight', 'mlp/wi/kernel', TRANSPOSED),
    Row('wo.weight', 'mlp/wo/kernel', TRANSPOSED),
)
_ENCODER_LAYER = (
    Row('0.layer_norm.weight', 'pre_attention_layer_norm/scale', SAME),
    *within('0.SelfAttention.', 'self_attention/', _ATTENTION),
    Row('1.layer_norm.weight', 'pre_mlp_layer_norm/scale', SAME),
    *within('1.DenseReluDense.', '', _MLP),
)
_DECODER_LAYER = (
    Row('0.layer_norm.weight', 'pre_self_attention_layer_norm/scale', SAME),
    *within('0.SelfAttention.', 'self_attention/', _ATTENTION),
    Row('1.layer_norm.weight', 'pre_cross_attention_layer_norm/scale', SAME),
    *within('1.EncDecAttention.', 'cross_attention/', _ATTENTION),
    Row('2.layer_norm.weight', 'pre_mlp_layer_norm/scale', SAME),
    *within('2.DenseReluDense.', '', _MLP),
)
_STACK = (
    # Layer 0's alone; the others of the stack share it.
    Row(
        'block.0.layer.0.SelfAttention.relative_attention_bias.weight',
        'relative_position_bias/embedding',
        SAME,
    ),
    Row('final_layer_norm.weight', 'final_layer_norm/scale', SAME),
)
_EMBEDDINGS = (Row('shared.weight', 'token_embedder/embedding', SAME),)
_PROJECTION = (
    Row('proj.weight', 'projection/kernel', TRANSPOSED),
    Row('proj.bias', 'projection/bias', SAME),
)
_MATCHING_HEAD = (
    Row('itm_head.weight', 'matching_head/kernel', TRANSPOSED),
    Row('itm_head.bias', 'matching_head/bias', SAME),
)
# Fields of our configuration and of config.json.
_TASK_TOKENS = {
    'match_id': 'match_token_id',
    'text_decoder_id': 'text_decoder_token_id',
    'code_decoder_id': 'code_decoder_token_id',
}


def _stack(
    stack: str, layer: tuple[Row, ...], num_layers: int
) -> tuple[Row, ...]:
  rows = list(within(f'{stack}.', f'{stack}/', _STACK))
  for i in range(num_layers):
    rows += within(f'{stack}.block.{i}.layer.', f'{stack}/layers_{i}/', layer)
  return tuple(rows)


def _encoder(config: Any) -> tuple[Row, ...]:
  return _stack('encoder', _ENCODER_LAYER, config.num_encoder_layers)


def _t5_rows(config: Any) -> tuple[Row, ...]:
  decoder = _stack('decoder', _DECODER_LAYER, config.num_decoder_layers)
  return _EMBEDDINGS + _encoder(config) + decoder


def _bimodal_rows(config: BimodalConfig) -> tuple[Row, ...]:
  return _t5_rows(config) + _PROJECTION + _MATCHING_HEAD


def _embedding_rows(config: EmbeddingConfig) -> tuple[Row, ...]:
  return _EMBEDDINGS + _encoder(config) + _PROJECTION


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields that our three configurations share."""
  require_field(config, 'feed_forward_proj', ['relu'])
  require_field(config, 'tie_word_embeddings', [True])
  fields = {
      ours: field(config, theirs)
      for ours, theirs in {
          'vocab_size': 'vocab_size',
          'emb_dim': 'd_model',
          'num_heads': 'num_heads',
          'head_dim': 'd_kv',
          'mlp_dim': 'd_ff',
          'num_encoder_layers': 'num_layers',
          'relative_attention_num_buckets': 'relative_attention_num_buckets',
      }.items()
  }
  return fields | {
      # Absent from files older than the field; 128 was built in.
      'relative_attention_max_distance': field(
          config, 'relative_attention_max_distance', default=128
      ),
      'layer_norm_epsilon': field(config, 'layer_norm_epsilon', float),
      'pad_id': field(config, 'pad_token_id'),
      'eos_id': field(config, 'eos_token_id'),
      'decoder_start_id': field(config, 'decoder_start_token_id', default=0),
  }


def _read_decoder(config: Mapping[str, Any]) -> dict[str, Any]:
  # As transformers: as many as the encoder's unless said otherwise.
  layers = field(
      config, 'num_decoder_layers', default=field(config, 'num_layers')
  )
  return {'num_decoder_layers': layers}


def _read_t5(config: Mapping[str, Any]) -> T5Config:
  return T5Config(**_read_fields(config), **_read_decoder(config))


def _read_bimodal(config: Mapping[str, Any]) -> BimodalConfig:
  return BimodalConfig(
      **_read_fields(config),
      **_read_decoder(config),
      projection_dim=field(config, 'embed_dim'),
      **{
          ours: field(config, theirs, default=getattr(BimodalConfig, ours))
          for ours, theirs in _TASK_TOKENS.items()
      },
  )


def _read_embedding(config: Mapping[str, Any]) -> EmbeddingConfig:
  return EmbeddingConfig(
      **_read_fields(config), projection_dim=field(config, 'embed_dim')
  )


def _write_fields(config: Any) -> dict[str, Any]:
  return {
      'vocab_size': config.vocab_size,
      'd_model': config.emb_dim,
      'd_kv': config.head_dim,
      'd_ff': config.mlp_dim,
      'num_layers': config.num_encoder_layers,
      'num_heads': config.num_heads,
      'feed_forward_proj': 'relu',
      'dense_act_fn': 'relu',
      'is_gated_act': False,
      'relative_attention_num_buckets': config.relative_attention_num_buckets,
      'relative_attention_max_distance': config.relative_attention_max_distance,
      'layer_norm_epsilon': config.layer_norm_epsilon,
      'initializer_factor': 1.0,
      'dropout_rate': 0.1,
      'n_positions': 512,
      'use_cache': True,
      # Tied, and so the decoder's states are scaled by d_model^-0.5.
      'tie_word_embeddings': True,
      **_token_ids(config),
  }


def _token_ids(config: Any) -> dict[str, int]:
  return {
      'pad_token_id': config.pad_id,
      'bos_token_id': 1,
      'eos_token_id': config.eos_id,
      'decoder_start_token_id': config.decoder_start_id,
  }


def _write_t5(config: T5Config) -> dict[str, Any]:
  return {
      'model_type': 't5',
      'is_encoder_decoder': True,
      **_write_fields(config),
      'num_decoder_layers': config.num_decoder_layers,
  }


def _write_bimodal(config: BimodalConfig) -> dict[str, Any]:
  return _write_t5(config) | {
      'model_type': 'codet5p_bimodal',
      'embed_dim': config.projection_dim,
      **{
          theirs: getattr(config, ours) for ours, theirs in _TASK_TOKENS.items()
      },
  }


def _write_embedding(config: EmbeddingConfig) -> dict[str, Any]:
  return {
      'model_type': 'codet5p_embedding',
      'is_encoder_decoder': False,
      **_write_fields(config),
      'embed_dim': config.projection_dim,
  }


def _measure_encoder(
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, int | None]:
  attention = 'encoder.block.0.layer.0.SelfAttention'
  buckets, heads = sizes(shapes, f'{attention}.relative_attention_bias.weight')
  outputs, _ = sizes(shapes, f'{attention}.q.weight')
  mlp, _ = sizes(shapes, 'encoder.block.0.layer.1.DenseReluDense.wi.weight')
  vocab = embed = None
  for name in _TABLE_NAMES:
    if vocab is None:
      vocab, embed = sizes(shapes, name)
  return {
      'vocab_size': vocab,
      'd_model': embed,
      'd_kv': outputs // heads if outputs and heads else None,
      'd_ff': mlp,
      'num_heads': heads,
      'num_layers': count_layers(shapes, r'encoder\.block\.(\d+)\.'),
      'relative_attention_num_buckets': buckets,
  }


def _measure_t5(
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, int | None]:
  return _measure_encoder(shapes) | {
      'num_decoder_layers': count_layers(shapes, r'decoder\.block\.(\d+)\.')
  }


def _measure_bimodal(
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, int | None]:
  return _measure_t5(shapes) | _measure_projection(shapes)


def _measure_embedding(
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, int | None]:
  return _measure_encoder(shapes) | _measure_projection(shapes)


def _measure_projection(
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, int | None]:
  return {'embed_dim': sizes(shapes, 'proj.weight')[0]}


_OBSOLETE = re.escape(
    'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
)
_ALIASES = {_TABLE_NAMES[0]: _TABLE_NAMES[1:]}

T5 = Family(
    model_type='t5',
    config_class=T5Config,
    vocabulary_kind='codet5',
    rows=_t5_rows,
    read_config=_read_t5,
    write_config=_write_t5,
    measure=_measure_t5,
    token_ids=_token_ids,
    aliases=_ALIASES,
    ignored=_OBSOLETE,
)
BIMODAL = Family(
    model_type='codet5p_bimodal',
    config_class=BimodalConfig,
    vocabulary_kind='codet5_bimodal',
    rows=_bimodal_rows,
    read_config=_read_bimodal,
    write_config=_write_bimodal,
    measure=_measure_bimodal,
    token_ids=_token_ids,
    aliases=_ALIASES,
    ignored=_OBSOLETE,
)
EMBEDDING = Family(
    model_type='codet5p_embedding',
    config_class=EmbeddingConfig,
    vocabulary_kind='codet5_bimodal',
    rows=_embedding_rows,
    read_config=_read_embedding,
    write_config=_write_embedding,
    measure=_measure_embedding,
    token_ids=_token_ids,
    aliases={_TABLE_NAMES[0]: ('encoder.embed_tokens.weight',)},
)
