import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.models.bimodal import EmbeddingConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.seq2seq_causal_lm import Seq2SeqCausalLM
from codet5p_jax.objectives.sequence_to_sequence import SequenceToSequence
from codet5p_jax.objectives.span_denoising import SpanDenoising
from codet5p_jax.training import teacher_forcing
from codet5p_jax.training.optimizers import SGD
from tests.training import small

CONFIG = small.step_config(SGD(1.0), batch_size=8)
MODEL = CONFIG.model.make_model(CONFIG.computation)


@pytest.fixture(scope='module')
def params(random_parameters):
  return random_parameters(MODEL)


@pytest.fixture(scope='module')
def batch():
  return {name: x[0] for name, x in small.batch(CONFIG, 0).items()}


@jax.jit
def forward(params, source, inputs):
  hidden = MODEL.apply({'params': params}, source, inputs)
  return hidden, MODEL.apply({'params': params}, method='output_head')


def numpy_log_probabilities(params, batch):
  """[batch, length, vocab], float64; the decoder starts with token 0."""
  targets = batch['decoder_target_tokens']
  inputs = np.zeros_like(targets)
  inputs[:, 1:] = targets[:, :-1]
  hidden, head = forward(params, batch['encoder_input_tokens'], inputs)
  logits = np.asarray(hidden, np.float64) * float(head.scale)
  logits = logits @ np.asarray(head.kernel, np.float64)[: head.vocab_size].T
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def numpy_loss(params, batch):
  """(sum of -log p, sum of weights, targets that were likeliest), in numpy."""
  log_p = numpy_log_probabilities(params, batch)
  targets = batch['decoder_target_tokens']
  weights = batch['decoder_loss_weights'].astype(np.float64)
  picked = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  right = log_p.argmax(-1) == targets
  return -(picked * weights).sum(), weights.sum(), (right * weights).sum()


@functools.partial(jax.jit, static_argnames=('tile_length', 'model'))
def loss(params, batch, key=None, tile_length=4, model=MODEL):
  state = {'queue': jnp.arange(3)}
  return teacher_forcing.loss(model, params, state, batch, key, tile_length)


@pytest.mark.parametrize('start_id', [0, 7])
def test_decoder_inputs_are_the_start_then_each_target_but_the_last(start_id):
  targets = jnp.array([[1, 17, 18, 2], [1, 2, 0, 0]], jnp.int32)
  shifted = teacher_forcing.shift_right(targets, start_id)
  assert shifted.tolist() == [[start_id, 1, 17, 18], [start_id, 1, 2, 0]]
  assert shifted.dtype == jnp.int32
  assert teacher_forcing.shift_right(targets[:, :1], start_id).tolist() == [
      [start_id], [start_id],
  ]  # fmt: skip


@pytest.mark.parametrize('tile_length', [4, 128])
def test_the_loss_is_that_of_a_numpy_log_softmax(params, batch, tile_length):
  total, output = loss(params, batch, tile_length=tile_length)
  expected, weight, right = numpy_loss(params, batch)
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  assert output.weight == weight
  correct, of = output.metrics['accuracy']
  assert (correct, of) == (right, weight)


def test_likeliest_targets_are_counted(params, batch):
  """Most random targets are wrong, so this makes half of them right."""
  targets = batch['decoder_target_tokens'].copy()
  for position in range(4):
    log_p = numpy_log_probabilities(
        params, batch | {'decoder_target_tokens': targets}
    )
    targets[:, position] = log_p[:, position].argmax(-1)
  changed = batch | {'decoder_target_tokens': targets}
  _, output = loss(params, changed)
  _, _, right = numpy_loss(params, changed)
  assert output.metrics['accuracy'][0] == right >= 4 * 8


def test_what_follows_a_rows_last_target_does_not_matter(params, batch):
  weights = batch['decoder_loss_weights']
  assert 0 < weights.sum() < weights.size
  other = batch | {
      'decoder_target_tokens': np.where(
          weights > 0, batch['decoder_target_tokens'], 99
      ).astype(np.int32)
  }
  assert loss(params, other)[0] == loss(params, batch)[0]


def test_weights_scale_the_losses_of_their_positions(params, batch):
  weights = np.random.default_rng(0).random(batch['decoder_loss_weights'].shape)
  batch = batch | {'decoder_loss_weights': weights.astype(np.float32)}
  total, output = loss(params, batch)
  expected, weight, _ = numpy_loss(params, batch)
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  np.testing.assert_allclose(output.weight, weight, rtol=1e-6)


def test_dropout_needs_a_key_and_obeys_it(params, batch):
  model = CONFIG.model.make_model(
      Computation(dtype='float32', dropout_rate=0.3)
  )
  without = loss(params, batch, None, model=model)[0]
  assert without == loss(params, batch)[0]
  first, again, other = (
      loss(params, batch, jax.random.key(seed), model=model)[0]
      for seed in (1, 1, 2)
  )
  assert first == again
  assert len({float(without), float(first), float(other)}) == 3


def test_the_objectives_state_comes_back_as_it_is(params, batch):
  _, output = loss(params, batch)
  assert output.state['queue'].tolist() == [0, 1, 2]


def test_a_batch_spec_has_the_lengths_of_source_and_target():
  spec = teacher_forcing.batch_spec(6, 5, 4)
  assert {name: (leaf.shape, leaf.dtype) for name, leaf in spec.items()} == {
      'encoder_input_tokens': ((6, 5), jnp.int32),
      'decoder_target_tokens': ((6, 4), jnp.int32),
      'decoder_loss_weights': ((6, 4), jnp.float32),
  }


STACKS = {
    'both': small.MODEL,
    'an encoder alone': EmbeddingConfig(131, 24, 8, 4, 40, 2),
    'a decoder alone': small.COMPOSITE.decoder,
}
ONE_TOKEN = (CausalLM(8),)
LONGER = (
    SequenceToSequence(8, 8),
    SequenceToSequence(8, 8, prompt_to_decoder=True),
    Seq2SeqCausalLM(20, 20, 20),
    SpanDenoising(8, 8, untrained_sentinels=True),
)


@pytest.mark.parametrize(
    ('objectives', 'lacking', 'expected'),
    [
        (ONE_TOKEN + LONGER, 'an encoder alone', 'a model with a decoder to'),
        (LONGER, 'a decoder alone', 'a model with an encoder to read'),
    ],
)
def test_a_model_without_what_reads_or_writes_is_refused(
    objectives, lacking, expected
):
  for objective in objectives:
    with pytest.raises(UserError, match=expected) as error:
      objective.check_model(STACKS[lacking])
    assert f'{objective.name}, found' in str(error.value)
    assert lacking in str(error.value)
    assert '\n' not in str(error.value)


def test_a_model_that_has_what_is_needed_is_not_refused():
  for objective in ONE_TOKEN + LONGER[:1] + LONGER[2:]:
    objective.check_model(STACKS['both'])
  for objective in ONE_TOKEN:
    objective.check_model(STACKS['a decoder alone'])
