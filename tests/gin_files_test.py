"""Tests of the gin files that come with the package."""

import dataclasses
import pathlib
import re
import shlex

import gin
import jax
import pytest

from codet5p_jax import configuration
from codet5p_jax import errors
from codet5p_jax import gin_paths
from codet5p_jax import main
from codet5p_jax import stage_1
from codet5p_jax.corpus.build import CorpusSettings
from codet5p_jax.data import vocabularies
from codet5p_jax.data.task_tokens import codet5_layout
from codet5p_jax.objectives import span_denoising
from codet5p_jax.planning.parameters import count, parameter_shapes
from codet5p_jax.runs.precompile import precompile
from codet5p_jax.runs.train import train
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.train_step import StepConfig, make_train_step

PARAMETERS = {
    'models/tiny.gin': 1_443_456,
    'models/t5_60m.gin': 60_492_288,
    'models/t5_220m.gin': 222_882_048,
    'models/t5_770m.gin': 737_639_424,
    'models/bimodal_tiny.gin': 1_476_738,
    'models/bimodal_220m.gin': 223_082_754,
    'models/embedding_110m.gin': 109_806_208,
    'models/codegen_350m.gin': 356_712_448,
    'models/codegen_2b.gin': 2_779_356_160,
    'models/codegen_6b.gin': 7_064_213_504,
    'models/codegen_16b.gin': 16_032_155_648,
    'models/deep_tiny.gin': 2_278_272,
    'models/deep_2b.gin': 3_112_427_008,
    'models/deep_6b.gin': 7_439_753_216,
    'models/deep_16b.gin': 16_493_680_640,
    'models/instruct_16b.gin': 16_493_680_640,
}
# What presets share; they include these, which alone are no model.
SHARED = {'models/t5.gin', 'models/codegen.gin', 'models/deep.gin'}
# Of the parts of the composite models: encoder, bridge, cross-attention, and
# the rest of the decoder, which is CodeGen-mono of the same size.
PARTS = {
    'models/deep_2b.gin': (
        304_232_448, 2_624_000, 26_214_400, 2_779_356_160
    ),
    'models/deep_6b.gin': (
        304_232_448, 4_198_400, 67_108_864, 7_064_213_504
    ),
    'models/deep_16b.gin': (
        304_232_448, 6_297_600, 150_994_944, 16_032_155_648
    ),
}
# What a run of training is made of, beside the model.
RUNS = {
    'pretrain': ('objectives/causal_lm.gin', 'runs/pretrain.gin'),
    'finetune': ('runs/finetune.gin',),
}
# Encoders alone, and decoders alone, with what each lacks for them.
REFUSED = {
    ('models/embedding_110m.gin', 'pretrain'): 'with a decoder',
    ('models/embedding_110m.gin', 'finetune'): 'with a decoder',
    ('models/codegen_350m.gin', 'finetune'): 'with an encoder',
    ('models/codegen_2b.gin', 'finetune'): 'with an encoder',
    ('models/codegen_6b.gin', 'finetune'): 'with an encoder',
    ('models/codegen_16b.gin', 'finetune'): 'with an encoder',
}
REQUIRED = re.compile(r'^([A-Z_0-9]+) = %gin.REQUIRED$', re.M)


@pytest.fixture(autouse=True)
def _forget_the_configuration():
  yield
  gin.clear_config()


def header(name: str) -> str:
  """The comment that opens a gin file."""
  text = gin_paths.locate(name).read_text()
  return re.match(r'(?:#.*\n)*', text)[0]


def listed(name: str) -> list[str]:
  """The macros that the header of a gin file calls required or often set."""
  paragraphs = re.findall(
      r'^# (?:Required|Often set)\b.*(?:\n# .+)*', header(name), re.M
  )
  return re.findall(r'\b[A-Z]{2,}(?:_[A-Z0-9]+)*\b', ' '.join(paragraphs))


def example(name: str) -> list[str] | None:
  """The arguments of the command in a header, None if it shows none."""
  lines = re.search(r'#   codet5p ((?:.*\\\n#)*.*)', header(name))
  return lines and shlex.split(lines[1].replace('\\\n#', ' '))


def test_every_model_file_is_among_those_tested_here():
  models = {name for name in gin_paths.shipped() if name.startswith('models/')}
  assert models - SHARED == set(PARAMETERS)


@pytest.mark.parametrize('name', gin_paths.shipped())
def test_every_file_is_understood_by_itself(name):
  configuration.load([name])
  assert header(name), 'a header says what the file is for'


@pytest.mark.parametrize(
    ('model', 'run'),
    [
        (model, run)
        for model in PARAMETERS
        for run in RUNS
        if (model, run) not in REFUSED
    ],
)
def test_every_model_and_run_make_a_step(model, run):
  configuration.load([model, *RUNS[run]], run=precompile)
  config = configuration.macro('STEP_CONFIG')
  assert isinstance(config, StepConfig)
  configuration.load([model])
  assert config.model == configuration.macro('MODEL')
  assert config.optimizer.warmup_steps < config.optimizer.decay_steps
  [objective] = config.objectives
  lengths = {
      feature: spec.shape[1:]
      for feature, spec in objective.batch_spec(config.batch_size).items()
  }
  source, target = {'pretrain': (1, 1024), 'finetune': (512, 512)}[run]
  assert lengths == {
      'encoder_input_tokens': (source,),
      'decoder_target_tokens': (target,),
      'decoder_loss_weights': (target,),
  }


@pytest.mark.parametrize(('model', 'run'), REFUSED)
def test_a_model_that_lacks_a_stack_is_refused_in_one_line(model, run, capsys):
  files = [f'--gin_file={name}' for name in (model, *RUNS[run])]
  assert main.main(['precompile', 'TOPOLOGY=v5e:1x1', *files]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert f'expected a model {REFUSED[model, run]} to' in line


@pytest.mark.parametrize('model', PARAMETERS)
def test_every_model_has_its_number_of_parameters(model):
  configuration.load([model])
  config = configuration.macro('MODEL')
  assert count(parameter_shapes(config.make_model())) == PARAMETERS[model]


@pytest.mark.parametrize('model', PARTS)
def test_the_parts_of_the_composites_have_their_number_of_parameters(model):
  configuration.load([model])
  shapes = parameter_shapes(configuration.macro('MODEL').make_model())

  def count_below(path):
    return count({k: x for k, x in shapes.items() if k.startswith(path)})

  cross_attention = count_below('decoder/last_layer/cross_attention/')
  assert PARTS[model] == (
      count_below('encoder/'),
      count_below('encoder_to_decoder/'),
      cross_attention,
      count_below('decoder/') - cross_attention,
  )


@pytest.mark.parametrize('model', PARAMETERS)
def test_every_model_file_says_what_training_and_prompts_need(model):
  configuration.load([model])
  config = configuration.macro('MODEL')
  prompted = configuration.macro('MODEL_PROMPT_TO_DECODER')
  assert prompted == config.prompt_to_decoder
  assert configuration.macro('MODEL_DROPOUT_RATE') == (
      0.0 if prompted else 0.1
  )
  shapes = parameter_shapes(config.make_model())
  patterns = configuration.macro('MODEL_TRAINABLE')
  trained = {
      name
      for name in shapes
      if any(re.fullmatch(pattern, name) for pattern in patterns)
  }
  if model in PARTS:
    *parts, _ = PARTS[model]
    assert count({name: shapes[name] for name in trained}) == sum(parts)
  elif model.startswith('models/deep') or 'instruct' in model:
    assert trained < set(shapes)
  else:
    assert trained == set(shapes)


def test_the_presets_of_released_models_have_the_ids_of_their_vocabulary():
  for model in PARAMETERS:
    configuration.load([model])
    config = configuration.macro('MODEL')
    ids = config.pad_id, config.eos_id, config.decoder_start_id
    if config.vocab_size == 51200:
      assert ids == (50256, 50256, 50256)
      assert config.vocabulary_kinds[0] == 'codegen'
    else:
      assert ids == (0, 2, 0)


def test_the_bimodal_presets_have_the_task_tokens_of_their_vocabulary(
    small_corpus,
):
  own = vocabularies.load_vocabulary(small_corpus / 'vocabulary')
  released = codet5_layout(
      ['<pad>', '<s>', '</s>', '<unk>', '<mask>', *map(str, range(31_995))],
      bimodal=True,
  )
  for model, ids in (
      ('models/bimodal_tiny.gin', own.task_tokens),
      ('models/bimodal_220m.gin', released.task_tokens),
  ):
    configuration.load([model])
    config = configuration.macro('MODEL')
    assert (
        config.match_id, config.text_decoder_id, config.code_decoder_id
    ) == (ids.match, ids.tdec, ids.cdec)  # fmt: skip


def test_the_tiny_bimodal_model_is_the_tiny_one_and_its_heads():
  shapes = []
  for model in ('models/tiny.gin', 'models/bimodal_tiny.gin'):
    configuration.load([model])
    shapes.append(parameter_shapes(configuration.macro('MODEL').make_model()))
  tiny, bimodal = (set(part.items()) for part in shapes)
  assert tiny < bimodal
  assert {path.split('/')[0] for path, _ in bimodal - tiny} == {
      'projection', 'matching_head'
  }  # fmt: skip


@pytest.mark.parametrize(
    'model', [name for name in PARAMETERS if 'bimodal' in name]
)
def test_stage_2_makes_a_step_of_the_models_that_it_is_for(model):
  configuration.load(
      [model, 'objectives/stage_2.gin', 'runs/pretrain.gin'],
      {'BATCH_SIZE': 256},
      run=precompile,
  )
  config = configuration.macro('STEP_CONFIG')
  [objective] = config.objectives
  assert objective.name == 'bimodal'
  assert config.model.initial_temperature == 0.07


def test_the_released_composites_alone_know_indentation_by_tabs():
  found = set()
  for model in PARAMETERS:
    configuration.load([model])
    if getattr(configuration.macro('MODEL'), 'indent_with_tabs', False):
      found.add(model)
  assert found == {*PARTS, 'models/instruct_16b.gin'}


@pytest.mark.parametrize(
    ('model', 'run'),
    [('models/t5_220m.gin', 'pretrain'), ('models/t5_770m.gin', 'finetune')],
)
def test_a_step_is_traced_without_allocating_its_state(model, run):
  configuration.load([model, *RUNS[run]], run=precompile)
  config = configuration.macro('STEP_CONFIG')
  before = sum(array.nbytes for array in jax.live_arrays())
  state = make_train_step(config, make_mesh(config.mesh_shape)).abstract_state
  assert sum(array.nbytes for array in jax.live_arrays()) <= before + 1024
  # Padding makes the table a little larger than what `info` counts.
  padding = (-config.model.vocab_size % 128) * config.model.emb_dim
  sizes = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert sizes == PARAMETERS[model] + padding
  assert not state.frozen_params


@pytest.mark.parametrize('model', ['models/t5_220m.gin', 'models/t5_770m.gin'])
def test_info_counts_a_released_model_from_its_gin_file_alone(model, capsys):
  assert main.main(['info', f'--gin_file={model}']) == 0
  *_, total = capsys.readouterr().out.splitlines()
  number = f'{PARAMETERS[model]:,}'
  assert total.split() == ['total', number, number, '0']


def test_info_tells_what_of_a_released_model_is_frozen(capsys):
  assert main.main(['info', '--gin_file=models/deep_2b.gin']) == 0
  sizes, parts = capsys.readouterr().out.split('\n\n')
  printed = dict(line.split() for line in sizes.splitlines())
  assert printed['encoder.emb_dim'] == '1024'
  assert printed['decoder.num_layers'] == '32'
  encoder, bridge, cross_attention, frozen = PARTS['models/deep_2b.gin']
  rows = [line.replace(',', '').split() for line in parts.splitlines()[1:]]
  trained = encoder + bridge + cross_attention
  assert {name: tuple(map(int, numbers)) for name, *numbers in rows} == {
      'encoder': (encoder, encoder, 0),
      'encoder_to_decoder': (bridge, bridge, 0),
      'decoder': (cross_attention + frozen, cross_attention, frozen),
      'total': (trained + frozen, trained, frozen),
  }


def test_info_prefers_what_a_run_trains(capsys):
  macro = "TRAINABLE=('encoder/.*',)"
  assert main.main(['info', '--gin_file=models/deep_2b.gin', macro]) == 0
  *_, total = capsys.readouterr().out.splitlines()
  assert total.split()[2] == f'{PARTS["models/deep_2b.gin"][0]:,}'


class Understood(Exception):
  """The run would begin now."""


@pytest.fixture
def understand(monkeypatch):
  """Runs a command line up to where its function would be called."""
  check = configuration._check_complete

  def stop(function, scopes, given):
    check(function, scopes, given)
    raise Understood

  monkeypatch.setattr(configuration, '_check_complete', stop)

  def run(argv):
    with pytest.raises(Understood):
      assert main.main(argv) == 0

  return run


@pytest.mark.parametrize(
    'argv',
    [['info'], ['precompile', 'TOPOLOGY=v5e:4x4'],
     ['precompile', 'TOPOLOGY=v5e:1x1', 'BATCH_SIZE=16', '--report', 'x.json']],
    ids=' '.join,
)
def test_fine_tuning_is_looked_at_without_any_required_macro(understand, argv):
  understand(
      [*argv, '--gin_file=models/tiny.gin', '--gin_file=runs/finetune.gin']
  )


@pytest.mark.parametrize('name', [*filter(example, gin_paths.shipped())])
def test_the_command_of_a_header_is_complete(understand, name):
  understand(example(name))


@pytest.mark.parametrize('name', [*filter(listed, gin_paths.shipped())])
def test_macros_that_a_header_lists_exist(name):
  for macro in listed(name):
    configuration.load([name], {macro: '%gin.REQUIRED'})
  with pytest.raises(errors.UserError, match='has a macro NO_SUCH'):
    configuration.load([name], {'NO_SUCH': '%gin.REQUIRED'})


def test_macros_that_a_run_requires_are_listed_as_required(understand, capsys):
  del understand  # Stops a run that begins although something is missing.
  for name in filter(example, gin_paths.shipped()):
    for macro in REQUIRED.findall(gin_paths.locate(name).read_text()):
      argv = [x for x in example(name) if not x.startswith(f'{macro}=')]
      assert main.main(argv) == 2
      assert f'needs a value for {macro}' in capsys.readouterr().err
      assert macro in listed(name)


class CodeGen(vocabularies.Vocabulary):
  """Of the kind whose sentinels are untrained."""

  kind = 'codegen'

  def __init__(self):
    pass

  def encode_batch(self, texts):
    raise NotImplementedError

  def encode_as_released(self, text):
    raise NotImplementedError


def test_the_flag_that_denoising_asks_for_is_one_of_gin():
  configuration.load(['objectives/stage_1.gin'])
  with pytest.raises(errors.UserError) as error:
    span_denoising.SpanDenoising().rows('corpus', 'train', CodeGen())
  [binding] = re.findall(r'--gin\.(\S+=True)', str(error.value))
  configuration.load(['objectives/stage_1.gin'], bindings=[binding])
  denoising, *_ = configuration.macro('OBJECTIVES')
  assert denoising.untrained_sentinels


def test_the_lengths_of_stage_1_are_those_that_inspection_uses():
  configuration.load(['objectives/stage_1.gin'])
  configured = configuration.macro('OBJECTIVES')
  assert [type(o) for o in configured] == [type(o) for o in stage_1.OBJECTIVES]
  for ours, theirs in zip(configured, stage_1.OBJECTIVES, strict=True):
    # Looking at data needs no sentinels that a model knows.
    others = {'first_step', 'batch_scale', 'untrained_sentinels'}
    for field in {x.name for x in dataclasses.fields(ours)} - others:
      assert getattr(ours, field) == getattr(theirs, field)


def test_the_main_job_fits_its_own_model_and_corpus():
  """The `make pretrain` of the Makefile, up to where it would train."""
  makefile = pathlib.Path(__file__).parents[1] / 'Makefile'
  recipe = makefile.read_text().split('\npretrain:')[1].split('\n\n')[0]
  commands = recipe.replace('\\\n', ' ').split('$(CODET5P) ')
  [prepare] = [c for c in commands if c.startswith('prepare_corpus')]
  flags = {word.removeprefix('--').split('=')[0] for word in prepare.split()}
  assert flags == {
      'prepare_corpus', 'corpus_dir', 'sources', 'languages', 'pairs'
  }  # fmt: skip
  stages = []
  for command in commands:
    words = shlex.split(command, comments=True)
    if words[:1] == ['train']:
      gin_files = [w.split('=')[1] for w in words if '.gin' in w]
      macros = dict(w.split('=', 1) for w in words[1:] if '.gin' not in w)
      macros |= {'TRAIN_STEPS': 1000}
      configuration.load(gin_files, macros, run=train)
      stages.append(configuration.macro('STEP_CONFIG'))
  for config in stages:
    assert config.model.vocab_size == CorpusSettings.vocab_size
  first, second = stages
  assert [o.first_step > 0 for o in first.objectives] == [False, True, True]
  [pairs] = second.objectives
  assert pairs.queue_size % second.batch_size == 0
  # What stage 1 trained fits.
  sizes = dataclasses.asdict(first.model)
  assert sizes.items() <= dataclasses.asdict(second.model).items()
