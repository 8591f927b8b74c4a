"""Model FLOPs: the useful work of a training step, by arithmetic.

XLA's own count serves as an oracle in the tests only: it counts the body of a
loop (scanned layers) once, whatever the number of rounds.
"""

from collections.abc import Mapping

import jax

from codet5p_jax.layers.embedding import padded_vocab_size
from codet5p_jax.models.t5 import T5Config


def forward_flops(
    config: T5Config, rows: int, source_length: int, target_length: int
) -> int:
  """FLOPs of the matrix products of a forward pass of the T5 stack.

  A multiplication and an addition are two. Counted are the projections,
  attention scores and values, feed-forward layers, and the output head over
  the padded vocabulary. Every position counts, padding included. Causal
  attention is counted in full, as in PaLM's MFU (Chowdhery et al. 2022,
  appendix B): most published figures do so, and it is what a dense product
  computes. Norms, softmax, position biases and look-ups are not counted.

  Args:
    config: sizes of the model.
    rows: of the batch.
    source_length: tokens of a row of the encoder.
    target_length: tokens of a row of the decoder.
  """
  width = config.num_heads * config.head_dim
  # Multiplications of one token with one kernel.
  projection = config.emb_dim * width
  feed_forward = 2 * config.emb_dim * config.mlp_dim
  # Of one query with one key, and of its weight with the value.
  pair = 2 * width

  encoder = source_length * (4 * projection + feed_forward)
  encoder += source_length**2 * pair
  # Query and output of both attentions, key and value of self-attention.
  decoder = target_length * (6 * projection + feed_forward)
  decoder += source_length * 2 * projection  # Keys and values of the source.
  decoder += target_length * (target_length + source_length) * pair
  head = target_length * config.emb_dim * padded_vocab_size(config.vocab_size)
  row = (
      config.num_encoder_layers * encoder
      + config.num_decoder_layers * decoder
      + head
  )
  return 2 * rows * row


def training_flops(
    config: T5Config, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
) -> int:
  """Model FLOPs of one batch of a teacher-forced objective, backward included.

  Three times those of the forward pass: the backward pass makes two products
  for each. What rematerialisation computes again is no useful work and is not
  counted. Parameters count as trained; where some are frozen the step does
  less.

  Args:
    config: sizes of the model.
    batch_spec: the objective's `batch_spec(rows)`, of which
      `encoder_input_tokens` [rows, source] and `decoder_target_tokens`
      [rows, target] are read.
  """
  rows, source_length = batch_spec['encoder_input_tokens'].shape
  _, target_length = batch_spec['decoder_target_tokens'].shape
  return 3 * forward_flops(config, rows, source_length, target_length)
