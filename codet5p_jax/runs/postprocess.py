"""From what a model wrote to what is executed."""

import json
from typing import Any

from codet5p_jax.errors import UserError
from codet5p_jax.storage import check_output, local_path
from codet5p_jax.tasks.by_name import make_task
from codet5p_jax.tasks.problem_files import Row, read_rows
from codet5p_jax.training.run_folder import write_result


def postprocess(
    task: str,
    problems: str,
    samples: str,
    output: str,
    task_fields: dict | None = None,
) -> None:
  """Makes the completions that `score` runs of raw samples.

  Args:
    task: the name of a module in codet5p_jax/tasks, such as humaneval.
    problems: the file that the prompts were made from.
    samples: what `codet5p generate` wrote, one row for each sample, with
      prompt_id, sample and completion, the text that the model wrote.
    output: the file to write, one row for each sample in the same order, with
      task_id and completion instead, and all other fields as they are.
    task_fields: fields of the task that are to be otherwise than in generation
      (whose samples tell them), as in --task_fields="{'stop_strings': ()}".

  Raises:
    UserError: a file is not what it should be; nothing is written then.
  """
  path = local_path(output)
  check_output(path, problems, samples)
  rows = read_rows(samples)
  made = make_task(task, _generated_with(rows[0], task) | (task_fields or {}))
  problem_of = {str(p['task_id']): p for p in made.read_problems(problems)}
  first: dict[tuple[str, int], Row] = {}
  lines = []
  for row in rows:
    prompt_id = str(row.field('prompt_id', str, int))
    key = prompt_id, row.field('sample', int)
    if key in first:
      raise UserError(
          f'expected every sample once in {samples}, found sample {key[1]} of '
          f'{prompt_id} in rows {first[key].number} and {row.number}; remove '
          f'one'
      )
    first[key] = row
    if prompt_id not in problem_of:
      raise UserError(
          f'expected samples of the problems in {problems}, found {prompt_id} '
          f'in {row.place}; give the problems that generation was given'
      )
    problem = problem_of[prompt_id]
    fields = {k: v for k, v in row.fields.items() if k != 'prompt_id'}
    fields['completion'] = made.completion(problem, row.text('completion'))
    lines.append(json.dumps({'task_id': problem['task_id'], **fields}) + '\n')
  write_result(path, ''.join(lines))
  answered = len({prompt_id for prompt_id, _ in first})
  print(
      f'{output}: {len(lines):,} samples of {answered:,} of '
      f'{len(problem_of):,} problems'
  )


def _generated_with(row: Row, task: str) -> dict[str, Any]:
  """The fields of the task that made a sample's prompt, if it tells them.

  Raises:
    UserError: it was another task.
  """
  settings = row.fields.get('settings')
  fields = settings.get('task') if isinstance(settings, dict) else None
  if not isinstance(fields, dict):
    return {}
  if fields.get('name') != task:
    raise UserError(
        f'expected samples of the task {task}, found {fields.get("name")} in '
        f'{row.place}; set --task or --samples'
    )
  return {name: fields[name] for name in fields.keys() - {'name'}}
