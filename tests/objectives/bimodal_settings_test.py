"""What stage 2 refuses, and what its settings decide without a step."""

import dataclasses

import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.models.bimodal import EmbeddingConfig
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.objectives.bimodal import LOSSES
from codet5p_jax.training.optimizers import AdamW
from codet5p_jax.training.train_step import make_train_step
from tests.objectives.bimodal_small import (
    MODEL,
    OBJECTIVE,
    VOCABULARY,
    batch,
    config,
    steps,
)
from tests.training.small import one_device


@pytest.mark.parametrize(('changes', 'message'), [
    ({'queue_size': 24}, 'whole batches of 16 pairs, found 24; .*SIZE=16'),
    ({'queue_size': 8}, 'whole batches of 16 pairs, found 8; .*SIZE=16'),
    ({'queue_size': 0}, 'queue_size to be at least 1, found 0'),
    ({'momentum': 1.5}, 'momentum of bimodal from 0 to 1, found 1.5'),
    ({'soft_target_share': -1.0}, 'soft_target_share of bimodal from 0 to 1'),
    ({'losses': ('contrast',)}, 'losses of bimodal among .*, found contrast'),
    ({'losses': ()}, 'found none; set LOSSES'),
    ({'losses': ('contrastive', 'contrastive')}, 'contrastive, contrastive;'),
    ({'losses': ('matching',)}, 'whose similarities choose what is matched'),
    ({'text_length': 2}, 'text_length of bimodal .* found 2'),
])  # fmt: skip
def test_settings_that_make_no_sense_are_one_clear_line(changes, message):
  with pytest.raises(UserError, match=message) as raised:
    make_train_step(
        config(dataclasses.replace(OBJECTIVE, **changes)), one_device()
    )
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize(('model', 'losses', 'message'), [
    (dataclasses.replace(MODEL, initial_temperature=None), LOSSES,
     'a model with a temperature .* None; set it to 0.07'),
    (T5Config(131, 24, 8, 4, 40, 2, 3), LOSSES,
     'expected a model that embeds and matches .* found T5Config'),
    (EmbeddingConfig(131, 24, 8, 4, 40, 2, initial_temperature=0.07),
     ('contrastive', 'text_to_code'), 'a model with a decoder to train'),
])  # fmt: skip
def test_models_that_lack_something_are_refused(model, losses, message):
  objective = dataclasses.replace(OBJECTIVE, losses=losses)
  with pytest.raises(UserError, match=message):
    config(objective, model=model)


def test_an_encoder_alone_is_trained_by_contrast():
  fields = {
      field.name: getattr(MODEL, field.name)
      for field in dataclasses.fields(EmbeddingConfig)
      if field.init
  }
  objective = dataclasses.replace(OBJECTIVE, losses=('contrastive',))
  step_config = config(
      objective,
      model=EmbeddingConfig(**fields),
      optimizer=AdamW(3e-3, warmup_steps=2, decay_steps=40, weight_decay=0.1),
  )
  step = make_train_step(step_config, one_device())
  found = [metrics for metrics, _ in steps(step, step.init(), [batch(0)] * 6)]
  assert found[-1]['contrastive_loss'] < found[1]['contrastive_loss']


def test_microbatches_are_refused_with_their_reason():
  with pytest.raises(UserError, match='rows are compared with each other'):
    config(num_microbatches=2)


def test_a_side_without_a_token_is_one_clear_line():
  row = {'text': np.array([7]), 'code': np.array([], np.int32)}
  with pytest.raises(UserError, match='a token in the code of every pair'):
    OBJECTIVE.example(row, np.random.default_rng(0), VOCABULARY)


def test_sides_are_cut_to_their_lengths_and_known_by_what_is_left():
  long = np.arange(10, 40)
  made, other, third = (
      OBJECTIVE.example(
          {'text': text, 'code': long}, np.random.default_rng(0), VOCABULARY
      )
      for text in (long, long[:20], long[1:])
  )
  assert made['text_tokens'].tolist() == [1, 10, 11, 12, 13, 14, 2]
  assert made['code_tokens'].tolist() == [1, *range(10, 19), 2]
  spec = OBJECTIVE.batch_spec(1)
  assert {name: (1, *value.shape) for name, value in made.items()} == {
      name: leaf.shape for name, leaf in spec.items()
  }
  identities = [each['text_identities'].tolist() for each in (made, other)]
  assert identities[0] == identities[1] != third['text_identities'].tolist()


def test_work_is_counted_by_the_uses_of_the_network():
  passes = OBJECTIVE.passes(10)
  assert sum(x.rows * x.length for x in passes if x.stack == 'encoder') == (
      10 * (7 + 11) + 10 * (7 + 11) + 10 * 7
  )
  assert sum(x.rows * x.length for x in passes if x.stack == 'decoder') == (
      30 * 11 + 10 * 11 + 10 * 7
  )
  assert sum(x.rows * x.length for x in passes if x.writes) == 10 * (11 + 7)
  assert [x.length for x in passes if not x.is_trained] == [7, 11]
