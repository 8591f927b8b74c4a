# SPDX-License-Identifier: Apache-2.0
"""Configuration of CodeT5+ 220M bimodal, carried by exported folders."""

from transformers import T5Config


class CodeT5pBimodalConfig(T5Config):
  """T5, a projection to `embed_dim` and a matching head."""

  model_type = 'codet5p_bimodal'
  embed_dim: int = 256
