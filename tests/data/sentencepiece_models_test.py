"""Tests of training and reading SentencePiece models."""

import io

import pytest

from codet5p_jax import errors
from codet5p_jax.data import sentencepiece_models


@pytest.fixture(scope='module')
def model(training_texts):
  return sentencepiece_models.train(training_texts, 700)


def test_the_same_texts_give_the_same_model(training_texts, model):
  assert sentencepiece_models.train(iter(training_texts), 700) == model


def test_newline_tab_bytes_and_runs_of_spaces_are_pieces(model):
  pieces, _ = sentencepiece_models.pieces(sentencepiece_models.load(model))
  assert len(pieces) == 700
  assert {b'\n', b'\t', b' ' * 4, b' ' * 8} <= set(pieces)
  assert {bytes([byte]) for byte in range(256)} <= set(pieces)


def test_every_role_has_a_control_piece_of_its_own(model):
  processor = sentencepiece_models.load(model)
  tokens = sentencepiece_models.find_task_tokens(processor)
  roles = [tokens.clm, tokens.match, tokens.tdec, tokens.cdec]
  ids = [tokens.pad, tokens.bos, tokens.eos, tokens.unk]
  assert ids == [0, 1, 2, 3]
  assert len({*ids, *roles, *tokens.sentinels}) == 108
  assert processor.id_to_piece(tokens.sentinel(7)) == '<extra_id_7>'
  _, special_names = sentencepiece_models.pieces(processor)
  assert set(special_names) == {*ids, *roles, *tokens.sentinels}


def test_a_line_longer_than_the_library_takes_is_not_dropped():
  control_bytes_and_characters = 108 + 256 + 2 + 5
  model = sentencepiece_models.train(
      ['word ' * 9000], control_bytes_and_characters + 4
  )
  pieces, _ = sentencepiece_models.pieces(sentencepiece_models.load(model))
  assert b' word' in pieces


def test_no_text_is_an_error():
  for texts in ([], ['', '']):
    with pytest.raises(errors.UserError, match='there are none'):
      sentencepiece_models.train(texts, 700)


@pytest.mark.parametrize('vocab_size', [-1, 300, 10**6, 10**12])
def test_a_size_that_does_not_fit_is_an_error(training_texts, vocab_size):
  with pytest.raises(errors.UserError, match=f'of {vocab_size} pieces: ') as e:
    sentencepiece_models.train(training_texts[:3], vocab_size)
  assert '\n' not in str(e.value)


def test_an_error_while_reading_texts_comes_through():
  def texts():
    yield 'x = 1\n' * 2000
    raise OSError('the disk is gone')

  with pytest.raises(OSError, match='^the disk is gone$'):
    sentencepiece_models.train(texts(), 700)


def test_a_file_that_is_no_model_is_an_error():
  with pytest.raises(errors.UserError, match='expected a SentencePiece model'):
    sentencepiece_models.load(b'no model')


def test_a_model_trained_elsewhere_is_an_error(training_texts):
  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(training_texts),
      model_writer=model,
      vocab_size=500,
      model_type='bpe',
      minloglevel=2,
  )
  processor = sentencepiece_models.load(model.getvalue())
  with pytest.raises(errors.UserError, match='lacks 104'):
    sentencepiece_models.find_task_tokens(processor)
