# SPDX-License-Identifier: Apache-2.0
"""CodeT5+ 220M bimodal: T5 with two heads to find code for a text.

As in the embedding model, the encoder's state of the first token, projected, is
the embedding of a text or of code. The decoder can also read code beside an
encoded text, to tell whether they match (Wang et al. 2023, section 3.2).

Carried by the folders that codet5p_jax exports, for PyTorch and transformers 5:
`AutoModel.from_pretrained(folder, trust_remote_code=True)`.
"""

import torch
from torch import nn
from transformers import T5ForConditionalGeneration

from .configuration_codet5p_bimodal import CodeT5pBimodalConfig


class CodeT5pBimodalModel(T5ForConditionalGeneration):
  """T5 for text and code: `forward` and `generate` are T5's.

  `embed` and `match_logits` are what the two added heads are for.
  """

  config_class = CodeT5pBimodalConfig

  def __init__(self, config):
    super().__init__(config)
    self.proj = nn.Linear(config.d_model, config.embed_dim)
    self.itm_head = nn.Linear(config.d_model, 2)
    self.post_init()

  def embed(self, input_ids, attention_mask=None):
    """Embeddings of token sequences that begin with `<s>`, text or code.

    Args:
      input_ids: [batch, length].
      attention_mask: [batch, length], 0 for padding.

    Returns:
      [batch, embed_dim], a tensor of rows of length 1.
    """
    encoded = self.encoder(input_ids, attention_mask=attention_mask)
    first = encoded.last_hidden_state[:, 0]
    return nn.functional.normalize(self.proj(first), dim=-1)

  def match_logits(
      self,
      input_ids,
      attention_mask,
      decoder_input_ids,
      decoder_attention_mask,
  ):
    """Whether each text and code of a batch belong together.

    Ranking adds the logit of a match, as it is, to the cosine of the two
    embeddings.

    Args:
      input_ids: [batch, text length], the text: `<s> ... </s>`, padded.
      attention_mask: [batch, text length], 0 for padding.
      decoder_input_ids: [batch, code length], the code: `<s> ... </s>`, padded;
        not shifted. Its first token is read as `match_token_id`, which the
        configuration has and which stands for this task.
      decoder_attention_mask: [batch, code length], 0 for padding.

    Returns:
      [batch, 2]; column 1 speaks for a match.

    Raises:
      ValueError: a row of code has no `</s>`.
    """
    ends = decoder_input_ids == self.config.eos_token_id
    if not ends.any(dim=1).all():
      raise ValueError(
          'Expected code that ends with the token'
          f' {self.config.eos_token_id}, found a row without one.'
      )
    last = ends.shape[1] - 1 - ends.flip(1).int().argmax(dim=1)
    decoder_input_ids = decoder_input_ids.clone()
    decoder_input_ids[:, 0] = self.config.match_token_id
    encoded = self.encoder(input_ids, attention_mask=attention_mask)
    decoded = self.decoder(
        decoder_input_ids,
        attention_mask=decoder_attention_mask,
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=attention_mask,
        use_cache=False,
    ).last_hidden_state
    rows = torch.arange(len(last), device=last.device)
    return self.itm_head(decoded[rows, last])
