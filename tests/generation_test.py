"""Completions of a small model that was never trained."""

import dataclasses
import math
import types

import jax
import jax.monitoring
import pytest

from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.decoding.beam_search import BeamSearch
from codet5p_jax.decoding.sampling import Sampling
from codet5p_jax.errors import UserError
from codet5p_jax.generation import GenerationSettings, Generator
from codet5p_jax.generation_requests import make_request
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.sharding import DECODING_RULES, make_mesh
from codet5p_jax.tasks.prompts import Prompt
from codet5p_jax.trained_model import TrainedModel
from codet5p_jax.training.optimizers import SGD
from codet5p_jax.training.train_step import StepConfig, make_train_step

HOT = Sampling(1.0, 0, 1.0)
TEXTS = ['def f():', 'x', 'class A(object):\n  y = 1\n  z = 2', 'a b c', '']


def make_trained(small_corpus, random_parameters, mesh_shape):
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  config = T5Config(
      vocab_size=vocabulary.vocab_size,
      emb_dim=12,
      num_heads=4,
      head_dim=7,
      mlp_dim=28,
      num_encoder_layers=1,
      num_decoder_layers=2,
  )
  step = make_train_step(
      StepConfig(
          model=config,
          computation=Computation('float32', scan_layers=False),
          objectives=(),
          optimizer=SGD(0.0),
          batch_size=1,
          mesh_shape=mesh_shape,
          rules=DECODING_RULES,
      ),
      make_mesh(mesh_shape, jax.devices()[: math.prod(mesh_shape)]),
  )
  params = random_parameters(step.model, seed=2)
  table = params['token_embedder']['embedding'] / 10
  params |= {'token_embedder': {'embedding': table}}
  trained = object.__new__(TrainedModel)
  vars(trained).update(
      vocabulary=vocabulary,
      train_step=step,
      params=params,
      frozen_params={},
      step=12,
  )
  return trained


@pytest.fixture(scope='module')
def trained(small_corpus, random_parameters):
  return make_trained(small_corpus, random_parameters, (1, 1, 1))


def requests_of(trained, texts=TEXTS):
  return [
      make_request(trained, 'decoder_only', Prompt(f'p{i}', text, None))
      for i, text in enumerate(texts)
  ]


def complete(trained, settings, batch_size=6, texts=TEXTS):
  requests = requests_of(trained, texts)
  generator = Generator(trained, settings, requests, batch_size)
  told = []
  made = [
      completion
      for batch in generator.batches
      for completion in generator.complete(batch, told.append)
  ]
  return made, told


def settings(**changes):
  return GenerationSettings(
      **{'num_samples': 4, 'sampling': HOT, 'max_new_tokens': 9, **changes}
  )


@pytest.fixture(scope='module')
def drawn(trained):
  return complete(trained, settings())


def test_every_prompt_gets_its_samples_in_order(drawn):
  completions, told = drawn
  assert [(c.prompt_id, c.sample) for c in completions] == [
      (f'p{i}', sample) for i in range(5) for sample in range(4)
  ]
  assert len({c.text for c in completions}) > 15
  assert sum(told) == sum(c.num_tokens for c in completions)
  for c in completions:
    assert c.ended == ('eos' if c.num_tokens < 9 else 'length')
    assert -200 < c.log_probability < 0


@pytest.mark.parametrize(
    ('batch_size', 'mesh_shape'), [(3, (1, 1, 1)), (20, (1, 2, 4))]
)
def test_samples_do_not_depend_on_batch_and_mesh(
    small_corpus, random_parameters, drawn, batch_size, mesh_shape
):
  """But for rounding; here no draw is near the border between two tokens."""
  trained = make_trained(small_corpus, random_parameters, mesh_shape)
  completions, _ = complete(trained, settings(), batch_size)
  # Prompts that share a batch take turns.
  completions.sort(key=lambda c: (c.prompt_id, c.sample))
  for found, expected in zip(completions, drawn[0], strict=True):
    assert dataclasses.replace(found, log_probability=0.0) == (
        dataclasses.replace(expected, log_probability=0.0)
    )
    assert found.log_probability == pytest.approx(
        expected.log_probability, abs=1e-3
    )


def test_a_seed_gives_other_samples(trained, drawn):
  completions, _ = complete(trained, settings(seed=1))
  assert not {c.text for c in completions if c.num_tokens > 3} & {
      c.text for c in drawn[0]
  }


def test_a_stop_string_ends_a_completion_before_it(trained, drawn):
  longest = max(drawn[0], key=lambda c: len(c.text))
  stop = longest.text[5:8]
  completions, _ = complete(trained, settings(stop_strings=('never', stop)))
  for found, free in zip(completions, drawn[0], strict=True):
    if stop in free.text:
      assert found.text == free.text[: free.text.index(stop)]
      assert found.ended == 'stop_string'
      assert found.num_tokens <= free.num_tokens
      assert found.log_probability >= free.log_probability
    else:
      assert found == free
  assert 'stop_string' in {c.ended for c in completions}


def test_a_limit_counts_the_prompt(trained):
  requests = requests_of(trained)
  longest = max(len(request.target) for request in requests)
  limited = settings(max_length=longest + 2, max_new_tokens=None)
  completions, _ = complete(trained, limited)
  for c in completions:
    room = longest + 2 - len(requests[int(c.prompt_id[1:])].target)
    assert c.num_tokens == room or (c.ended == 'eos' and c.num_tokens < room)
  with pytest.raises(UserError, match=r'the \d+ that MAX_LENGTH .* prompt p2'):
    complete(trained, settings(max_length=longest))


def test_a_model_has_a_limit_of_its_own(trained, monkeypatch):
  request = requests_of(trained)[2]
  limit = len(request.target) + 3
  monkeypatch.setattr(T5Config, 'max_length', limit)
  generator = Generator(trained, settings(num_samples=1), [request], 1)
  [completion] = generator.complete(generator.batches[0])
  assert completion.num_tokens <= 3
  for changes, told in (
      ({'source': (1,) * (limit + 1)}, 'tokens that the model allows, found'),
      ({'target': (1,) * limit}, 'that the model allows with its completion'),
  ):
    with pytest.raises(UserError, match=told):
      long = dataclasses.replace(request, **changes)
      Generator(trained, settings(), [long], 4)


def test_beams_come_best_first_and_the_first_beats_greed(trained):
  greedy, _ = complete(trained, GenerationSettings(max_new_tokens=7))
  search = BeamSearch(num_beams=5, length_penalty=0.0)
  best, _ = complete(
      trained,
      settings(num_samples=3, beam_search=search, max_new_tokens=7),
  )
  for i, alone in enumerate(greedy):
    values = [c.log_probability for c in best[3 * i : 3 * i + 3]]
    assert values == sorted(values, reverse=True)
    assert values[0] >= alone.log_probability - 1e-4
  assert [(c.prompt_id, c.sample) for c in best[:4]] == [
      ('p0', 0), ('p0', 1), ('p0', 2), ('p1', 0)
  ]  # fmt: skip


def test_beams_do_not_depend_on_the_mesh(
    small_corpus, random_parameters, trained
):
  search = settings(num_samples=3, beam_search=BeamSearch(3, 0.5))
  expected, _ = complete(trained, search)
  spread = make_trained(small_corpus, random_parameters, (1, 2, 4))
  completions, _ = complete(spread, search)
  for found, alone in zip(completions, expected, strict=True):
    assert (found.prompt_id, found.text) == (alone.prompt_id, alone.text)
    assert found.log_probability == pytest.approx(
        alone.log_probability, abs=1e-3
    )


def test_a_prompt_is_read_once_for_all_of_its_samples(trained, drawn):
  requests = requests_of(trained)
  generator = Generator(trained, settings(), requests, 3)
  sampler, lengths = generator._sampler, []

  def read(params, prompts):
    lengths.append(int(prompts.lengths[0]))
    return sampler.read(params, prompts)

  generator._sampler = types.SimpleNamespace(
      read=read, begin=sampler.begin, go_on=sampler.go_on
  )
  # What was stopped goes on amid a prompt.
  for batches in (generator.batches, generator.batches[3:]):
    lengths.clear()
    for batch in batches:
      for found in generator.complete(batch):
        first = 4 * int(found.prompt_id[1:])
        assert found.text == drawn[0][first + found.sample].text
    expected = [len(request.target) for request in requests]
    assert lengths == expected[-len(lengths) :]
  assert len(generator.batches) == 10 and len(lengths) == 4


@pytest.mark.parametrize('search', [None, BeamSearch(4)])
def test_a_batch_that_does_not_fit_the_memory_is_told(trained, search):
  requests = requests_of(trained)
  generator = Generator(trained, settings(beam_search=search), requests, 8)
  words = 'Out of memory allocating 821 bytes.'

  def fail(*given, **options):
    raise jax.errors.JaxRuntimeError(words)

  generator._sampler = types.SimpleNamespace(read=fail, begin=None)
  generator._searcher = types.SimpleNamespace(find=fail)
  length = len(requests[2].target)
  told = rf'2 prompts with 4 .* of {length} tokens \(prompt p2\); lower BATCH_'
  with pytest.raises(UserError, match=told):
    generator.complete(generator.batches[1])
  words = 'INTERNAL: something else'
  with pytest.raises(jax.errors.JaxRuntimeError, match='something else'):
    generator.complete(generator.batches[1])


def test_a_prompt_of_another_length_is_not_compiled_anew(trained):
  requests = requests_of(trained, ['a', 'b c', 'd e f'])
  generator = Generator(trained, settings(num_samples=1), requests, 1)
  compiled = []

  def hear(event, seconds, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(hear)
  try:
    counts = []
    for batch in generator.batches:
      generator.complete(batch)
      counts.append(len(compiled))
  finally:
    jax.monitoring.unregister_event_duration_listener(hear)
  assert counts[0] > 1 and counts == 3 * counts[:1]


def test_few_prompts_take_no_more_than_they_need(trained):
  requests = requests_of(trained, ['a', 'b'])
  generator = Generator(trained, settings(num_samples=3), requests, 99)
  assert [len(batch.requests) for batch in generator.batches] == [2]
  prompts, limits = generator._arrange(requests)
  assert prompts.lengths.shape == limits.shape == (2,)


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({'num_samples': 0}, 'num_samples to be at least 1'),
        ({'max_new_tokens': 0}, 'max_new_tokens to be at least 1'),
        ({'max_new_tokens': None}, 'set MAX_NEW_TOKENS or MAX_LENGTH'),
        ({'stop_strings': ('a', '')}, 'found an empty one'),
        ({'beam_search': BeamSearch(3)}, '4 samples of 3 beams'),
        ({'sampling': Sampling(0.0)}, 'a temperature above 0 to draw 4'),
    ],
)
def test_settings_that_make_no_sense_are_told(changes, told):
  with pytest.raises(UserError, match=told):
    settings(**changes)
