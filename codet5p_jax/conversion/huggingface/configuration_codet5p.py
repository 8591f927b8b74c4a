# SPDX-License-Identifier: Apache-2.0
"""Configuration of CodeT5+ 2B, 6B and 16B.

Carried by the folders that codet5p_jax exports; the names of classes and fields
are those of the config.json of the released models, which load as well.
"""

from typing import Optional

from transformers import PretrainedConfig


class CodeT5pModuleConfig(PretrainedConfig):
  """One stack of a CodeT5pConfig: CodeGen's fields, and CodeGen's defaults."""

  model_type = 'codet5p_module'
  attribute_map = {
      'hidden_size': 'n_embd',
      'max_position_embeddings': 'n_positions',
      'num_attention_heads': 'n_head',
      'num_hidden_layers': 'n_layer',
  }

  vocab_size: int = 50400
  n_positions: int = 2048
  n_ctx: int = 2048
  n_embd: int = 4096
  n_layer: int = 28
  n_head: int = 16
  rotary_dim: int = 64
  n_inner: Optional[int] = None  # None: 4 * n_embd.
  activation_function: str = 'gelu_new'
  resid_pdrop: float = 0.0
  embd_pdrop: float = 0.0
  attn_pdrop: float = 0.0
  layer_norm_epsilon: float = 1e-5
  initializer_range: float = 0.02
  scale_attn_weights: bool = True
  use_cache: bool = True
  is_decoder: bool = False
  add_cross_attention: bool = False
  cross_attention_hidden_size: Optional[int] = None
  tie_word_embeddings: bool = False
  bos_token_id: Optional[int] = 50256
  eos_token_id: Optional[int] = 50256
  pad_token_id: Optional[int] = None
  decoder_start_token_id: Optional[int] = None


class CodeT5pConfig(PretrainedConfig):
  """CodeT5+ 2B, 6B and 16B: an encoder and a decoder, of different sizes.

  Either may be given as a CodeT5pModuleConfig or as the dictionary of one.
  """

  model_type = 'codet5p'
  sub_configs = {
      'encoder': CodeT5pModuleConfig, 'decoder': CodeT5pModuleConfig
  }

  def __init__(
      self, encoder=None, decoder=None, is_encoder_decoder=True, **kwargs
  ):
    # Before the base class, which validates token ids against the decoder's.
    self.encoder = _as_module_config(encoder)
    self.decoder = _as_module_config(decoder)
    super().__init__(is_encoder_decoder=is_encoder_decoder, **kwargs)


def _as_module_config(config):
  if isinstance(config, CodeT5pModuleConfig):
    return config
  return CodeT5pModuleConfig(**(config or {}))
