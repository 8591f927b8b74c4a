# SPDX-License-Identifier: Apache-2.0
"""CodeT5+ 110M embedding: the encoder of T5, pooled and projected.

It was trained to find code for a text (Wang et al. 2023, section 3.2). The
state of the first token, projected, is the embedding of a text or of code.

Carried by the folders that codet5p_jax exports, for PyTorch and transformers 5:
`AutoModel.from_pretrained(folder, trust_remote_code=True)`.
"""

from torch import nn
from transformers import T5EncoderModel

from .configuration_codet5p_embedding import CodeT5pEmbeddingConfig


class CodeT5pEmbeddingModel(T5EncoderModel):
  """T5's encoder with a projection; called, it returns a tensor."""

  config_class = CodeT5pEmbeddingConfig

  def __init__(self, config):
    super().__init__(config)
    self.proj = nn.Linear(config.d_model, config.embed_dim)
    self.post_init()

  def forward(self, input_ids, attention_mask=None):
    """Embeddings of token sequences that begin with `<s>`.

    Args:
      input_ids: [batch, length].
      attention_mask: [batch, length], 0 for padding.

    Returns:
      [batch, embed_dim], a tensor of rows of length 1.
    """
    encoded = super().forward(input_ids, attention_mask=attention_mask)
    first = encoded.last_hidden_state[:, 0]
    return nn.functional.normalize(self.proj(first), dim=-1)
