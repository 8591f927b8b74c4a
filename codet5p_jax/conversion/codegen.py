"""CodeGen in Hugging Face's layout, and the composite made of two of them.

Names and shapes: spec section 2.2, the 500 keys of the released 16B index. Two
traps (both are `FusedHeads`): the fused projection is queries, values, keys in
each of four chunks, and that of cross-attention is values, keys. The released
files also hold a lower triangle of bytes for each attention: written in the
composite's layout, which has them, and dropped when read.
"""

import re
from collections.abc import Mapping
from typing import Any

from codet5p_jax.conversion.layouts import (
    FROM_HEADS,
    FUSED_HEADS,
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
from codet5p_jax.errors import UserError
from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.shallow_encoder_deep_decoder import (
    ShallowEncoderDeepDecoderConfig,
)

# Of the released models; no weight has this size, only the triangles of bytes.
_NUM_POSITIONS = 2048
# Where config.json names no token for one of these, as the released ones do.
_END_OF_TEXT = 50256
_IDS = {
    'pad_id': 'pad_token_id',
    'eos_id': 'eos_token_id',
    'decoder_start_id': 'decoder_start_token_id',
}

_NORM = (
    Row('weight', 'scale', SAME),
    Row('bias', 'bias', SAME),
)
_LINEAR = (
    Row('weight', 'kernel', TRANSPOSED),
    Row('bias', 'bias', SAME),
)
_LAYER = (
    *within('ln_1.', 'layer_norm/', _NORM),
    Row(
        'attn.qkv_proj.weight',
        (
            'self_attention/query/kernel',
            'self_attention/value/kernel',
            'self_attention/key/kernel',
        ),
        FUSED_HEADS,
    ),
    Row('attn.out_proj.weight', 'self_attention/out/kernel', FROM_HEADS),
    *within('mlp.fc_in.', 'mlp/wi/', _LINEAR),
    *within('mlp.fc_out.', 'mlp/wo/', _LINEAR),
)
_CROSS_ATTENTION = (
    Row('q_attn.weight', 'query/kernel', TO_HEADS),
    Row('qkv_proj.weight', ('value/kernel', 'key/kernel'), FUSED_HEADS),
    Row('out_proj.weight', 'out/kernel', FROM_HEADS),
)
_ENDS = (
    Row('wte.weight', 'token_embedder/embedding', SAME),
    *within('ln_f.', 'final_layer_norm/', _NORM),
)
_HEAD = (
    # Vocabulary first in both.
    Row('lm_head.weight', 'decoder/output_head/kernel', SAME),
    Row('lm_head.bias', 'decoder/output_head/bias', SAME),
)


def _stack(theirs: str, ours: str, num_layers: int) -> tuple[Row, ...]:
  rows = list(within(theirs, ours, _ENDS))
  for i in range(num_layers):
    rows += within(f'{theirs}h.{i}.', f'{ours}layers_{i}/', _LAYER)
  return tuple(rows)


def _codegen_rows(config: CodeGenConfig) -> tuple[Row, ...]:
  return _stack('transformer.', 'decoder/', config.num_layers) + _HEAD


def _composite_rows(
    config: ShallowEncoderDeepDecoderConfig,
) -> tuple[Row, ...]:
  last = config.decoder.num_layers - 1
  layer = f'decoder.transformer.h.{last}.'
  return (
      *_stack('encoder.', 'encoder/', config.encoder.num_layers),
      *within('enc_to_dec_proj.', 'encoder_to_decoder/', _LINEAR),
      *_stack('decoder.transformer.', 'decoder/', last),
      *within(layer, 'decoder/last_layer/', _LAYER),
      *within(
          f'{layer}crossattention.',
          'decoder/last_layer/cross_attention/',
          _CROSS_ATTENTION,
      ),
      *within('decoder.', '', _HEAD),
  )


def _composite_buffers(
    config: ShallowEncoderDeepDecoderConfig,
) -> dict[str, tuple[int, ...]]:
  decoder = 'decoder.transformer.h'
  last = config.decoder.num_layers - 1
  names = [
      *(f'encoder.h.{i}.attn' for i in range(config.encoder.num_layers)),
      *(f'{decoder}.{i}.attn' for i in range(config.decoder.num_layers)),
      f'{decoder}.{last}.crossattention',
  ]
  shape = (1, 1, _NUM_POSITIONS, _NUM_POSITIONS)
  return {f'{name}.causal_mask': shape for name in names}


def _read_ids(*places: Mapping[str, Any]) -> dict[str, int]:
  """Returns our names of special tokens, each from the first that has it."""
  found: dict[str, Any] = {}
  for place in reversed(places):
    found |= {name: x for name, x in place.items() if x is not None}
  return {
      ours: field(found, theirs, default=_END_OF_TEXT)
      for ours, theirs in _IDS.items()
  }


def _read_codegen(config: Mapping[str, Any]) -> CodeGenConfig:
  return _read_stack(config, _read_ids(config))


def _read_stack(
    config: Mapping[str, Any], ids: Mapping[str, int]
) -> CodeGenConfig:
  require_field(config, 'activation_function', ['gelu_new'])
  require_field(config, 'tie_word_embeddings', [False])
  require_field(config, 'scale_attn_weights', [True])
  embed, heads = field(config, 'n_embd'), field(config, 'n_head')
  if heads < 1 or embed % heads:
    raise UserError(
        f'expected n_embd in config.json to be a multiple of n_head, found '
        f'{embed} and {heads}; correct the file'
    )
  return CodeGenConfig(
      vocab_size=field(config, 'vocab_size'),
      emb_dim=embed,
      num_layers=field(config, 'n_layer'),
      num_heads=heads,
      head_dim=embed // heads,
      rotary_dim=field(config, 'rotary_dim'),
      mlp_dim=field(config, 'n_inner', default=4 * embed),
      layer_norm_epsilon=field(
          config, 'layer_norm_epsilon', float, default=1e-5
      ),
      **ids,
  )


def _read_composite(
    config: Mapping[str, Any],
) -> ShallowEncoderDeepDecoderConfig:
  stacks = {}
  for stack in ('encoder', 'decoder'):
    if not isinstance(config.get(stack), Mapping):
      raise UserError(
          f'expected {stack} in config.json to hold the configuration of the '
          f'{stack}, found none; complete the file'
      )
    # What this class of transformers leaves out if it is so.
    fields = {'tie_word_embeddings': False} | config[stack]
    stacks[stack] = _read_stack(fields, {})
  return ShallowEncoderDeepDecoderConfig(
      **stacks,
      **_read_ids(config, config['decoder']),
      # Ours alone; files without it are of released models.
      indent_with_tabs=field(config, 'indent_with_tabs', bool, default=True),
  )


def _write_stack(config: CodeGenConfig, eos_id: int) -> dict[str, Any]:
  if config.num_heads * config.head_dim != config.emb_dim:
    raise UserError(
        f'expected num_heads times head_dim to be emb_dim, as the layout of '
        f'Hugging Face has it for CodeGen, found {config.num_heads}, '
        f'{config.head_dim} and {config.emb_dim}; this model cannot be '
        f'written in that layout'
    )
  return {
      'vocab_size': config.vocab_size,
      'n_positions': _NUM_POSITIONS,
      'n_ctx': _NUM_POSITIONS,
      'n_embd': config.emb_dim,
      'n_layer': config.num_layers,
      'n_head': config.num_heads,
      'rotary_dim': config.rotary_dim,
      'n_inner': config.mlp_dim,
      'activation_function': 'gelu_new',
      'layer_norm_epsilon': config.layer_norm_epsilon,
      'attn_pdrop': 0.0,
      'embd_pdrop': 0.0,
      'resid_pdrop': 0.0,
      'initializer_range': 0.02,
      'scale_attn_weights': True,
      'use_cache': True,
      'tie_word_embeddings': False,
      'bos_token_id': 1,
      'eos_token_id': eos_id,
  }


def _write_codegen(config: CodeGenConfig) -> dict[str, Any]:
  return {
      'model_type': 'codegen',
      **_write_stack(config, config.eos_id),
      **_write_ids(config),
  }


def _write_composite(
    config: ShallowEncoderDeepDecoderConfig,
) -> dict[str, Any]:
  def stack(sizes: CodeGenConfig, is_decoder: bool) -> dict[str, Any]:
    return {
        'model_type': 'codet5p_module',
        **_write_stack(sizes, config.eos_id),
        'is_decoder': is_decoder,
        'add_cross_attention': is_decoder,
    }

  return {
      'model_type': 'codet5p',
      'is_encoder_decoder': True,
      'encoder': stack(config.encoder, is_decoder=False),
      'decoder': stack(config.decoder, is_decoder=True),
      'indent_with_tabs': config.indent_with_tabs,
      # The released files have none here, and then no labels can be shifted
      # (spec 4.6).
      **_write_ids(config),
  }


def _write_ids(
    config: CodeGenConfig | ShallowEncoderDeepDecoderConfig,
) -> dict[str, int]:
  return {theirs: getattr(config, ours) for ours, theirs in _IDS.items()}


def _codegen_ids(config: CodeGenConfig) -> dict[str, int]:
  return {'bos_token_id': 1, **_write_ids(config)}


def _measure_stack(
    shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> dict[str, int | None]:
  vocab, embed = sizes(shapes, f'{prefix}wte.weight')
  inner, _ = sizes(shapes, f'{prefix}h.0.mlp.fc_in.weight')
  return {
      'vocab_size': vocab,
      'n_embd': embed,
      'n_inner': inner,
      'n_layer': count_layers(shapes, rf'{re.escape(prefix)}h\.(\d+)\.'),
  }


def _measure_codegen(
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, int | None]:
  return _measure_stack(shapes, 'transformer.')


def _measure_composite(
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, int | None]:
  return {
      f'{stack}.{name}': size
      for stack, prefix in (
          ('encoder', 'encoder.'), ('decoder', 'decoder.transformer.')
      )
      for name, size in _measure_stack(shapes, prefix).items()
  }  # fmt: skip


CODEGEN = Family(
    model_type='codegen',
    config_class=CodeGenConfig,
    vocabulary_kind='codegen',
    rows=_codegen_rows,
    read_config=_read_codegen,
    write_config=_write_codegen,
    measure=_measure_codegen,
    token_ids=_codegen_ids,
    # transformers 5 makes its triangles anew; older ones wrote them.
    ignored=r'transformer\.h\.\d+\.attn\.causal_mask',
)
COMPOSITE = Family(
    model_type='codet5p',
    config_class=ShallowEncoderDeepDecoderConfig,
    vocabulary_kind='codegen',
    rows=_composite_rows,
    read_config=_read_composite,
    write_config=_write_composite,
    measure=_measure_composite,
    token_ids=_write_ids,
    ignored=(
        r'(encoder|decoder\.transformer)\.h\.\d+\.(attn|crossattention)'
        r'\.causal_mask'
    ),
    buffers=_composite_buffers,
)
