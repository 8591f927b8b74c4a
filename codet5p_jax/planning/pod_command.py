"""The commands that train the same on a TPU slice, at the size of 220M."""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from codet5p_jax import gin_paths
from codet5p_jax.models.bimodal import BimodalConfig


@dataclasses.dataclass(frozen=True)
class _Stage:
  """How a stage of the paper is trained at this size (section 4.2).

  Attributes:
    model: gin file.
    data: name of the data's folder on the TPU VM.
    run: name of the run's folder there.
    sizes: macros beside what the gin files say.
  """

  model: str
  data: str
  run: str
  sizes: tuple[str, ...]


_STAGE_1 = _Stage(
    'models/t5_220m.gin',
    'data',
    'run',
    # A batch as large as the paper's goes through a chip in parts.
    ('NUM_MICROBATCHES=8',),
)
# Beside the folders that the commands of stage 1 leave there.
_STAGE_2 = _Stage(
    'models/bimodal_220m.gin',
    'data_2',
    'run_2',
    ('BATCH_SIZE=256', 'LEARNING_RATE=1e-4'),
)
_TASK_TOKENS = ('match_id', 'text_decoder_id', 'code_decoder_id')
# A slice that one host drives; what fits its chips fits more of them.
_TOPOLOGY = 'v5e:2x4'
_WIDTH = 80


def objectives_gin_file(objectives: Sequence[Any]) -> str | None:
  """The shipped gin file that trains just these objectives, if there is one.

  Args:
    objectives: those of a run; only their classes matter.
  """
  classes = {
      f'{type(o).__module__.rpartition(".")[2]}.{type(o).__name__}'
      for o in objectives
  }
  for name in gin_paths.shipped():
    text = (gin_paths.gin_folder() / name).read_text(encoding='utf-8')
    found = re.search(r'^OBJECTIVES = \[(.*?)\]', text, re.M | re.S)
    if found and classes == set(re.findall(r'(\w+\.\w+)\(', found[1])):
      return name
  return None


def pod_commands(
    objectives: Sequence[Any],
    model: Any,
    run_dir: str,
    data_dir: str,
    corpus_settings: Mapping[str, Any],
) -> str:
  """Commands for a shell in a checkout, from the data to the training.

  A run's own sizes are left behind: what the gin files say is the paper's. NAME
  and ZONE are left for the user to fill in.

  Args:
    objectives: of the run.
    model: of the run; only what it says of its vocabulary matters.
    run_dir: the run's folder.
    data_dir: the folder of its data.
    corpus_settings: the arguments its corpus was prepared with; {} where they
      are unknown, or the data is no corpus.
  """
  is_stage_2 = any(objective.reads == 'pairs' for objective in objectives)
  stage = _STAGE_2 if is_stage_2 else _STAGE_1
  # Stage 2 goes on with weights of stage 1, and so with its vocabulary; but the
  # released one has three tokens more.
  wanted_vocab_size = _vocab_size_of(_STAGE_1)
  fits = model.vocab_size in (wanted_vocab_size, _vocab_size_of(stage))
  gin_file = objectives_gin_file(objectives)
  is_whole_run = gin_file is not None and gin_file.startswith('runs/')
  copied = {}  # What the machine needs, by its name there.
  lines = []
  macros = [f'DATA_DIR=../{stage.data}', f'RUN_DIR=../{stage.run}']
  if is_whole_run:  # Fine-tuning: its data has no vocabulary of its own.
    copied['vocabulary'] = f'{run_dir}/vocabulary' if fits else 'VOCABULARY'
    macros.append('VOCABULARY_DIR=../vocabulary')
    if not fits:
      lines.append(
          f'# VOCABULARY: the folder of one of {wanted_vocab_size:,} tokens.'
      )
  elif not fits:
    data_dir = f'{data_dir}_220m'
    settings = {
        **corpus_settings,
        'corpus_dir': data_dir,
        'vocab_size': wanted_vocab_size,
        'vocabulary_fingerprint': None,  # Another vocabulary; and no flag.
        **({'pairs': True} if is_stage_2 else {}),
    }
    lines += [
        f'# A corpus of the {wanted_vocab_size:,} tokens that the model knows.',
        _wrapped(['.venv/bin/codet5p', 'prepare_corpus', *_flags(settings)]),
    ]
  copied[stage.data] = data_dir
  if gin_file is None:
    # None that is shipped: the run's own configuration has its objectives.
    here = [f'{run_dir}/operative_config.gin', stage.model]
    copied['operative_config.gin'] = here[0]
    there = ['../operative_config.gin', stage.model]
  else:
    here = [stage.model, gin_file]
    if not is_whole_run:
      here.append('runs/pretrain.gin')
    there = here
  sizes = [] if is_whole_run else [*stage.sizes]
  training = '# Installs this checkout there and trains on all of its chips.'
  if is_stage_2:
    vocab_size = model.vocab_size if fits else wanted_vocab_size
    sizes += _vocabulary_bindings(model, vocab_size)
    there = [*there, 'initial_weights/stage_1.gin']
    macros.append(f'STAGE_1=../{_STAGE_1.run}')
    training += '\n# STAGE_1 is what the commands of stage 1 left there.'
  lines += [
      f'# Beforehand and without a TPU: does the step fit {_TOPOLOGY}?',
      _wrapped([
          '.venv/bin/codet5p', 'precompile', *_gin_files(here),
          f'TOPOLOGY={_TOPOLOGY}', *sizes,
      ]),
      '# The data, to a TPU VM named NAME that is running in ZONE.',
      *(
          _wrapped([
              'gcloud', 'compute', 'tpus', 'tpu-vm', 'scp', '--recurse',
              source, f'NAME:{target}', '--zone=ZONE',
          ])
          for target, source in copied.items()
      ),
      training,
      _wrapped([
          'tpu_scripts/train_on_tpu_vm.sh', 'NAME', 'ZONE', *_gin_files(there),
          *macros, *sizes,
      ]),
  ]  # fmt: skip
  return '\n'.join(lines)


def _vocabulary_bindings(model: Any, vocab_size: int) -> list[str]:
  """Tells the model of stage 2 what differs from the released vocabulary."""
  shipped = {name: getattr(BimodalConfig, name) for name in _TASK_TOKENS}
  shipped['vocab_size'] = _vocab_size_of(_STAGE_2)
  found = {name: getattr(model, name) for name in _TASK_TOKENS}
  found['vocab_size'] = vocab_size
  return [
      f'--gin.bimodal.BimodalConfig.{name}={value}'
      for name, value in found.items()
      if value != shipped[name]
  ]


def _vocab_size_of(stage: _Stage) -> int:
  text = (gin_paths.gin_folder() / stage.model).read_text(encoding='utf-8')
  return int(re.search(r'^  vocab_size = (\d+)', text, re.M)[1])


def _gin_files(names: Sequence[str]) -> list[str]:
  return [f'--gin_file={name}' for name in names]


def _flags(settings: Mapping[str, Any]) -> list[str]:
  """The settings as flags; those that are None or False are defaults."""
  return [
      f'--{name}={",".join(map(str, v)) if isinstance(v, list) else v}'
      for name, v in settings.items()
      if v is not None and v is not False
  ]


def _wrapped(words: Sequence[str]) -> str:
  """A command of these words, on lines that the shell joins."""
  lines = ['']
  for word in map(shlex.quote, words):
    if len(lines[-1]) + len(word) + 3 > _WIDTH:
      lines.append(f'  {word}')
    else:
      lines[-1] = f'{lines[-1]} {word}' if lines[-1] else word
  return ' \\\n'.join(lines)
