"""Our vocabularies as seqio's, for its features, caching and evaluation.

This module imports seqio, hence TensorFlow; training does not need it.
"""

from collections.abc import Sequence

import numpy as np
import seqio
import tensorflow as tf

from codet5p_jax.data import vocabularies


class SeqioVocabulary(seqio.Vocabulary):
  """A vocabulary of `vocabularies` with seqio's surface.

  Two choices differ from seqio's own vocabularies:

  * `extra_ids` is 0, and `vocab_size` is ours. Our sentinels do not fill the
    end of every vocabulary in seqio's order, so they are asked for by
    `vocabulary.task_tokens.sentinel(k)`, never counted down from the end.
  * `pad_id` is 50256 for CodeGen, where 0 is the piece `!`. seqio's feature
    converters pad with 0 whatever a vocabulary says; ours do not.

  `unk_id` is None where it is the end of text as well: seqio's `decode` writes
  it over ids it does not know, which must not end a sequence.

  Attributes:
    vocabulary: The vocabulary behind.
  """

  def __init__(self, vocabulary: vocabularies.Vocabulary):
    self.vocabulary = vocabulary
    super().__init__(extra_ids=0)

  @property
  def bos_id(self) -> int | None:
    return self.vocabulary.task_tokens.bos

  @property
  def eos_id(self) -> int:
    return self.vocabulary.task_tokens.eos

  @property
  def pad_id(self) -> int:
    return self.vocabulary.task_tokens.pad

  @property
  def unk_id(self) -> int | None:
    tokens = self.vocabulary.task_tokens
    return None if tokens.unk == tokens.eos else tokens.unk

  @property
  def _base_vocab_size(self) -> int:
    return self.vocabulary.vocab_size

  def _encode(self, s: str) -> list[int]:
    return self.vocabulary.encode(s)

  def _decode(self, ids: Sequence[int]) -> str:
    return self.vocabulary.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    """Encodes a scalar string of UTF-8 to int32 [length]."""

    def encode_text(text: bytes | np.ndarray) -> np.ndarray:
      # Bytes in a graph, an array of one object outside.
      content = text.item() if isinstance(text, np.ndarray) else text
      return np.array(self.vocabulary.encode(content.decode()), np.int32)

    ids = tf.numpy_function(
        encode_text, [tf.ensure_shape(s, [])], tf.int32, stateful=False
    )
    return tf.ensure_shape(ids, [None])

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    """Decodes ids [..., length] to strings [...]."""

    def decode_rows(rows: np.ndarray) -> np.ndarray:
      texts = np.empty(rows.shape[:-1], object)
      for index in np.ndindex(texts.shape):
        texts[index] = self.vocabulary.decode(rows[index]).encode()
      return texts

    texts = tf.numpy_function(decode_rows, [ids], tf.string, stateful=False)
    return tf.ensure_shape(texts, ids.shape[:-1])

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, SeqioVocabulary):
      return False
    return self.vocabulary == other.vocabulary

  def __hash__(self) -> int:
    return hash(self.vocabulary)

  def __str__(self) -> str:
    return f'SeqioVocabulary({self.vocabulary!r})'
