"""Tests of both sides of the border, in one process."""

import json
import socket
import struct
import sys
import threading

import pytest
from codet5p_jax.execution.inside import border, checking, solution

_SOLUTION = '''
import collections
import math

class Node:
  """A node."""
  def __init__(self, value, *rest):
    self.value, self.rest = value, list(rest)
  def __eq__(self, other):
    return isinstance(other, Node) and self.value == other.value
  def __lt__(self, other):
    return self.value < other.value
  def __hash__(self):
    return hash(self.value)
  def __add__(self, other):
    return Node(self.value + getattr(other, 'value', other))
  def __radd__(self, other):
    return Node(other - self.value)
  def __rpow__(self, other):
    return other ** self.value
  def __iadd__(self, other):
    self.value += other
    return self
  def __iter__(self):
    return iter(self.rest)
  def __len__(self):
    return len(self.rest)
  def __getitem__(self, place):
    return self.rest[place]
  def __setitem__(self, place, value):
    self.rest[place] = value
  def __delitem__(self, place):
    del self.rest[place]
  def __contains__(self, value):
    return value in self.rest
  def __call__(self, x, scale=1):
    return self.value * x * scale
  def __repr__(self):
    return f'<{self.value}>'
  def __float__(self):
    return self.value / 2
  def __index__(self):
    return self.value
  def __neg__(self):
    return -self.value
  def __divmod__(self, other):
    return divmod(self.value, other)
  def __enter__(self):
    return self.value
  def __exit__(self, *error):
    self.value = 'left'
  def __bytes__(self):
    return b'node'

class OwnError(KeyError):
  pass

class Strange(Exception):
  pass

Pair = collections.namedtuple('Pair', 'left right')
counted = 0
nodes = [Node(1), Node(2)]

def f(x):
  return x

class Told(ValueError):
  def __str__(self):
    return 'told by itself'

def fail(name):
  raise {'own': OwnError('o'), 'strange': Strange('s'), 'exit': SystemExit(3),
         'plain': Exception('p', [3]), 'long': ValueError('long' * 99),
         'file': FileNotFoundError(2, 'No such file', 'missing'),
         'told': Told('t'), 'node': ValueError(Node(5)),
         'unicode': UnicodeDecodeError('a', b'b', 0, 1, 'c')}[name]

def sort(things, also=None):
  things.sort()
  if also is not None:
    also[0]['new'] = 1

def count():
  global counted
  counted += 1

def numbers():
  yield 1
  yield 2

def apply(function, *arguments):
  return function(*arguments)

def pry(function):
  return function.__globals__

def any(things):
  raise Exception('not for the tests')

def sum(a, b):
  return a - b
'''


def check(*tests, source=_SOLUTION, tested=('f',), prompt=''):
  """Runs both sides, the solution in a thread; returns [status, error]s."""
  ours, theirs = socket.socketpair()
  thread = threading.Thread(
      target=_swallow, args=(solution.run, ours, [source]), daemon=True)
  thread.start()
  lines = []
  given = json.dumps({'tests': tests, 'tested': tested, 'prompt': prompt})
  try:
    checking.run(theirs, given.encode, lines.append)
  finally:
    theirs.close()
    thread.join()
    ours.close()
    sys.modules.pop('solution')
  first, *verdicts = lines
  assert first is None
  return verdicts


def _swallow(function, *arguments):
  try:
    function(*arguments)
  except border.Closed:
    pass


@pytest.mark.parametrize('test', [
    'assert f(3) == 3 and candidate([1, (2,)]) == [1, (2,)]',
    'assert f(x=5) == 5',
    'assert Node(3) == Node(3) and Node(3) != Node(4)',
    'assert Node(3) < Node(4) and not Node(3) > Node(4)',
    'assert (Node(3) + 4).value == 7 and (Node(3) + Node(4)).value == 7',
    'assert (10 + Node(3)).value == 7',
    'assert 2 ** Node(3) == 8',
    'node = Node(1); node += 4; assert node.value == 5',
    'assert list(Node(1, 5, 6)) == [5, 6] and len(Node(1, 5)) == 1',
    'node = Node(1, 5, 6); node[0] = 7; del node[1]; assert node.rest == [7]',
    'assert 5 in Node(1, 5) and 6 not in Node(1, 5)',
    'assert Node(1, 5)[0] == 5 and Node(1, 5, 6, 7)[1:] == [6, 7]',
    'assert Node(3)(4, scale=2) == 24',
    'assert repr(Node(3)) == "<3>" and f"{Node(3)}" == "<3>"',
    'assert float(Node(3)) == 1.5 and range(9)[Node(3)] == 3',
    'assert -Node(3) == -3 and divmod(Node(7), 2) == (3, 1)',
    'assert {Node(3): 1}[Node(3)] == 1 and len({Node(3), Node(3)}) == 1',
    'assert not Node(3) and Node(3, 1) and bytes(Node(1, 2)) == b"node"',
    'node = Node(1); node.value = 9; assert node.value == 9',
    'node = Node(1)\ndel node.value\nassert not hasattr(node, "value")',
    'node = Node(1); assert node.__dict__ == {"value": 1, "rest": []}',
    'assert Node.__doc__ == "A node." and "value" in dir(Node(1))',
    'node = Node(3)\nwith node as value:\n  assert value == 3\n'
    'assert node.value == "left"',
    'assert isinstance(Node(3), Node) and not isinstance(3, Node)',
    'assert isinstance(Pair(1, 2), tuple) and Pair(1, 2) == (1, 2)',
    'node = Node(1); assert f(node) is node and f([node])[0] is node',
    'assert sorted([Node(2), Node(1)]) == nodes',
    'assert list(numbers()) == [1, 2] and next(numbers()) == 1',
    'count(); count(); assert counted == 2',
    'assert apply(lambda x, y: x * y, 3, 4) == 12',
    'assert apply(max, [3, 4]) == 4 and apply(int, "5") == 5',
    'assert apply(apply, lambda: f(6)) == 6',
    'held = [3, 1, 2]; sort(held); assert held == [1, 2, 3]',
    'held, other = [2, 1], [{"a": 0}]; inner = other[0]; sort(held, also=other)'
    '\nassert inner == {"a": 0, "new": 1} and held == [1, 2]',
    'held = [Node(2), Node(1)]; sort(held); assert held[0].value == 1',
    'assert math.sqrt(9) == 3 and collections.deque([1]) == f(nodes) or 1',
    'try:\n  fail("own")\nexcept KeyError as e:\n  assert "o" in str(e)',
    'try:\n  f()\nexcept TypeError:\n  pass\nelse:\n  assert False',
    'try:\n  fail("strange")\nexcept Exception as e:\n'
    '  assert str(e) == "Strange: s"',
    'try:\n  fail("unicode")\nexcept UnicodeDecodeError as e:\n'
    '  assert e.reason == "c"',
    'try:\n  fail("own")\nexcept KeyError as e:\n  assert e.args == ("o",)',
    'try:\n  fail("plain")\nexcept Exception as e:\n'
    '  assert e.args == ("p", [3]) and str(e) == "(\'p\', [3])"',
    'try:\n  fail("long")\nexcept ValueError as e:\n'
    '  assert str(e) == "long" * 99',
    'try:\n  fail("file")\nexcept FileNotFoundError as e:\n'
    '  assert (e.errno, e.filename) == (2, "missing")',
    'try:\n  fail("told")\nexcept ValueError as e:\n'
    '  assert str(e) == "told by itself"',
    'try:\n  fail("node")\nexcept ValueError as e:\n'
    '  assert e.args == ("<5>",)',
    'try:\n  apply(lambda: 1 / 0)\nexcept ZeroDivisionError:\n  pass',
    'assert __name__ == "tests" and isinstance(f, object)',
    'assert any([1])',
    'try:\n  missing\nexcept NameError:\n  pass\nelse:\n  assert False',
    'def g():\n  return f(len([1]))\nassert g() == 1',
])  # fmt: skip
def test_tests_see_the_solution_as_if_it_were_their_own(test):
  assert check(test) == [['passed', '']]


@pytest.mark.parametrize(('test', 'error'), [
    ('assert f(1) == 2', 'AssertionError'),
    ('assert f(1) == 2, "one\\ntwo"', 'AssertionError: one'),
    ('f(', "SyntaxError: '(' was never closed (<tests>, line 1)"),
    ('fail("exit")', 'RemoteError: SystemExit: 3'),
    ('raise SystemExit(0)', 'SystemExit: 0'),
    ('f(object())', 'TypeError: a object cannot cross the border'),
    ('apply(eval, "1")',
     'TypeError: a builtin_function_or_method cannot cross the border'),
    ('pry(f)["a"]', "KeyError: 'a'"),
    ('pry(lambda: 1)',
     "AttributeError: 'Callback' object has no attribute '__globals__'"),
    ('class Odd(Exception):\n  def __str__(self):\n    raise self\nraise Odd',
     'Odd'),
])  # fmt: skip
def test_what_fails_is_said_with_its_first_line(test, error):
  assert check(test) == [['failed', error]]


def test_each_test_has_names_of_its_own():
  assert [verdict for verdict, _ in check(
      'held = 1', 'assert held', 'assert f(1) == 1')] == [
          'passed', 'failed', 'passed']  # fmt: skip


def test_a_solution_that_fails_to_load_fails_all_tests():
  verdicts = check('pass', 'pass', source='1 / 0')
  assert verdicts == [['failed', 'ZeroDivisionError: division by zero']] * 2


def test_names_of_the_solution_that_are_pythons_are_so_only_if_tested():
  test = 'assert sum((4, 3)) == 7'
  assert check(test)[0][0] == 'passed'
  assert check(test, tested=('sum',))[0][0] == 'failed'
  assert check('assert candidate(4, 3) == 1', tested=('sum',))[0][0] == 'passed'


def test_names_of_the_prompt_come_before_those_of_the_solution():
  prompt = (
      'import cmath\ndef helper():\n  return f(1)\n'
      'def f(x):\n  """Doc."""\n')
  source = 'def helper():\n  return 0\ndef f(x):\n  return 7\n'
  test = 'assert helper() == 7 and f(1) == 7 and cmath.sqrt(4) == 2'
  assert check(test, source=source, prompt=prompt) == [['passed', '']]
  assert check('helper() / 0', source=source, prompt='def f(')[0][1] == (
      'ZeroDivisionError: division by zero')


def test_dataclasses_of_a_solution_can_look_up_their_module():
  source = '''
from __future__ import annotations
import dataclasses
@dataclasses.dataclass
class Point:
  x: int = 0
'''
  assert check('assert Point(3).x == 3', source=source)[0][0] == 'passed'


def talk(*frames):
  """What tests conclude of a solution that answers with these bytes."""
  ours, theirs = socket.socketpair()
  with ours, theirs:
    for frame in frames:
      ours.sendall(frame)
    ours.shutdown(socket.SHUT_WR)
    lines = []
    given = {'tests': ['try:\n  f(1)\nfinally:\n  1'], 'tested': ['f'],
             'prompt': ''}  # fmt: skip
    checking.run(theirs, json.dumps(given).encode, lines.append)
  return lines[-1]


def framed(text):
  return struct.pack('!I', len(text)) + text


_LOADED = framed(b'["done", null, []]')
_GLOBAL = framed(b'["done", ["list", "value", ["s", 0]], []]')


def test_a_solution_of_made_up_bytes_can_answer():
  assert talk(_LOADED, _GLOBAL, framed(b'["done", 1, []]')) == ['passed', '']


@pytest.mark.parametrize('frame', [
    b'', b'\0', b'\0\0\0\1', framed(b'x'), framed(b'[]'), framed(b'{}'),
    framed(b'["done"]'), framed(b'["done", 1]'), framed(b'["done", 1, 2]'),
    framed(b'["done", 1, [[7, 1]]]'), framed(b'["done", {}, []]'),
    framed(b'["done", ["x", 1], []]'), framed(b'["done", ["t", 0], []]'),
    framed(b'["done", ["t", -1], []]'), framed(b'["raised", 1]'),
    framed(b'["raised", "KeyError", "x", "x"]'),
    framed(b'["raised", "KeyError", "x", "x", ["s", 0]]'),
    framed(b'["raised", "KeyError", "x", "x", ["tuple", 1], 2]'),
    framed(b'[["done"], 1]'),
    framed(b'["passed", ""]'), framed(b'["ask"]'), framed(b'["ask", 1, 2, 3]'),
    framed(b'["ask", "call", [], {}]'), framed(b'["ask", "call", [{}], {}]'),
    framed(b'\xff'), b'\xff\xff\xff\xff', framed(b'["done", ' + b'[' * 99_999),
], ids=lambda frame: repr(frame[:40]))  # fmt: skip
def test_made_up_bytes_never_pass_even_if_tests_catch_everything(frame):
  status, _ = talk(_LOADED, _GLOBAL, frame)
  assert status == 'crashed'


@pytest.mark.parametrize('name', ['SystemExit', 'GeneratorExit', 'int', 'x'])
def test_no_made_up_exception_ends_the_tests(name):
  raised = framed(json.dumps(['raised', name, 'Name', 'text', None]).encode())
  assert talk(_LOADED, _GLOBAL, raised) == ['failed', 'RemoteError: Name: text']


@pytest.mark.parametrize('arguments', [
    None, 'text', ['list', 'text'], ['tuple', 'text', 2], ['int', '0x5'],
    ['range', 0, 10**15, 1], ['tuple', ['int', hex(10**5000)]]])  # fmt: skip
def test_made_up_arguments_of_an_exception_are_not_taken(arguments):
  message = ['raised', 'KeyError', 'Name', 'text', arguments]
  raised = framed(json.dumps(message).encode())
  assert talk(_LOADED, _GLOBAL, raised) == ['failed', "KeyError: 'text'"]


def test_a_server_refuses_what_is_no_question():
  ours, theirs = socket.socketpair()
  with ours, theirs:
    end = border.Border(
        ours, border.SOLUTION, refers=bool, make_remote=solution.Callback,
        answer=lambda *a: None)  # fmt: skip
    theirs.sendall(framed(b'["done", 1, []]'))
    with pytest.raises(border.Broken, match='expected a question'):
      end.serve()


def test_a_message_that_is_too_long_is_not_sent(monkeypatch):
  monkeypatch.setattr(border, '_MAX_MESSAGE', 100)
  assert check('f("x" * 99)') == [
      ['crashed', 'the process talks nonsense: a message is too long']]


class Served:
  """What serves tests, in a thread, and what it reports."""

  def __init__(self, *tests):
    self.reported = []
    self.given_up = 0
    self._tests = list(tests)
    self._ours, control = socket.socketpair()
    self._thread = threading.Thread(
        target=checking.serve, daemon=True,
        args=(control, self._read, self.reported.append, self._give_up))
    self._thread.start()

  def _read(self):
    return json.dumps({
        'tests': [self._tests.pop(0)], 'tested': ['f'], 'prompt': ''}).encode()

  def _give_up(self):
    self.given_up += 1

  def solve(self, kind, source='def f(x): return x'):
    ours, theirs = socket.socketpair()
    with theirs:
      socket.send_fds(self._ours, [kind], [theirs.fileno()])
    with ours:
      _swallow(solution.run, ours, [source])
    sys.modules.pop('solution')

  def end(self):
    self._ours.close()
    self._thread.join(10)
    assert not self._thread.is_alive()
    return self.reported


def test_trusted_tests_are_served_one_after_the_other():
  served = Served('assert f(1) == 1', 'assert f(1) == 2')
  served.solve(checking.TRUSTED)
  served.solve(checking.TRUSTED)
  assert served.end() == [
      None, ['passed', ''], True, None, ['failed', 'AssertionError'], True]
  assert served.given_up == 0


def test_untrusted_tests_are_the_last_and_cannot_read_others():
  served = Served('assert f(1) == 1', 'never read')
  served.solve(checking.UNTRUSTED)
  assert served.end() == [None, ['passed', ''], True]
  assert served.given_up == 1


def test_a_process_that_was_made_large_serves_no_more(monkeypatch):
  sizes = iter([1 << 27, (1 << 27) + (1 << 25)])
  monkeypatch.setattr(checking, '_most_memory', lambda: next(sizes))
  served = Served('assert f(1) == 1')
  served.solve(checking.TRUSTED)
  assert served.end() == [None, ['passed', ''], False]
