import dataclasses
import inspect
import re
import shlex

import pytest

from codet5p_jax import arguments, configuration, gin_paths, stage_1
from codet5p_jax.corpus.build import CorpusSettings, as_json
from codet5p_jax.main import SUBCOMMANDS
from codet5p_jax.models.bimodal import BimodalConfig
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.sequence_to_sequence import SequenceToSequence
from codet5p_jax.planning.pod_command import objectives_gin_file, pod_commands
from codet5p_jax.runs.precompile import precompile
from codet5p_jax.runs.prepare_corpus import prepare_corpus
from codet5p_jax.runs.train import train

PAIRS = SequenceToSequence(source_length=11, target_length=9)
RUN = dict(
    run_dir='runs/my run', data_dir='runs/corpus', corpus_settings={}
)


@dataclasses.dataclass(frozen=True)
class Unshipped:
  name = 'unshipped'
  reads = 'tokens'


def of(vocab_size):
  """A model with such a vocabulary."""
  return T5Config(vocab_size, 4, 1, 3, 5, 2, 1)


def bimodal_of(vocab_size, *task_tokens):
  names = ('match_id', 'text_decoder_id', 'code_decoder_id')
  return BimodalConfig(
      vocab_size, 4, 1, 3, 5, 2, 1, **dict(zip(names, task_tokens))
  )  # fmt: skip


def words_of(commands, program):
  """The words of the one command that calls a program."""
  lines = commands.replace('\\\n', '').splitlines()
  [found] = [words for words in map(shlex.split, lines) if program in words]
  return found


@pytest.mark.parametrize(
    'objectives, name',
    [
        ([CausalLM(target_length=14)], 'objectives/causal_lm.gin'),
        ([PAIRS], 'runs/finetune.gin'),
        ([Bimodal(queue_size=6)], 'objectives/stage_2.gin'),
        ([Unshipped()], None),
        ([CausalLM(), Unshipped()], None),
    ],
)
def test_the_gin_file_of_just_these_objectives_is_found(objectives, name):
  assert objectives_gin_file(objectives) == name


@pytest.mark.parametrize('objective', [CausalLM(), PAIRS])
def test_the_training_command_is_complete(objective):
  commands = pod_commands([objective], of(8192), **RUN)
  script, *words = words_of(commands, 'tpu_scripts/train_on_tpu_vm.sh')
  assert words[:2] == ['NAME', 'ZONE']
  gin_files = [w.removeprefix('--gin_file=') for w in words if '.gin' in w]
  macros = dict(w.split('=', 1) for w in words[2:] if '.gin' not in w)
  configuration.load(gin_files, macros, run=train)
  config = configuration.macro('STEP_CONFIG')
  assert config.model.emb_dim == 768
  assert [type(o) for o in config.objectives] == [type(objective)]
  assert config.batch_size % (8 * config.num_microbatches) == 0
  assert macros['DATA_DIR'] == '../data'


def test_the_corpus_is_prepared_as_before_but_for_the_vocabulary():
  settings = {'source': 'a b', 'vocab_size': 8192, 'kinds': ['x', 'y'],
              'limit': None, 'corpus_dir': 'elsewhere',
              'vocabulary_fingerprint': 'f00d'}  # fmt: skip
  commands = pod_commands(
      [CausalLM()], of(8192), **RUN | {'corpus_settings': settings}
  )
  assert words_of(commands, 'prepare_corpus')[2:] == [
      '--source=a b',
      '--vocab_size=32100',
      '--kinds=x,y',
      '--corpus_dir=runs/corpus_220m',
  ]
  assert 'runs/corpus_220m' in words_of(commands, 'gcloud')


def test_a_corpus_of_the_right_vocabulary_is_taken_as_it_is():
  commands = pod_commands([CausalLM()], of(32100), **RUN)
  assert 'prepare_corpus' not in commands
  assert 'runs/corpus' in words_of(commands, 'gcloud')


@pytest.mark.parametrize(
    'vocab_size, folder',
    [(32100, 'runs/my run/vocabulary'), (50, 'VOCABULARY')],
)
def test_fine_tuning_brings_a_vocabulary_along(vocab_size, folder):
  commands = pod_commands([PAIRS], of(vocab_size), **RUN)
  assert folder in words_of(commands, 'NAME:vocabulary')
  assert 'VOCABULARY_DIR=../vocabulary' in commands
  assert ('32,100' in commands) == (vocab_size == 50)


def test_objectives_of_no_shipped_file_come_from_the_runs_own_configuration():
  commands = pod_commands([Unshipped()], of(32100), **RUN)
  copied = words_of(commands, 'NAME:operative_config.gin')
  assert 'runs/my run/operative_config.gin' in copied
  words = words_of(commands, 'tpu_scripts/train_on_tpu_vm.sh')
  assert words[3:5] == [
      '--gin_file=../operative_config.gin',
      '--gin_file=models/t5_220m.gin',
  ]


def test_commands_fit_the_page_and_name_what_exists():
  commands = pod_commands([CausalLM()], of(8192), **RUN)
  assert max(map(len, commands.splitlines())) <= 80
  for name in re.findall(r'--gin_file=(\S+)', commands):
    assert gin_paths.find(name), name
  for name in re.findall(r'bin/codet5p (\w+)', commands):
    assert name in SUBCOMMANDS


def test_the_main_job_s_commands_are_those_that_there_are():
  settings = as_json(CorpusSettings(vocabulary_fingerprint='f00d'))
  assert settings['pairs'] is False
  commands = pod_commands(
      stage_1.OBJECTIVES, of(4096), **RUN | {'corpus_settings': settings}
  )
  flags = [
      word.removeprefix('--').split('=')[0]
      for word in words_of(commands, 'prepare_corpus')[2:]
  ]
  assert 'pairs' not in flags
  assert set(flags) <= set(inspect.signature(prepare_corpus).parameters)
  script = words_of(commands, 'tpu_scripts/train_on_tpu_vm.sh')
  assert '--gin_file=objectives/stage_1.gin' in script


@pytest.mark.parametrize(
    ('model', 'vocab_size', 'task_tokens'),
    [
        (bimodal_of(4096, 5, 6, 7), 32100, (5, 6, 7)),
        (bimodal_of(32100, 5, 6, 7), 32100, (5, 6, 7)),
        (bimodal_of(32103), 32103, (32100, 32101, 32102)),
    ],
    ids=['tiny', 'of stage 1', 'released'],
)
def test_stage_2_goes_on_with_stage_1_at_its_size(
    model, vocab_size, task_tokens
):
  settings = {'sources': ['a', 'b'], 'pairs': False}
  commands = pod_commands(
      [Bimodal(queue_size=6)], model, **RUN | {'corpus_settings': settings}
  )
  assert max(map(len, commands.splitlines())) <= 80
  assert 'NUM_MICROBATCHES' not in commands
  if model.vocab_size == 4096:
    prepare = words_of(commands, 'prepare_corpus')
    assert {'--pairs=True', '--vocab_size=32100'} <= set(prepare)
    hints = arguments.type_hints(prepare_corpus)
    assert arguments.value_for('True', [hints['pairs']], 'pairs') is True
  else:
    assert 'prepare_corpus' not in commands
  for program, run in (
      ('precompile', precompile), ('tpu_scripts/train_on_tpu_vm.sh', train)
  ):  # fmt: skip
    words = words_of(commands, program)
    gin_files, bindings, macros = [], [], {}
    for word in words:
      if word.startswith('--gin_file='):
        gin_files.append(word.removeprefix('--gin_file='))
      elif word.startswith('--gin.'):
        bindings.append(word.removeprefix('--gin.'))
      elif '=' in word:
        macros.update([word.split('=', 1)])
    configuration.load(gin_files, macros, bindings, run=run)
    config = configuration.macro('STEP_CONFIG')
    assert config.model.emb_dim == 768 and config.batch_size == 256
    assert config.optimizer.peak_learning_rate == 1e-4
    assert config.model.vocab_size == vocab_size
    assert task_tokens == (
        config.model.match_id,
        config.model.text_decoder_id,
        config.model.code_decoder_id,
    )
    assert config.objectives == (Bimodal(),)
  assert 'initial_weights/stage_1.gin' in gin_files
  [(source, _, _), (fresh, _, _)] = configuration.macro('INIT_FROM')
  assert (source, fresh) == ('../run', 'fresh')
  assert macros['RUN_DIR'] != source
