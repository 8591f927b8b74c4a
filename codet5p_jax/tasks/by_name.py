"""Tasks by the names of their modules, as a command line gives them."""

import dataclasses
import importlib
import pkgutil

from codet5p_jax import arguments, tasks
from codet5p_jax.errors import UserError
from codet5p_jax.tasks.prompts import Task


def make_task(name: str, fields: dict | None = None) -> Task:
  """Makes a task.

  Args:
    name: of its module in `codet5p_jax.tasks`.
    fields: what is not to be as the task has it.

  Raises:
    UserError: there is no such task, or it has no such field or value.
  """
  # Each module that names a task is one; the others are what tasks share.
  classes = {}
  for module in pkgutil.iter_modules(tasks.__path__):
    imported = importlib.import_module(f'{tasks.__name__}.{module.name}')
    if hasattr(imported, 'TASK'):
      classes[module.name] = imported.TASK
  if name not in classes:
    raise UserError(
        f'expected a task among {arguments.listed(classes)}, found {name}; '
        f'set --task'
    )
  fields = dict(fields or {})
  hints = arguments.type_hints(classes[name])
  known = [field.name for field in dataclasses.fields(classes[name])]
  for field, value in fields.items():
    if field not in known:
      raise UserError(
          f'the task {name} has no field {field}'
          f'{arguments.nearest(str(field), known)}'
      )
    if not arguments.accepts(hints[field], value):
      raise UserError(
          f'expected {arguments.describe(hints[field])} as {field} of the task '
          f'{name}, found {value!r}; set it in --task_fields'
      )
  return classes[name](**fields)


def task_name(task: object) -> str:
  """The name that `make_task` knows a task by."""
  return type(task).__module__.rpartition('.')[2]
