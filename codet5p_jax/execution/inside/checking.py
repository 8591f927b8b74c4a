"""The process of the tests: runs them, and says which passed.

Of the program it has nothing but what crosses the border, and of the channel
that it writes its verdicts to the program has nothing at all.
"""

import builtins
import functools
import json
import resource
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from . import border
from .remote import Remote

PASSED = 'passed'
FAILED = 'failed'
CRASHED = 'crashed'
STATUSES = (PASSED, FAILED, CRASHED)

TRUSTED = b't'
UNTRUSTED = b'u'

# As much as this more than at first is much, in bytes.
_MUCH_MEMORY = 1 << 25

_FUNCTIONS = (
    types.FunctionType, types.BuiltinFunctionType, types.MethodType,
    functools.partial)  # fmt: skip


class Names(dict):
  """The names that tests see.

  Their own come first, then Python's, which a program cannot replace, then
  those of the trusted prompt, and then the program's. Only the names under test
  are always the program's.
  """

  def __init__(
      self,
      to_solution: border.Border,
      tested: tuple[str, ...],
      prompt: str,
  ) -> None:
    super().__init__(__name__='tests')
    self._to_solution = to_solution
    self._tested = tested
    self._prompt = prompt
    self._of_prompt: Names | None = None

  def __missing__(self, name: str) -> Any:
    if name == 'candidate' and self._tested:
      name = self._tested[0]
    if name not in self._tested:
      if hasattr(builtins, name):
        raise KeyError(name)
      if self._prompt and name in self._names_of_prompt():
        return self._of_prompt[name]
    match self._to_solution.ask('global', name):
      case ['value', value]:
        return value
      case ['module', str(module)] if module in sys.modules:
        return sys.modules[module]
    raise KeyError(name)

  def _names_of_prompt(self) -> dict[str, Any]:
    """What the prompt defines beside what is under test, such as imports."""
    if self._of_prompt is None:
      self._of_prompt = Names(self._to_solution, self._tested, '')
      try:
        exec(_compiled(self._prompt, '<prompt>'), self._of_prompt)
      except Exception:  # Cut off in the middle of a function, say.
        self._of_prompt.clear()
      for name in self._tested:
        self._of_prompt.pop(name, None)
    return self._of_prompt


def serve(
    control: socket.socket,
    read_tests: Callable[[], bytes],
    report: Callable[[Any], Any],
    give_up: Callable[[], Any],
) -> None:
  """Checks programs, each on a socket that comes over another one.

  After the verdicts on a program it reports whether it is as before.

  Args:
    control: whence sockets come, with TRUSTED or UNTRUSTED; these tests are the
      last ones.
    read_tests: see `run`.
    report: see `run`.
    give_up: closes what tests are read from.
  """
  at_first = _most_memory()
  while True:
    kind, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    if not kind:
      return
    if kind == UNTRUSTED:
      control.close()

    def read() -> bytes:
      tests = read_tests()
      if kind == UNTRUSTED:
        give_up()
      return tests

    with socket.socket(fileno=descriptors[0]) as connection:
      run(connection, read, report)
    # A program may have had this process take much memory, and the next one
    # must not find less of it.
    is_as_before = _most_memory() < at_first + _MUCH_MEMORY
    report(is_as_before)
    if kind == UNTRUSTED or not is_as_before:
      return


def _most_memory() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(
    connection: socket.socket,
    read_tests: Callable[[], bytes],
    report: Callable[[Any], Any],
) -> None:
  """Runs tests, each in names of its own, and reports on each.

  Args:
    connection: to the solution.
    read_tests: reads JSON of `tests`, a list of sources; `tested`, the names
      that are under test; and `prompt`, the source of what they may rely on.
    report: takes None once the tests are read, and then `[status, error]` for
      each test.
  """
  given = json.loads(read_tests())
  report(None)
  to_solution = border.Border(
      connection, border.TESTS, refers=_may_be_called, make_remote=Remote,
      answer=_call)  # fmt: skip
  for source in given['tests']:
    try:
      to_solution.ask('load')
      names = Names(to_solution, tuple(given['tested']), given['prompt'])
      exec(_compiled(source, '<tests>'), names)
      verdict = [PASSED, '']
    except BaseException as error:
      verdict = [FAILED, _described(error)]
    failure = to_solution.failure  # Even if the tests catch everything.
    if isinstance(failure, border.Closed):
      verdict = [CRASHED, 'the process ended']
    elif failure:
      verdict = [CRASHED, f'the process talks nonsense: {failure}']
    report(verdict)
    if failure:
      return


@functools.lru_cache(maxsize=16)
def _compiled(source: str, name: str) -> types.CodeType:
  # The samples of a problem come one after the other.
  return compile(source, name, 'exec')


def _may_be_called(value: Any) -> bool:
  # eval() and its like would do what the program wants.
  return type(value) in _FUNCTIONS and (
      getattr(value, '__module__', None) != 'builtins')


def _call(
    operation: str, arguments: list[Any], keywords: dict[str, Any]
) -> Any:
  """Calls a function of the tests that the solution was given."""
  function, *rest = arguments
  if operation != 'call' or not _may_be_called(function):
    raise TypeError('a function of the tests can be called and nothing else')
  return function(*rest, **keywords)


def _described(error: BaseException) -> str:
  """The type of an exception and the first line of its text."""
  try:
    text = str(error).strip().split('\n')[0][:200]
  except Exception:
    text = ''
  name = type(error).__name__[:100]
  return f'{name}: {text}' if text else name
