# SPDX-License-Identifier: Apache-2.0
"""Configuration of CodeT5+ 220M bimodal, carried by exported folders."""

from transformers import T5Config


class CodeT5pBimodalConfig(T5Config):
  """T5, a projection to `embed_dim` and a matching head.

  Its decoder is told what to do by a token: `match_token_id` to read code
  beside a text, `text_decoder_token_id` and `code_decoder_token_id` to write
  one of the other.
  """

  model_type = 'codet5p_bimodal'
  embed_dim: int = 256
  match_token_id: int = 32100
  text_decoder_token_id: int = 32101
  code_decoder_token_id: int = 32102
