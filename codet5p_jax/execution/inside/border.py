"""The border between the process of a solution and that of its tests.

Over one socket either side asks the other for an operation and waits for the
answer, which may be preceded by questions back. What cannot be copied
(`values.py`) is referred to: as `['s', number]` if it lives with the solution,
as `['t', number]` with the tests.
"""

import builtins
import json
import operator
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from . import values

SOLUTION = 's'
TESTS = 't'

_MAX_MESSAGE = 1 << 27
# Of an exception.
_MAX_TEXT = 200
_LENGTH = struct.Struct('!I')


class Closed(BaseException):
  """The other process has ended; nothing that a program catches."""


class Broken(BaseException):
  """The other process wrote what it never writes by itself."""


class RemoteError(Exception):
  """An exception of the other side of a type that is not built in."""


class Border:
  """One side's end of the socket.

  Attributes:
    answer: what answers a question: its operation, arguments and keyword
      arguments.
    failure: what ended the exchange, a `Closed` or `Broken`, even if whoever
      asked has caught it.
  """

  def __init__(
      self,
      connection: socket.socket,
      here: str,
      refers: Callable[[Any], bool],
      make_remote: Callable[['Border', int], Any],
      answer: Callable[[str, list[Any], dict[str, Any]], Any],
  ) -> None:
    """Takes one end of a socket.

    Args:
      connection: the socket, blocking.
      here: SOLUTION or TESTS.
      refers: whether a value may be referred to by the other side.
      make_remote: makes what stands here for a value there; it has an attribute
        `_number`.
      answer: see the class.
    """
    self._connection = connection
    self._here = here
    self._refers = refers
    self._make_remote = make_remote
    self.answer = answer
    self.failure: Closed | Broken | None = None
    self._own: list[Any] = []
    self._numbers: dict[int, int] = {}
    self._remotes: dict[int, Any] = {}
    self._remote_numbers: dict[int, int] = {}

  def ask(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
    """Has the other side do something.

    Args:
      operation: its name.
      *arguments: plain values, remotes, and values that `refers` allows. Those
        that the other side changes in place are changed here too.
      **keywords: the same.

    Returns:
      The result.

    Raises:
      Closed: the other process ended.
      Broken: its answer is malformed.
      Exception: what the operation raised, as the built-in exception of that
        name or of its nearest base that is built in.
    """
    sent = [self._encode(a) for a in arguments]
    named = {name: self._encode(a) for name, a in keywords.items()}
    try:
      self._send(['ask', operation, sent, named])
      return self._await_answer(arguments, keywords)
    except (Closed, Broken) as failure:
      self.failure = failure
      raise

  def _await_answer(
      self, arguments: Iterable[Any], keywords: dict[str, Any]
  ) -> Any:
    """Answers questions until the answer to one's own comes; see `ask`."""
    while True:
      kind, *parts = self._receive()
      if kind == 'ask':
        self._answer(parts)
      elif kind == 'done':
        return self._take(parts, arguments, keywords)
      elif kind == 'raised':
        raise _exception(*parts)
      else:
        raise Broken(f'no message is {kind!r:.20}')

  def serve(self) -> None:
    """Answers questions until the other process has ended."""
    while True:
      kind, *parts = self._receive()
      if kind != 'ask':
        raise Broken(f'expected a question, found {kind!r:.20}')
      self._answer(parts)

  def _take(
      self, parts: list[Any], arguments: Iterable[Any], keywords: dict[str, Any]
  ) -> Any:
    """The result of an answer, after what it says of changed arguments."""
    try:
      result, changed = parts
      held = {**dict(enumerate(arguments)), **keywords}
      for key, node in changed:
        values.replace(held[key], self._decode(node))
    except (TypeError, ValueError, KeyError) as error:
      raise Broken('an answer of another form') from error
    return self._decode(result)

  def _answer(self, parts: list[Any]) -> None:
    """Answers one question."""
    if [type(part) for part in parts] != [str, list, dict]:
      raise Broken('a question of another form')
    operation, sent, named = parts
    arguments = [self._decode(node) for node in sent]
    keywords = {name: self._decode(node) for name, node in named.items()}
    try:
      result = self.answer(operation, arguments, keywords)
      changed = []
      if operation == 'call':
        held = [*enumerate(arguments), *keywords.items()]
        for (key, value), node in zip(held, [*sent, *named.values()]):
          if type(node) is list and len(node[0]) > 1:
            after = self._encode(value)
            if after != node:
              changed.append([key, after])
      message = ['done', self._encode(result), changed]
    except (Closed, Broken):
      raise
    except BaseException as error:
      message = ['raised', *_described(error)]
    self._send(message)

  def _encode(self, value: Any) -> Any:
    return values.encode(value, self._refer)

  def _refer(self, value: Any) -> list[Any]:
    if id(value) in self._remote_numbers:
      there = TESTS if self._here == SOLUTION else SOLUTION
      return [there, self._remote_numbers[id(value)]]
    if not self._refers(value):
      raise TypeError(f'a {type(value).__name__} cannot cross the border')
    # Kept, so that no other value gets its address.
    if id(value) not in self._numbers:
      self._numbers[id(value)] = len(self._own)
      self._own.append(value)
    return [self._here, self._numbers[id(value)]]

  def _decode(self, node: Any) -> Any:
    try:
      return values.decode(node, self._resolve)
    except values.Malformed as error:
      raise Broken(str(error)) from error

  def _resolve(self, side: str, number: int) -> Any:
    if side == self._here:
      if not 0 <= number < len(self._own):
        raise values.Malformed('a reference to nothing')
      return self._own[number]
    if side not in (SOLUTION, TESTS):
      raise values.Malformed('no such side')
    if number not in self._remotes:
      remote = self._make_remote(self, number)
      self._remotes[number] = remote
      self._remote_numbers[id(remote)] = number
    return self._remotes[number]

  def _send(self, message: list[Any]) -> None:
    # As they are: escaped, two surrogates in a row would become a character.
    data = json.dumps(message, ensure_ascii=False)
    encoded = data.encode('utf-8', 'surrogatepass')
    if len(encoded) > _MAX_MESSAGE:
      raise Broken('a message is too long')
    try:
      self._connection.sendall(_LENGTH.pack(len(encoded)) + encoded)
    except OSError as error:
      raise Closed from error

  def _receive(self) -> list[Any]:
    (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
    if length > _MAX_MESSAGE:
      raise Broken('a message is too long')
    data = self._read(length)
    try:
      message = json.loads(data.decode('utf-8', 'surrogatepass'))
    except (ValueError, RecursionError) as error:
      raise Broken('a message is not JSON') from error
    if type(message) is not list or not message:
      raise Broken('a message is no list')
    return message

  def _read(self, size: int) -> bytes:
    """Reads exactly so many bytes."""
    parts = []
    while size:
      try:
        part = self._connection.recv(min(size, 1 << 20))
      except OSError:
        part = b''
      if not part:
        raise Closed
      parts.append(part)
      size -= len(part)
    return b''.join(parts)


def _described(error: BaseException) -> list[Any]:
  """An exception as a message.

  Returns:
    The name of its nearest built-in base, its own, its text, and as `encode`
    makes it what that base is made with; None if that is no plain value.
  """
  kind = type(error)
  base = _built_in_base(kind)
  try:
    text = str(error)[:_MAX_TEXT]
  except Exception:
    text = ''
  try:
    # Unlike `args` this has the name of a file, and no class redefines it.
    arguments = values.encode(base.__reduce__(error)[1], _refuse)
  except Exception:
    arguments = None
  return [base.__name__, kind.__name__[:100], text, arguments]


def _refuse(*reference: Any) -> NoReturn:
  raise values.Malformed('an exception refers to no value')


def _built_in_base(kind: type) -> type:
  """The nearest class above that is built in."""
  return next(base for base in kind.__mro__
              if getattr(builtins, base.__name__, None) is base)  # fmt: skip


def _class_of(value: Any) -> type:
  """The class of a value, or what of it the other side knows too."""
  base = _built_in_base(type(value))
  return type(value) if base is object else base


def _exception(*parts: Any) -> Exception:
  """The exception that another side raised.

  Those that are no errors, such as SystemExit, are given as `RemoteError`: the
  tests must not end as if they wanted to.
  """
  if [type(part) for part in parts[:-1]] != [str, str, str]:
    raise Broken('an exception of another form')
  base, name, text, node = parts
  try:
    arguments = values.decode(node, _refuse)
  except values.Malformed as error:
    raise Broken(str(error)) from error
  kind = getattr(builtins, base, None)
  is_known = isinstance(kind, type) and issubclass(kind, Exception)
  if is_known and (kind is not Exception or name == base):
    if type(arguments) is tuple:
      try:
        made = kind(*arguments)
        # Else a class of the program has a text of its own.
        if str(made)[:_MAX_TEXT] == text:
          return made
      except Exception:  # Those that were made up fit no kind.
        pass
    try:
      return kind(text)
    except TypeError:  # UnicodeDecodeError and its like take more.
      pass
  return RemoteError(f'{name}: {text}')


# Operations that a remote value asks for by name, as functions.
OPERATIONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in (
        'add', 'and_', 'concat', 'contains', 'delitem', 'eq', 'floordiv', 'ge',
        'getitem', 'gt', 'iadd', 'iand', 'ifloordiv', 'imatmul', 'imod', 'imul',
        'index', 'invert', 'ior', 'ipow', 'isub', 'itruediv', 'ixor', 'le',
        'lshift', 'lt', 'matmul', 'mod', 'mul', 'ne', 'neg', 'or_', 'pos',
        'pow', 'rshift', 'setitem', 'sub', 'truediv', 'xor')
} | {
    name: getattr(builtins, name)
    for name in (
        'abs', 'bool', 'bytes', 'complex', 'delattr', 'dir', 'divmod', 'float',
        'format', 'getattr', 'hash', 'int', 'isinstance', 'iter', 'len', 'next',
        'repr', 'reversed', 'round', 'setattr', 'str')
} | {
    'call': lambda function, *a, **k: function(*a, **k),
    'class': _class_of,
}  # fmt: skip
