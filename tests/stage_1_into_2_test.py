"""Stage 2 from weights of stage 1, and from released ones."""

import dataclasses

import jax
import numpy as np
import pytest

from codet5p_jax import configuration
from codet5p_jax.conversion.families import FAMILIES
from codet5p_jax.conversion.sources import open_source
from codet5p_jax.conversion.tokenizer_files import write_tokenizer
from codet5p_jax.errors import UserError
from codet5p_jax.initialisation import load_given, plan_first_state
from codet5p_jax.models.bimodal import BimodalConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.runs.convert import convert
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.checkpoints.layout import flatten, unstack_leaves
from codet5p_jax.training.checkpoints.weights import save_weights
from codet5p_jax.training.files import write_json
from codet5p_jax.training.optimizers import SGD
from codet5p_jax.training.run_folder import RunFolder, describe
from codet5p_jax.training.train_step import StepConfig, make_train_step
from tests.conversion.conftest import Folder, draw_tensors
from tests.data.conftest import (  # noqa: F401. Fixtures.
    small_codegen_files,
    small_codet5_files,
    small_vocabularies,
    training_texts,
)

SIZES = {
    'emb_dim': 12,
    'num_heads': 5,
    'head_dim': 7,
    'mlp_dim': 29,
    'num_encoder_layers': 2,
    'num_decoder_layers': 3,
}
NEW = {
    'projection/kernel', 'projection/bias', 'matching_head/kernel',
    'matching_head/bias', 'temperature/value',
}  # fmt: skip


def t5(vocabulary):
  return T5Config(vocab_size=vocabulary.vocab_size, **SIZES)


def bimodal(vocabulary, temperature=0.07):
  ids = vocabulary.task_tokens
  return BimodalConfig(
      vocab_size=vocabulary.vocab_size,
      **SIZES,
      projection_dim=17,
      match_id=ids.match,
      text_decoder_id=ids.tdec,
      code_decoder_id=ids.cdec,
      initial_temperature=temperature,
  )


def write_run(path, model, vocabulary, params):
  """The folder of a run that is complete."""
  folder = RunFolder(path)
  save_weights(folder.model, params, {'step': 9}, model.vocab_size)
  vocabulary.save(folder.vocabulary)
  write_json(folder.config, describe({'model': model}))
  return path


def write_released(path, kind, model, vocabulary):
  """A folder in Hugging Face's layout."""
  config = FAMILIES[kind].write_config(model)
  folder = Folder(path, config, draw_tensors(kind, model)).write()
  write_tokenizer(vocabulary, folder)
  return folder


def start(init_from, model, vocabulary):
  """The parameters that a run of stage 2 is given, by path, and its plan."""
  step = make_train_step(
      StepConfig(
          model=model,
          objectives=(Bimodal(5, 6, 8),),
          optimizer=SGD(0.1),
          batch_size=4,
          computation=Computation(dtype='float32'),
      ),
      make_mesh((1, 1, 1), jax.devices()[:1]),
  )
  plan = plan_first_state(init_from, step, vocabulary, resumes=False)
  given, _ = load_given(plan, step.abstract_state.params, step.axis_names)
  return unstack_leaves(jax.tree.map(np.asarray, given)), plan


def stage_1(folder):
  configuration.load(
      ['initial_weights/stage_1.gin'], {'STAGE_1': str(folder)}
  )
  return configuration.macro('INIT_FROM')


def same_weights(given, source):
  """Compares what a run was given with what its source holds."""
  rows = source.model.vocab_size
  for path, leaf in given.items():
    found, expected = np.asarray(leaf), source.read(path)
    if path == 'token_embedder/embedding':  # It has rows to spare.
      found, expected = found[:rows], expected[:rows]
    np.testing.assert_array_equal(found, expected, err_msg=path)


def test_a_run_of_stage_1_goes_on_in_stage_2(
    tmp_path, small_vocabularies, random_parameters  # noqa: F811
):
  vocabulary = small_vocabularies['sentencepiece']
  params = random_parameters(t5(vocabulary).make_model())
  folder = write_run(tmp_path / 'run', t5(vocabulary), vocabulary, params)
  given, plan = start(stage_1(folder), bimodal(vocabulary), vocabulary)
  assert plan.shapes.keys() - given.keys() == NEW
  same_weights(given, open_source(folder))


def test_a_converted_t5_goes_on_with_three_tokens_more(
    tmp_path, small_vocabularies  # noqa: F811
):
  one, two = (small_vocabularies[kind] for kind in ('codet5', 'codet5_bimodal'))
  theirs = write_released(tmp_path / 'theirs', 't5', t5(one), one)
  convert(str(theirs), str(tmp_path / 'ours'))
  for folder in (theirs, tmp_path / 'ours'):
    given, plan = start(stage_1(folder), bimodal(two), two)
    assert plan.shapes.keys() - given.keys() == NEW
    same_weights(given, open_source(folder))
    table = np.asarray(given['token_embedder/embedding'])
    assert (table[one.vocab_size : two.vocab_size] != 0).all()
  with pytest.raises(UserError, match='expected the vocabulary of .*theirs'):
    other = dataclasses.replace(
        bimodal(two), vocab_size=small_vocabularies['sentencepiece'].vocab_size
    )
    start(stage_1(theirs), other, small_vocabularies['sentencepiece'])


def test_a_released_bimodal_model_is_trained_on_with_a_new_temperature(
    tmp_path, small_vocabularies  # noqa: F811
):
  vocabulary = small_vocabularies['codet5_bimodal']
  released = bimodal(vocabulary, temperature=None)
  folder = write_released(
      tmp_path / 'theirs', 'codet5p_bimodal', released, vocabulary
  )
  init_from = [
      (str(folder), '(?!temperature).*', None),
      ('fresh', 'temperature', None),
  ]
  given, plan = start(init_from, bimodal(vocabulary), vocabulary)
  assert plan.shapes.keys() - given.keys() == {'temperature/value'}
  same_weights(given, open_source(folder))
  # Or as if it had only been through stage 1.
  init_from = [
      (str(folder), '(?!projection|matching_head|temperature).*', None),
      ('fresh', 'projection|matching_head|temperature', None),
  ]
  given, plan = start(init_from, bimodal(vocabulary), vocabulary)
  assert plan.shapes.keys() - given.keys() == NEW


def test_a_run_of_stage_2_gives_its_temperature_too(
    tmp_path, small_vocabularies, random_parameters  # noqa: F811
):
  vocabulary = small_vocabularies['sentencepiece']
  model = bimodal(vocabulary)
  params = random_parameters(model.make_model())
  folder = write_run(tmp_path / 'run', model, vocabulary, params)
  given, plan = start([(str(folder), '.*', None)], model, vocabulary)
  assert given.keys() == plan.shapes.keys()
  same_weights(given, open_source(folder))
  assert given['temperature/value'] == flatten(params)['temperature/value']
