import dataclasses
import json
import types
from typing import Any

import numpy as np
import pytest

from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.runs import generate as generate_run
from codet5p_jax.runs.generate import generate
from codet5p_jax.training.run_folder import RunFolder
from codet5p_jax.trained_model import TrainedModel

START = 7  # Unlike any id that the modes put in.
STEP = 12


@dataclasses.dataclass
class Heard:
  """What the decoder was given, and what it shall answer."""

  vocabulary: Any
  answers: list[list[int]]
  sources: list[list[int]] = dataclasses.field(default_factory=list)
  targets: list[list[int]] = dataclasses.field(default_factory=list)

  def decode(self, model, params, source, prompt, eos_id):
    assert eos_id == self.vocabulary.task_tokens.eos
    self.sources.append(source[0].tolist())
    given = [token for token in prompt[0].tolist() if token >= 0]
    self.targets.append(given)
    answer = self.answers.pop(0)
    row = np.full_like(prompt, -1)
    row[0, : len(given) + len(answer)] = [*given, *answer]
    return row


@pytest.fixture
def heard(small_corpus, tmp_path, monkeypatch):
  """Stands for a trained model whose decoder answers what the test says."""
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  heard = Heard(vocabulary, [])

  config = types.SimpleNamespace(
      decoder_start_id=START,
      prompt_to_decoder=False,
      head_counts=lambda: {'encoder': 1, 'decoder': 1},
  )
  trained = object.__new__(TrainedModel)  # Without weights and a step.
  vars(trained).update(
      folder=RunFolder(tmp_path),
      vocabulary=vocabulary,
      train_step=types.SimpleNamespace(
          model=types.SimpleNamespace(config=config),
          config=types.SimpleNamespace(model=config, objectives=()),
      ),
      params={},
      frozen_params={},
      step=STEP,
  )
  monkeypatch.setattr(
      generate_run, 'load_trained_model', lambda *_, **__: trained
  )
  monkeypatch.setattr(generate_run, 'greedy_decode', heard.decode)
  return heard


def outputs(run_dir):
  lines = (run_dir / 'generation' / 'outputs.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ('objectives', 'mode'),
    [
        ([], 'decoder_only'),
        (['sequence_to_sequence'], 'encoder_decoder'),
        (['causal_lm', 'sequence_to_sequence'], 'decoder_only'),
    ],
)
def test_the_mode_is_what_the_model_was_trained_for(
    heard, tmp_path, objectives, mode
):
  trained = generate_run.load_trained_model()
  trained.train_step.config.objectives = [
      types.SimpleNamespace(name=name) for name in objectives
  ]
  heard.answers.append([9])
  generate(['x'], str(tmp_path))
  [row] = outputs(tmp_path)
  assert row['mode'] == mode


@pytest.mark.parametrize(
    'mode', ['decoder_only', 'seq2seq_causal_lm', 'encoder_decoder']
)
def test_each_mode_gives_the_prompt_in_the_form_it_was_trained_on(
    heard, tmp_path, capsys, mode
):
  ids, encode = heard.vocabulary.task_tokens, heard.vocabulary.encode
  heard.answers = [[*encode('return'), ids.eos]]
  assert generate(['def f():'], str(tmp_path), mode) == ['return']
  prompt = encode('def f():')
  source, target = {
      'decoder_only': ([ids.clm], [START, ids.bos, *prompt]),
      'seq2seq_causal_lm': ([ids.clm, ids.bos, *prompt], [START, ids.bos]),
      'encoder_decoder': ([ids.bos, *prompt, ids.eos], [START, ids.bos]),
  }[mode]
  assert (heard.sources, heard.targets) == ([source], [target])
  shown = 'return' if mode == 'encoder_decoder' else 'def f():return'
  assert capsys.readouterr().out == f'{shown}\n\n'


def test_gaps_are_filled_with_the_answers_to_their_sentinels(
    heard, tmp_path, capsys
):
  ids, encode = heard.vocabulary.task_tokens, heard.vocabulary.encode
  zero, one = ids.sentinel(0), ids.sentinel(1)
  heard.answers = [
      [*encode('add'), one, *encode('a'), ids.eos],
      [*encode('sub'), ids.eos],  # Leaves its second gap empty.
  ]
  prompt = 'def <extra_id_0>(a, b):\n  return <extra_id_1> + b\n'
  texts = generate([prompt, prompt], str(tmp_path), 'infill')
  assert texts == [
      'def add(a, b):\n  return a + b\n',
      'def sub(a, b):\n  return  + b\n',
  ]
  assert heard.sources[0] == [
      ids.bos,
      *encode('def '),
      zero,
      *encode('(a, b):\n  return '),
      one,
      *encode(' + b\n'),
      ids.eos,
  ]
  assert heard.targets[0] == [START, ids.bos, zero]
  assert capsys.readouterr().out == '\n\n'.join([*texts, ''])


def test_a_vocabulary_without_bos_gets_none(heard, tmp_path, monkeypatch):
  ids = dataclasses.replace(heard.vocabulary.task_tokens, bos=None)
  monkeypatch.setattr(heard.vocabulary, 'task_tokens', ids)
  prompt = heard.vocabulary.encode('x')
  heard.answers = [[ids.eos]] * 4
  for mode in ('decoder_only', 'seq2seq_causal_lm', 'encoder_decoder'):
    generate(['x'], str(tmp_path), mode)
  generate(['x<extra_id_0>'], str(tmp_path), 'infill')
  zero = ids.sentinel(0)
  assert heard.sources == [
      [ids.clm],
      [ids.clm, *prompt],
      [*prompt, ids.eos],
      [*prompt, zero, ids.eos],
  ]
  assert heard.targets == [[START, *prompt], [START], [START], [START, zero]]


def test_a_prompt_without_a_gap_is_told_before_a_model_is_loaded(tmp_path):
  with pytest.raises(UserError, match='expected <extra_id_0> in the prompt'):
    generate(['x <extra_id_0>', 'def f():'], str(tmp_path / 'none'), 'infill')


def test_outputs_of_a_mode_replace_its_former_ones(heard, tmp_path):
  encode = heard.vocabulary.encode
  heard.answers = [encode(text) for text in ('1', '2', '3', '4')]
  generate(['a', 'b'], str(tmp_path))
  generate(['c<extra_id_0>'], str(tmp_path), 'infill')
  generate(['d'], str(tmp_path), operative_config=lambda: 'replay')
  assert outputs(tmp_path) == [
      {'prompt': 'c<extra_id_0>', 'mode': 'infill', 'text': 'c3', 'step': STEP},
      {'prompt': 'd', 'mode': 'decoder_only', 'text': '4', 'step': STEP},
  ]
  replay = tmp_path / 'generation' / 'operative_config.gin'
  assert replay.read_text() == 'replay'
