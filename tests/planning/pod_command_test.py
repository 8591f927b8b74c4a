import dataclasses
import inspect
import re
import shlex

import pytest

from codet5p_jax import configuration, gin_paths, stage_1
from codet5p_jax.corpus.build import CorpusSettings, as_json
from codet5p_jax.main import SUBCOMMANDS
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.sequence_to_sequence import SequenceToSequence
from codet5p_jax.planning.pod_command import objectives_gin_file, pod_commands
from codet5p_jax.runs.prepare_corpus import prepare_corpus
from codet5p_jax.runs.train import train

PAIRS = SequenceToSequence(source_length=11, target_length=9)
RUN = dict(
    run_dir='runs/my run', data_dir='runs/corpus', corpus_settings={}
)


@dataclasses.dataclass(frozen=True)
class Unshipped:
  name = 'unshipped'


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
        ([Unshipped()], None),
        ([CausalLM(), Unshipped()], None),
    ],
)
def test_the_gin_file_of_just_these_objectives_is_found(objectives, name):
  assert objectives_gin_file(objectives) == name


@pytest.mark.parametrize('objective', [CausalLM(), PAIRS])
def test_the_training_command_is_complete(objective):
  commands = pod_commands([objective], 8192, **RUN)
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
      [CausalLM()], 8192, **RUN | {'corpus_settings': settings}
  )
  assert words_of(commands, 'prepare_corpus')[2:] == [
      '--source=a b',
      '--vocab_size=32100',
      '--kinds=x,y',
      '--corpus_dir=runs/corpus_220m',
  ]
  assert 'runs/corpus_220m' in words_of(commands, 'gcloud')


def test_a_corpus_of_the_right_vocabulary_is_taken_as_it_is():
  commands = pod_commands([CausalLM()], 32100, **RUN)
  assert 'prepare_corpus' not in commands
  assert 'runs/corpus' in words_of(commands, 'gcloud')


@pytest.mark.parametrize(
    'vocab_size, folder',
    [(32100, 'runs/my run/vocabulary'), (50, 'VOCABULARY')],
)
def test_fine_tuning_brings_a_vocabulary_along(vocab_size, folder):
  commands = pod_commands([PAIRS], vocab_size, **RUN)
  assert folder in words_of(commands, 'NAME:vocabulary')
  assert 'VOCABULARY_DIR=../vocabulary' in commands
  assert ('32,100' in commands) == (vocab_size == 50)


def test_objectives_of_no_shipped_file_come_from_the_runs_own_configuration():
  commands = pod_commands([Unshipped()], 32100, **RUN)
  copied = words_of(commands, 'NAME:operative_config.gin')
  assert 'runs/my run/operative_config.gin' in copied
  words = words_of(commands, 'tpu_scripts/train_on_tpu_vm.sh')
  assert words[3:5] == [
      '--gin_file=../operative_config.gin',
      '--gin_file=models/t5_220m.gin',
  ]


def test_commands_fit_the_page_and_name_what_exists():
  commands = pod_commands([CausalLM()], 8192, **RUN)
  assert max(map(len, commands.splitlines())) <= 80
  for name in re.findall(r'--gin_file=(\S+)', commands):
    assert gin_paths.find(name), name
  for name in re.findall(r'bin/codet5p (\w+)', commands):
    assert name in SUBCOMMANDS


def test_the_main_job_s_commands_are_those_that_there_are():
  settings = as_json(CorpusSettings(vocabulary_fingerprint='f00d'))
  commands = pod_commands(
      stage_1.OBJECTIVES, 4096, **RUN | {'corpus_settings': settings}
  )
  flags = [
      word.removeprefix('--').split('=')[0]
      for word in words_of(commands, 'prepare_corpus')[2:]
  ]
  assert set(flags) <= set(inspect.signature(prepare_corpus).parameters)
  script = words_of(commands, 'tpu_scripts/train_on_tpu_vm.sh')
  assert '--gin_file=objectives/stage_1.gin' in script
