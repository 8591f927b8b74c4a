# SPDX-License-Identifier: Apache-2.0
"""Configuration of CodeT5+ 110M embedding, carried by exported folders."""

from transformers import T5Config


class CodeT5pEmbeddingConfig(T5Config):
  """T5's encoder and a projection to `embed_dim`."""

  model_type = 'codet5p_embedding'
  embed_dim: int = 256
