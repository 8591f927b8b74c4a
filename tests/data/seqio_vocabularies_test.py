"""Tests of our vocabularies behind seqio's surface."""

import functools
import pickle

import numpy as np
import pytest
import seqio
import tensorflow as tf

from codet5p_jax.data import seqio_vocabularies

KINDS = ['codet5', 'codet5_bimodal', 'codegen', 'sentencepiece']
TEXT = 'def f(x):\n\treturn "<s> \u00e9\u6f22 </s>"'


@pytest.fixture(params=KINDS)
def adapter(request, small_vocabularies):
  return seqio_vocabularies.SeqioVocabulary(small_vocabularies[request.param])


def test_encoding_and_decoding_are_those_of_the_vocabulary(adapter):
  ids = adapter.encode(TEXT)
  assert ids == adapter.vocabulary.encode(TEXT)
  assert adapter.decode(ids) == TEXT


def test_sizes_and_ids_are_those_of_the_vocabulary(adapter):
  tokens = adapter.vocabulary.task_tokens
  assert adapter.vocab_size == adapter.vocabulary.vocab_size
  assert adapter.extra_ids == 0
  assert (adapter.pad_id, adapter.eos_id) == (tokens.pad, tokens.eos)
  assert adapter.bos_id == tokens.bos
  is_codegen = adapter.vocabulary.kind == 'codegen'
  assert adapter.unk_id == (None if is_codegen else 3)


def test_decoding_stops_at_the_end_of_sequence(adapter):
  tokens = adapter.vocabulary.task_tokens
  ids = [*adapter.encode('a b'), tokens.eos, *adapter.encode('c')]
  assert adapter.decode(ids) == 'a b'
  assert adapter.decode_tf(tf.constant(ids, tf.int32)).numpy() == b'a b'


def test_ids_without_a_piece_stand_for_nothing(adapter):
  a, b = adapter.encode('a'), adapter.encode('b')
  ids = [*a, adapter.vocab_size, adapter.vocab_size + 9, *b]
  assert adapter.decode(ids) == 'ab'
  assert adapter.decode_tf(tf.constant(ids, tf.int32)).numpy() == b'ab'


def test_tensors_encode_and_decode_as_python_does(adapter):
  ids = adapter.encode_tf(tf.constant(TEXT))
  assert ids.dtype == tf.int32
  assert ids.numpy().tolist() == adapter.encode(TEXT)
  assert adapter.decode_tf(ids).numpy().decode() == TEXT


def test_batches_of_any_rank_are_decoded(adapter):
  rows = [adapter.encode('a b'), adapter.encode('c')]
  length = max(map(len, rows)) + 1
  ids = np.full((1, 2, length), adapter.pad_id, np.int32)
  for row, encoded in enumerate(rows):
    ids[0, row, : len(encoded)] = encoded
  decoded = adapter.decode_tf(tf.constant(ids))
  assert decoded.numpy().tolist() == [[b'a b', b'c']]
  empty = adapter.decode_tf(tf.zeros([2, 0], tf.int32))
  assert empty.numpy().tolist() == [b'', b'']


def test_graphs_know_the_shapes(adapter):
  dataset = tf.data.Dataset.from_tensor_slices([TEXT, '', 'x']).map(
      adapter.encode_tf
  )
  assert dataset.element_spec == tf.TensorSpec([None], tf.int32)
  expected = [adapter.encode(text) for text in (TEXT, '', 'x')]
  assert [row.tolist() for row in dataset.as_numpy_iterator()] == expected
  decoded = dataset.padded_batch(
      3, padding_values=tf.constant(adapter.pad_id, tf.int32)
  ).map(adapter.decode_tf)
  assert decoded.element_spec.shape.rank == 1
  [texts] = decoded.as_numpy_iterator()
  assert [text.decode() for text in texts] == [TEXT, '', 'x']


def test_only_one_text_at_a_time_is_encoded(adapter):
  with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
    adapter.encode_tf(tf.constant(['a', 'b']))


def test_equality_is_that_of_the_fingerprints(small_vocabularies):
  make = seqio_vocabularies.SeqioVocabulary
  adapters = [make(small_vocabularies[kind]) for kind in KINDS]
  for kind, adapter in zip(KINDS, adapters):
    copy = pickle.loads(pickle.dumps(adapter))
    assert copy == adapter and hash(copy) == hash(adapter)
    assert [other == adapter for other in adapters].count(True) == 1
    assert adapter != small_vocabularies[kind]
    assert kind in str(adapter)


def test_a_seqio_task_tokenizes_with_it(adapter):
  name = f'seqio_vocabularies_test_{adapter.vocabulary.kind}'
  feature = seqio.Feature(adapter, add_eos=True)
  seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(
          lambda split, shuffle_files, seed=None: (
              tf.data.Dataset.from_tensors({'inputs': TEXT, 'targets': 'x'})
          ),
          splits=['train'],
      ),
      preprocessors=[
          functools.partial(seqio.preprocessors.tokenize, with_eos=False),
          seqio.preprocessors.append_eos,
      ],
      output_features={'inputs': feature, 'targets': feature},
  )
  try:
    task = seqio.get_mixture_or_task(name)
    dataset = task.get_dataset(
        {'inputs': 512, 'targets': 512}, 'train', shuffle=False
    )
    [example] = dataset.as_numpy_iterator()
  finally:
    seqio.TaskRegistry.remove(name)
  eos = adapter.eos_id
  assert example['inputs'].tolist() == [*adapter.encode(TEXT), eos]
  assert example['targets'].tolist() == [*adapter.encode('x'), eos]
  assert example['inputs_pretokenized'].decode() == TEXT
