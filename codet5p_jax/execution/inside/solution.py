"""The process of a solution: runs it, then answers the tests."""

import socket
import sys
import types
from typing import Any

from . import border


class Callback:
  """A function of the tests, which the solution may call and nothing else."""

  def __init__(self, to_tests: border.Border, number: int) -> None:
    self._to_tests = to_tests
    self._number = number

  def __call__(self, *arguments: Any, **keywords: Any) -> Any:
    return self._to_tests.ask('call', self, *arguments, **keywords)


def run(connection: socket.socket, sources: list[str]) -> None:
  """Runs sources one after the other in one module, then serves.

  All of this may be under the control of the program from its first line on.

  Args:
    connection: to the tests.
    sources: the program, and what else is to know its classes.
  """
  # Where modules are looked up by name, as dataclasses do.
  module = types.ModuleType('solution')
  sys.modules['solution'] = module
  names = vars(module)
  failure: list[BaseException] = []

  def answer(
      operation: str, arguments: list[Any], keywords: dict[str, Any]
  ) -> Any:
    if operation == 'load':
      if failure:
        raise failure[0]
      return None
    if operation == 'global':
      return _global(names, *arguments)
    return border.OPERATIONS[operation](*arguments, **keywords)

  to_tests = border.Border(
      connection, border.SOLUTION, refers=lambda value: True,
      make_remote=Callback, answer=answer)  # fmt: skip
  try:
    for source in sources:
      exec(compile(source, '<solution>', 'exec'), names)
  except BaseException as error:
    failure.append(error)
  to_tests.serve()


def _global(names: dict[str, Any], name: str) -> list[Any]:
  """How a name of the program is given to the tests."""
  if name not in names:
    return ['missing', None]
  value = names[name]
  if type(value) is types.ModuleType:
    return ['module', value.__name__]
  return ['value', value]
