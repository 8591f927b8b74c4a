"""From a benchmark's own file to pairs for fine-tuning, and problems."""

import collections
import hashlib
import json

from codet5p_jax.errors import UserError
from codet5p_jax.storage import local_path
from codet5p_jax.tasks.by_name import make_task
from codet5p_jax.tasks.problem_files import Row, read_rows
from codet5p_jax.tasks.prompts import PreparableTask
from codet5p_jax.training.run_folder import write_result

SPLITS = ('train', 'validation', 'test')


def prepare_task(
    task: str,
    source: str,
    output: str,
    split: str = 'train',
    validation_share: float = 0.0,
    task_fields: dict | None = None,
) -> None:
  """Makes a folder of pairs, as fine-tuning reads it, and problems for scoring.

  SPLIT.jsonl holds the pairs, {"source": ..., "target": ...} a line, and
  SPLIT_problems.jsonl the problems that `generate`, `postprocess` and `score`
  read. What cannot be had of a benchmark is not written. Prints how many rows
  gave no pair, by reason.

  Args:
    task: the name of a module in codet5p_jax/tasks, such as math_programming.
    source: the benchmark's own file, .jsonl, .jsonl.gz or a JSON array.
    output: the folder, which may hold other splits already.
    split: train, validation or test: what the source is, or, where one file
      holds all (MBPP), what to take.
    validation_share: of the rows of train, so many go to validation instead;
      which, depends on nothing but the row.
    task_fields: fields of the task that are to be otherwise than they are, as
      in --task_fields="{'indent_with_tabs': False}".

  Raises:
    UserError: the source is not what it should be; nothing is written then.
  """
  made = make_task(task, task_fields)
  if not isinstance(made, PreparableTask):
    raise UserError(
        f'expected a task with something to prepare, found {task}; give its '
        f'file to generate and score as it is'
    )
  if split not in SPLITS:
    raise UserError(
        f'expected a split among {", ".join(SPLITS)}, found {split}; set '
        f'--split'
    )
  if not 0 <= validation_share < 1 or (validation_share and split != 'train'):
    raise UserError(
        f'expected validation_share of 0 or more and below 1, with '
        f'--split=train if any, found {validation_share} of {split}; set it '
        f'anew'
    )
  rows = collections.defaultdict(list)
  for row in read_rows(source):
    is_kept_back = _place_of(row) < validation_share
    rows['validation' if is_kept_back else split].append(row)
  files, report = {}, []
  for name, rows_of_split in rows.items():
    made_files, counted = _prepare(made, rows_of_split, name)
    files |= made_files
    report += counted
  if not files:
    raise UserError(
        f'expected rows of {split} that give a pair or a problem in {source}, '
        f'found none; check --task and --split'
    )
  for name, lines in files.items():
    write_result(local_path(output) / name, ''.join(lines))
  print('\n'.join(report))


def _prepare(
    task: PreparableTask, rows: list[Row], split: str
) -> tuple[dict[str, list[str]], list[str]]:
  """The lines of each file that rows give, and what to say of them."""
  files = collections.defaultdict(list)
  reasons = collections.Counter()
  for row in rows:
    prepared = task.prepare(row, split)
    if prepared is None:
      continue
    if prepared.problem is not None:
      line = json.dumps(prepared.problem) + '\n'
      files[f'{split}_problems.jsonl'].append(line)
    if prepared.pair is not None:
      files[f'{split}.jsonl'].append(json.dumps(prepared.pair) + '\n')
    else:
      reasons[prepared.reason] += 1
  report = [f'{name}: {len(lines):,} rows' for name, lines in files.items()]
  report += [
      f'  no pair, {reason}: {count:,}'
      for reason, count in reasons.most_common()
  ]
  return files, report


def _place_of(row: Row) -> float:
  """A number in [0, 1) that follows from what a row holds."""
  text = json.dumps(row.fields, sort_keys=True)
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest[:4], 'big') / 2**32
