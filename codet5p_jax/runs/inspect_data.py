"""What a task's examples look like, how full they are, how fast they come."""

import dataclasses
import importlib
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tqdm

from codet5p_jax import stage_1
from codet5p_jax.corpus.folder import PAIRS
from codet5p_jax.corpus.provision import corpus_of
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.storage import local_path
from codet5p_jax.training.batches import (
    example_generator,
    training_rows,
    unpadded_example,
)
from codet5p_jax.training.run_folder import RunFolder, read_config, rebuild

_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class _Sequence:
  """What an example has of one feature.

  Attributes:
    ids: token ids, without padding.
    is_cut: whether the row had more; None where it cannot be told.
  """

  ids: np.ndarray
  is_cut: bool | None = None


@dataclasses.dataclass(frozen=True)
class _Task:
  """Something to look at.

  Attributes:
    name: for the heading.
    examples: yields {feature: what the example has of it}.
    lengths: {feature: tokens of a padded row}; empty where nothing is padded.
    decode: (feature, token ids) to text, special tokens by name.
  """

  name: str
  examples: Iterator[dict[str, _Sequence]]
  lengths: dict[str, int]
  decode: Callable[[str, np.ndarray], str]


def inspect_data(
    data_dir: str | None = None,
    corpus_dir: str | None = None,
    run_dir: str | None = None,
    task: str | None = None,
    module: str | None = None,
    split: str = 'train',
    vocabulary_dir: str | None = None,
    num_examples: int = 2,
    num_rows: int = 2000,
) -> None:
  """Prints decoded examples, how full the rows are, and rows per second.

  Args:
    data_dir: a corpus folder, looked at as stage 1 with the paper's lengths
      does, and as stage 2 if it has pairs; or source files, such as a folder
      of them or jsonl://rows.jsonl?field=code, with corpus_dir. Or give run_dir
      or module.
    corpus_dir: where a corpus is made of source files.
    run_dir: the folder of a run, for its own data, objectives and lengths.
    task: one objective, by default all; with module, the name of any seqio
      task or mixture that it registers.
    module: a Python module that registers seqio tasks, such as `my_tasks`.
    split: of the data.
    vocabulary_dir: the vocabulary; by default that of the run or the corpus.
    num_examples: to print of each task.
    num_rows: rows to measure each task with.

  Raises:
    UserError: there is no such data or task.
  """
  require_positive(num_examples=num_examples, num_rows=num_rows)
  given = {'data_dir': data_dir, 'run_dir': run_dir, 'module': module}
  if sum(value is not None for value in given.values()) != 1:
    found = [f'--{name}' for name, value in given.items() if value is not None]
    raise UserError(
        f'expected one of --data_dir, --run_dir and --module, found '
        f'{" and ".join(found) or "none"}; give one'
    )
  if module is not None:
    tasks = [_seqio_task(module, task, split)]
  else:
    if data_dir is not None:
      data_dir = corpus_of(data_dir, corpus_dir, vocabulary_dir)
    tasks = _objectives(data_dir, run_dir, task, split, vocabulary_dir)
  for each in tasks:
    _show(each, num_examples, num_rows)


def _objectives(
    data_dir: str | None,
    run_dir: str | None,
    task: str | None,
    split: str,
    vocabulary_dir: str | None,
) -> list[_Task]:
  if run_dir is None:
    objectives = stage_1.OBJECTIVES
    if (pathlib.Path(data_dir) / PAIRS).is_dir():
      objectives += (Bimodal(),)
    vocabulary_dir = vocabulary_dir or f'{data_dir}/vocabulary'
    seed = 0
  else:
    config = rebuild(read_config(run_dir))
    objectives, seed = config['objectives'], config['seed']
    data_dir = config['data_dir']
    vocabulary_dir = (
        vocabulary_dir or RunFolder(local_path(run_dir)).vocabulary
    )
  vocabulary = load_vocabulary(vocabulary_dir)
  names = [objective.name for objective in objectives]
  if task is not None and task not in names:
    raise UserError(
        f'expected a task among {", ".join(names)}, found {task}; set --task'
    )
  return [
      _objective(objective, data_dir, split, vocabulary, seed)
      for objective in objectives
      if task in (None, objective.name)
  ]


def _objective(
    objective: Any, data_dir: str, split: str, vocabulary: Any, seed: int
) -> _Task:
  rows = training_rows(objective, data_dir, split, vocabulary, seed)

  def examples():
    for index in itertools.count():
      row = rows[index]
      example = unpadded_example(
          objective, row, example_generator(seed, index), vocabulary
      )
      yield {
          name: _Sequence(ids, _is_cut(ids, row.get(name), vocabulary))
          for name, ids in example.items()
      }

  return _Task(
      objective.name,
      examples(),
      {
          name.removesuffix('_tokens'): spec.shape[1]
          for name, spec in objective.batch_spec(1).items()
          if name.endswith('_tokens')
      },
      lambda _, ids: vocabulary.decode(ids, skip_special_ids=False),
  )


def _is_cut(
    ids: np.ndarray, whole: np.ndarray | None, vocabulary: Any
) -> bool | None:
  """Whether a sequence lacks tokens; None where the row says nothing of it."""
  if whole is None:
    return None
  ends = vocabulary.task_tokens.bos, vocabulary.task_tokens.eos
  return bool(len(whole) > np.isin(ids, ends, invert=True).sum())


def _seqio_task(module: str, task: str | None, split: str) -> _Task:
  import seqio

  sys.path.insert(0, os.getcwd())
  try:
    importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name and not f'{module}.'.startswith(f'{error.name}.'):
      raise
    raise UserError(
        f'expected a Python module {module} that registers tasks, found none; '
        f'give --module as it is imported from here'
    ) from error
  names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if task not in names:
    raise UserError(
        f'expected a task that {module} registers, among '
        f'{", ".join(sorted(names))}, found {task}; set --task'
    )
  found = seqio.get_mixture_or_task(task)
  if split not in found.splits:
    raise UserError(
        f'expected a split of {task} among {", ".join(found.splits)}, found '
        f'{split}; set --split'
    )
  dataset = found.get_dataset(
      None, split=split, shuffle=True, seed=0, num_epochs=None
  )
  features = found.output_features

  def decode(name, ids):
    vocabulary = features[name].vocabulary
    inner = getattr(vocabulary, 'vocabulary', None)
    if inner is not None:
      return inner.decode(ids, skip_special_ids=False)
    return vocabulary.decode(ids.tolist())

  examples = (
      {name: _Sequence(example[name]) for name in features}
      for example in dataset.as_numpy_iterator()
  )
  return _Task(task, examples, {}, decode)


def _show(task: _Task, num_examples: int, num_rows: int) -> None:
  """Prints some examples, then measures more."""
  print(f'{f" {task.name} ":=^{_WIDTH}}')
  examples = iter(task.examples)
  for number, example in enumerate(itertools.islice(examples, num_examples)):
    for name, sequence in example.items():
      title = f' example {number + 1}: {name}, {len(sequence.ids)} tokens '
      print(f'{title:-^{_WIDTH}}')
      print(task.decode(name, sequence.ids))
  totals: dict[str, int] = {}
  cut: dict[str, int] = {}
  begin, rows = time.monotonic(), 0
  for example in tqdm.tqdm(
      itertools.islice(examples, num_rows), 'measuring', num_rows, unit=' rows'
  ):
    rows += 1
    for name, sequence in example.items():
      totals[name] = totals.get(name, 0) + len(sequence.ids)
      if sequence.is_cut is not None:
        cut[name] = cut.get(name, 0) + sequence.is_cut
  seconds = time.monotonic() - begin
  print('-' * _WIDTH)
  for name, total in totals.items():
    line = f'{name}: {total / rows:.1f} tokens a row on average'
    if name in task.lengths:
      length = task.lengths[name]
      line += f', {total / rows / length:.1%} of the {length} of a padded row'
    if name in cut:
      line += f'; {cut[name] / rows:.1%} of the rows are cut'
    print(line)
  print(
      f'{rows / seconds:,.0f} rows/s, {sum(totals.values()) / seconds:,.0f} '
      f'tokens/s\n'
  )
