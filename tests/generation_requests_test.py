import dataclasses
import types

import numpy as np
import pytest

from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.generation_requests import (
    check_mode,
    choose_mode,
    make_request,
)
from codet5p_jax.models.bimodal import BimodalConfig, EmbeddingConfig
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.tasks.prompts import Prompt
from codet5p_jax.trained_model import TrainedModel

START = 7  # Unlike any id that the modes put in.


def make_trained(
    vocabulary,
    objectives=(),
    stacks=('encoder', 'decoder'),
    prompt_to_decoder=False,
):
  """A trained model without weights."""
  model = types.SimpleNamespace(
      decoder_start_id=START,
      prompt_to_decoder=prompt_to_decoder,
      head_counts=lambda: dict.fromkeys(stacks, 1),
  )
  trained = object.__new__(TrainedModel)
  vars(trained).update(
      vocabulary=vocabulary,
      train_step=types.SimpleNamespace(
          config=types.SimpleNamespace(
              model=model,
              objectives=[
                  types.SimpleNamespace(name=name) for name in objectives
              ],
          )
      ),
  )
  return trained


def make_bimodal(vocabulary, objectives=(), kind=BimodalConfig):
  """As `make_trained`, of a model for text and code."""
  ids = vocabulary.task_tokens
  trained = make_trained(vocabulary)
  decoder = {'num_decoder_layers': 1} if kind is BimodalConfig else {}
  trained.train_step.config.model = kind(
      vocab_size=vocabulary.vocab_size,
      emb_dim=4,
      num_heads=1,
      head_dim=3,
      mlp_dim=5,
      num_encoder_layers=2,
      decoder_start_id=START,
      text_decoder_id=ids.tdec,
      code_decoder_id=ids.cdec,
      **decoder,
  )
  trained.train_step.config.objectives = objectives
  return trained


@pytest.fixture(scope='module')
def vocabulary(small_corpus):
  return load_vocabulary(small_corpus / 'vocabulary')


@pytest.fixture
def released(vocabulary, monkeypatch):
  """A vocabulary with a form that models were released in."""
  monkeypatch.setattr(vocabulary, 'kind', 'codet5')
  monkeypatch.setattr(
      vocabulary,
      'encode_as_released',
      lambda text: [1001, *vocabulary.encode(text), 1002],
      raising=False,
  )
  return vocabulary


@pytest.mark.parametrize(
    ('objectives', 'options', 'mode'),
    [
        ([], {}, 'decoder_only'),
        (['sequence_to_sequence'], {}, 'encoder_decoder'),
        (['causal_lm', 'sequence_to_sequence'], {}, 'decoder_only'),
        (['causal_lm'], {'stacks': ['decoder']}, 'decoder_only'),
        ([], {'prompt_to_decoder': True}, 'encoder_and_decoder'),
    ],
)
def test_the_mode_is_what_the_model_was_trained_for(
    vocabulary, objectives, options, mode
):
  trained = make_trained(vocabulary, objectives, **options)
  assert choose_mode(trained, None) == mode
  assert choose_mode(trained, mode) == mode


@pytest.mark.parametrize(
    ('options', 'mode', 'told'),
    [
        ({}, 'encoder_and_decoder', 'expected MODE=decoder_only or encoder_'),
        ({}, 'as_released', 'found as_released; set MODE=decoder_only'),
        ({'stacks': ['decoder']}, 'infill', 'expected MODE=decoder_only for'),
        ({'prompt_to_decoder': True}, 'infill', 'encoder_and_decoder for'),
        ({'stacks': ['encoder']}, None, 'expected a model with a decoder'),
    ],
)
def test_a_mode_that_the_model_does_not_know_is_told(
    vocabulary, options, mode, told
):
  with pytest.raises(UserError, match=told):
    choose_mode(make_trained(vocabulary, **options), mode)


def test_a_composite_also_does_what_it_was_trained_for(vocabulary):
  trained = make_trained(
      vocabulary, ['span_denoising'], prompt_to_decoder=True
  )
  assert choose_mode(trained, 'infill') == 'infill'


def test_each_mode_gives_the_prompt_in_the_form_it_was_trained_on(vocabulary):
  ids, encode = vocabulary.task_tokens, vocabulary.encode
  trained = make_trained(vocabulary)
  prompt = encode('def f():')
  for mode, source, target in (
      ('decoder_only', [ids.clm], [START, ids.bos, *prompt]),
      ('seq2seq_causal_lm', [ids.clm, ids.bos, *prompt], [START, ids.bos]),
      ('encoder_decoder', [ids.bos, *prompt, ids.eos], [START, ids.bos]),
      ('encoder_and_decoder', prompt, [START, *prompt]),
  ):
    request = make_request(trained, mode, Prompt('a', 'def f():', None))
    assert request.prompt_id == 'a'
    assert (request.source, request.target) == (tuple(source), tuple(target))
    assert request.render(encode('return')) == 'return'


def test_a_decoder_that_gets_a_prompt_gets_its_own(vocabulary):
  encode, prompt = vocabulary.encode, Prompt('a', 'one', 'two')
  trained = make_trained(vocabulary)
  both = make_request(trained, 'encoder_and_decoder', prompt)
  assert both.source == tuple(encode('one'))
  assert both.target == (START, *encode('two'))
  begin = vocabulary.task_tokens.bos
  alone = make_request(trained, 'decoder_only', prompt)
  assert alone.target == (START, begin, *encode('two'))
  for mode in ('encoder_decoder', 'seq2seq_causal_lm'):
    beside = make_request(trained, mode, prompt)
    alone = make_request(trained, mode, Prompt('a', 'one'))
    assert beside.source == alone.source
    assert beside.target == (START, begin, *encode('two'))


def test_released_models_are_asked_as_they_were_evaluated(released):
  encode, prompt = released.encode, Prompt('a', 'one', 'two')
  small = make_trained(released)
  assert choose_mode(small, 'as_released') == 'as_released'
  assert choose_mode(small, None, is_benchmark=True) == 'as_released'
  tuned = make_trained(released, ['sequence_to_sequence'])
  assert choose_mode(tuned, None, is_benchmark=True) == 'encoder_decoder'
  request = make_request(small, 'as_released', prompt)
  assert request.source == (1001, *encode('one'), 1002)
  assert request.target == (START,)
  large = make_trained(released, prompt_to_decoder=True)
  request = make_request(large, 'as_released', prompt)
  # Without a start token.
  assert request.target == (1001, *encode('two'), 1002)


def test_gaps_are_filled_with_the_answers_to_their_sentinels(vocabulary):
  ids, encode = vocabulary.task_tokens, vocabulary.encode
  zero, one = ids.sentinel(0), ids.sentinel(1)
  text = 'def <extra_id_0>(a, b):\n  return <extra_id_1> + b\n'
  request = make_request(
      make_trained(vocabulary), 'infill', Prompt('a', text, None)
  )
  assert request.source == (
      ids.bos,
      *encode('def '),
      zero,
      *encode('(a, b):\n  return '),
      one,
      *encode(' + b\n'),
      ids.eos,
  )
  assert request.target == (START, ids.bos, zero)
  both = [*encode('add'), one, *encode('a')]
  assert request.render(both) == 'def add(a, b):\n  return a + b\n'
  # A gap without an answer stays empty.
  assert request.render(encode('sub')) == 'def sub(a, b):\n  return  + b\n'


def test_what_needs_no_model_is_told_before_one_is_loaded():
  prompts = [Prompt('a', 'x <extra_id_0>', None), Prompt('b', 'def f():', None)]
  check_mode(None, prompts)
  check_mode('decoder_only', prompts)
  check_mode('infill', prompts[:1])
  with pytest.raises(UserError, match='expected <extra_id_0> in the prompt'):
    check_mode('infill', prompts)
  with pytest.raises(UserError, match="among .*, found 'backwards'; set MODE"):
    check_mode('backwards', [])


def test_a_vocabulary_without_bos_gets_none(vocabulary, monkeypatch):
  ids = dataclasses.replace(vocabulary.task_tokens, bos=None)
  monkeypatch.setattr(vocabulary, 'task_tokens', ids)
  trained, prompt = make_trained(vocabulary), vocabulary.encode('x')
  zero = ids.sentinel(0)
  for mode, text, source, target in (
      ('decoder_only', 'x', [ids.clm], [START, *prompt]),
      ('seq2seq_causal_lm', 'x', [ids.clm, *prompt], [START]),
      ('encoder_decoder', 'x', [*prompt, ids.eos], [START]),
      ('infill', 'x<extra_id_0>', [*prompt, zero, ids.eos], [START, zero]),
  ):
    request = make_request(trained, mode, Prompt('a', text, None))
    assert (request.source, request.target) == (tuple(source), tuple(target))


@pytest.mark.parametrize(
    ('losses', 'fitting'),
    [
        (
            ('contrastive', 'text_to_code', 'code_to_text'),
            ['text_to_code', 'code_to_text'],
        ),
        (('code_to_text',), ['code_to_text']),
    ],
)
def test_a_bimodal_run_writes_what_it_was_trained_to(
    vocabulary, losses, fitting
):
  trained = make_bimodal(vocabulary, [Bimodal(9, 13, 1, losses=losses)])
  assert choose_mode(trained, None) == fitting[0]
  for mode in fitting:
    assert choose_mode(trained, mode) == mode
  told = f'expected MODE={" or ".join(fitting)} for BimodalConfig'
  for mode in {'infill', 'decoder_only', 'text_to_code'} - {*fitting}:
    with pytest.raises(UserError, match=told):
      choose_mode(trained, mode)


def test_a_bimodal_run_keeps_what_it_is_trained_on_beside(vocabulary):
  beside = types.SimpleNamespace(name='span_denoising')
  trained = make_bimodal(vocabulary, [beside, Bimodal(9, 13, 1)])
  assert choose_mode(trained, None) == 'text_to_code'
  assert choose_mode(trained, 'infill') == 'infill'


def test_a_run_that_never_wrote_is_told(vocabulary):
  losses = ('contrastive', 'matching')
  trained = make_bimodal(vocabulary, [Bimodal(9, 13, 1, losses=losses)])
  with pytest.raises(UserError, match='of contrastive and matching alone'):
    choose_mode(trained, None)
  embedding = make_bimodal(vocabulary, kind=EmbeddingConfig)
  with pytest.raises(UserError, match='expected a model with a decoder'):
    choose_mode(embedding, 'text_to_code')


def test_a_released_bimodal_model_writes_both_ways(vocabulary):
  trained = make_bimodal(vocabulary)
  assert choose_mode(trained, None) == 'text_to_code'
  for mode in ('code_to_text', 'text_to_code', 'infill', 'decoder_only'):
    assert choose_mode(trained, mode) == mode
  tuned = make_bimodal(
      vocabulary, [types.SimpleNamespace(name='sequence_to_sequence')]
  )
  assert choose_mode(tuned, None) == 'encoder_decoder'
  with pytest.raises(UserError, match='found text_to_code; set MODE=encoder_d'):
    choose_mode(tuned, 'text_to_code')
  with pytest.raises(UserError, match='for SimpleNamespace as it was trained'):
    choose_mode(make_trained(vocabulary), 'text_to_code')


def test_one_side_is_asked_for_by_the_other_as_in_training(vocabulary):
  ids, encode = vocabulary.task_tokens, vocabulary.encode
  trained = make_bimodal(vocabulary)
  text, code = 'adds two numbers', 'def f(a, b):\n  return a + b\n'
  row = {'text': np.array(encode(text)), 'code': np.array(encode(code))}
  example = Bimodal(128, 420, 1).example(
      row, np.random.default_rng(0), vocabulary
  )
  for mode, prompt, side, task in (
      ('text_to_code', text, 'text', ids.cdec),
      ('code_to_text', code, 'code', ids.tdec),
  ):
    request = make_request(trained, mode, Prompt('a', prompt))
    trained_on = example[f'{side}_tokens'].tolist()
    assert list(request.source) == trained_on[: len(request.source)]
    assert trained_on[len(request.source)] == ids.pad
    assert request.source[-1] == ids.eos
    assert request.target == (START, task)
    assert request.render(encode('return')) == 'return'
    begun = make_request(trained, mode, Prompt('a', prompt, 'two'))
    assert begun.source == request.source
    assert begun.target == (START, task, *encode('two'))
