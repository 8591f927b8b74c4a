"""Tests of the sandbox, most of them by what is to be kept in it."""

import ast
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from codet5p_jax.errors import UserError
from codet5p_jax.execution import isolation
from codet5p_jax.execution.inside import confinement
from codet5p_jax.execution.inside.confinement import Limits
from codet5p_jax.execution.sandbox import (
    CRASHED,
    FAILED,
    PASSED,
    TIMED_OUT,
    Program,
    Sandbox,
)
from tests.execution.conftest import LIMITS
from tests.execution.hostile_programs import (
    ATTACKS,
    ENDLESS,
    EQUALS_EVERYTHING,
    FAKES,
    NUISANCES,
)

_SUMS = '''
assert candidate(1, 2) == 3
assert candidate(-4, 4) == 0
assert candidate(2, 5) == 7
'''
_RIGHT = 'def add(a, b):\n  return a + b\n'

# What a sandbox consists of: bubblewrap, the first process in it, and Python.
_AT_REST = 3
# And what serves trusted tests, once there was a program.
_AT_MOST = 4


# Passes where a program is free to use an empty folder.
_NEXT_ONE = '''
import os
before = os.listdir()
with open('held', 'w') as file:
  file.write('held')
os.remove('held')
def add(a, b):
  return before or a + b
'''


def processes():
  """The processes of this test's sandboxes, seen from outside."""
  marker = f'"file_bytes": {LIMITS.file_bytes}'.encode()
  found = []
  for path in Path('/proc').glob('[0-9]*/cmdline'):
    try:
      if marker in path.read_bytes():
        found.append(int(path.parent.name))
    except OSError:
      pass
  return found


def told_of_devices():
  """What this machine says of the devices that programs see."""
  told = [os.stat(f'/dev/{name}')
          for name in ('null', 'zero', 'random', 'urandom')]  # fmt: skip
  return [(of.st_mode, of.st_uid, of.st_gid, of.st_mtime_ns, of.st_ctime_ns)
          for of in told]  # fmt: skip


def statuses(outcomes):
  return [outcome.status for outcome in outcomes]


def test_what_runs_inside_needs_the_standard_library_alone():
  for path in Path(isolation.__file__).parent.glob('inside/*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = {alias.name.partition('.')[0] for alias in node.names}
        assert names <= sys.stdlib_module_names
      elif isinstance(node, ast.ImportFrom) and not node.level:
        assert node.module.partition('.')[0] in sys.stdlib_module_names


def test_a_right_program_passes_and_a_wrong_one_fails(run):
  assert statuses(run(_RIGHT, _SUMS, tested=('add',))) == [PASSED]
  wrong = _RIGHT.replace('+', '-')
  (outcome,) = run(wrong, _SUMS, tested=('add',))
  assert (outcome.status, outcome.error) == (FAILED, 'AssertionError')
  assert 0 < outcome.seconds < 2


def test_each_test_of_a_program_has_an_outcome(run):
  source = '''
import os, time
def f(x):
  if x == 1: time.sleep(60)
  if x == 2: os._exit(0)
  return x
'''
  assert statuses(run(
      source, 'assert f(5) == 5', 'f(1)', 'assert f(6) == 6', 'f(2)',
      'assert f(7) == 8', 'assert f(8) == 8', seconds=2.0)) == [
          PASSED, TIMED_OUT, PASSED, CRASHED, FAILED, PASSED]  # fmt: skip


def test_a_program_without_tests_has_no_outcomes(run):
  assert run(_RIGHT) == []


def test_a_setup_makes_objects_of_the_solutions_classes(run):
  outcomes = run(
      'class Node:\n  def __init__(self, x): self.x = x\n'
      'def f(node): return node.x\n',
      'assert f(root) == 4', setup='root = Node(4)\n')  # fmt: skip
  assert statuses(outcomes) == [PASSED]


def test_hostile_tests_harm_nobody(run):
  outcomes = run(
      _RIGHT, 'import os; os._exit(0)', 'import os; os.fork()',
      'while True: pass', 'import os; os.closerange(3, 99)',
      'held = bytearray(1 << 40)', 'assert f(1)', tested=('add',),
      seconds=2.0, trusted=False)  # fmt: skip
  assert statuses(outcomes) == [
      CRASHED, FAILED, TIMED_OUT, CRASHED, FAILED, FAILED]
  assert statuses(run(_RIGHT, _SUMS, tested=('add',))) == [PASSED]


@pytest.mark.parametrize(('line', 'status'), [
    ('["a"]\\n', CRASHED), ('["passed", "", 1]\\n', CRASHED),
    ('["great", ""]\\n', CRASHED), ('{}\\n', CRASHED),
    ('[' * 9999 + '\\n', CRASHED),
    ('\\xff\\n', CRASHED), ('["passed", ', TIMED_OUT), ('x' * 99_999, CRASHED),
], ids=lambda text: text[:9])  # fmt: skip
def test_verdicts_that_tests_of_a_model_make_up_are_none(line, status, run):
  forger = f"""
import os, time
data = b'{line}'
while data:
  data = data[os.write(4, data):]
time.sleep(60)
"""
  seconds = 0.4 if status == TIMED_OUT else 10.0
  outcomes = run('', forger, trusted=False, seconds=seconds)
  assert statuses(outcomes) == [status]


def test_untrusted_tests_leave_nothing_to_other_programs(run):
  spoil = 'import builtins\nbuiltins.len = lambda x: 7\nassert len([]) == 7'
  fine = 'assert len([]) == 0'
  assert statuses(run('', spoil, trusted=False)) == [PASSED]
  assert statuses(run('', fine)) == [PASSED]
  assert statuses(run('', fine, trusted=False)) == [PASSED]


def test_a_program_that_fills_the_memory_of_tests_takes_none_of_the_next(run):
  large = f'def f(): return "x" * {LIMITS.memory_bytes // 8}'
  for _ in range(3):
    assert statuses(run(large, 'assert len(f()) > 9')) == [PASSED]


_NOT_PASSED = {FAILED, TIMED_OUT, CRASHED}
_HOSTILE = [
    *[(source, _NOT_PASSED, 0.4) for source in FAKES.values()],
    # They end at once, but some of them import much.
    *[(source, {FAILED}, 10.0) for source in ATTACKS.values()],
    *[(source, {TIMED_OUT}, 0.4) for source in ENDLESS.values()],
    *[(source, _NOT_PASSED, 0.4) for source in NUISANCES.values()],
]  # fmt: skip


def test_hostile_programs_are_many():
  assert len(_HOSTILE) >= 80


@pytest.mark.parametrize(
    ('source', 'expected', 'seconds'), _HOSTILE,
    ids=[*FAKES, *ATTACKS, *ENDLESS, *NUISANCES])  # fmt: skip
def test_a_hostile_program_gets_nothing(source, expected, seconds, run):
  victim = Path('/tmp') / f'victim_of_{os.getpid()}'
  victim.write_text('untouched')
  devices = told_of_devices()
  try:
    (outcome,) = run(source, _SUMS, tested=('add',), seconds=seconds)
    assert outcome.status in expected, outcome
    assert victim.read_text() == 'untouched'
  finally:
    victim.unlink()
  assert told_of_devices() == devices
  assert not Path('/hostile').exists() and not Path('/tmp/sparse').exists()
  # It is gone, with all that it began, and the next one finds a clean place.
  assert statuses(run(_NEXT_ONE, _SUMS, tested=('add',))) == [PASSED]
  assert _AT_REST <= len(processes()) <= _AT_MOST


def test_files_for_a_while_can_be_made_and_copied(run):
  source = '''
import shutil, tempfile
def f():
  with tempfile.TemporaryDirectory() as folder:
    with tempfile.NamedTemporaryFile('w', dir=folder) as file:
      file.write('held')
      file.flush()
      copy = shutil.copyfile(file.name, f'{folder}/copy')
      with open(copy) as copied:
        return copied.read()
'''
  assert statuses(run(source, 'assert f() == "held"')) == [PASSED]


@pytest.mark.parametrize('name', [
    'exec', 'subprocess', 'reads passwords', 'reads processes', 'listens',
    'sends a packet', 'native thread bomb'])  # fmt: skip
def test_an_attack_passes_where_nothing_prevents_it(name):
  program = Program(ATTACKS[name], (_SUMS,), ('add',), 10.0)
  with Sandbox('none', limits=LIMITS) as box:
    ((_, outcomes),) = box.run([program])
  assert statuses(outcomes) == [PASSED]


def test_what_equals_everything_passes_as_it_does_in_one_process(run):
  names = {}
  exec(EQUALS_EVERYTHING, names)
  exec(_SUMS, {'candidate': names['add']})
  outcomes = run(EQUALS_EVERYTHING, _SUMS, tested=('add',))
  assert statuses(outcomes) == [PASSED]


# With the folder above the interpreter. A list, in one order in all processes
# that collect the tests.
_SYSTEM = ['lib', 'lib64', 'usr', 'etc', Path(sys.base_prefix).parts[1]]
# What a program finds, and is to find, around it.
_SURROUNDINGS = '''
import os, sys, socket
def f(what):
  return eval(what)
'''


@pytest.mark.parametrize(('what', 'expected'), [
    ('sorted(os.listdir("/tmp"))', []),
    (f'sorted({{*os.listdir("/")}} - {{*{_SYSTEM}}})',
     ['dev', 'program', 'tmp']),
    ('sorted(os.listdir("/etc"))', ['ld.so.cache']),
    ('sorted(os.listdir("/dev"))', ['null', 'random', 'urandom', 'zero']),
    ('sorted(os.environ.keys() - {"LC_CTYPE", "PWD"})', ['PYTHONHASHSEED']),
    ('[d for d in range(64) if os.path.exists(f"/dev/fd/{d}")]', []),
    ('os.path.realpath(os.curdir)', '/tmp'),
    ('os.uname().nodename', 'sandbox'),
    ('sys.stdin.read()', ''),
    ('os.write(1, b"x") + os.write(2, b"x")', 2),
    ('len(socket.socketpair())', 2),
    ('os.kill(os.getpid(), 0)', None),
    ('hash("a") == hash("a") and hash("solution")', None),
    ('sorted(m for m in sys.modules if "codet5p" in m)', []),
])  # fmt: skip
def test_around_a_program_there_is_little(what, expected, run):
  if what.startswith('hash'):
    first = run(_SURROUNDINGS, f'raise Exception(f({what!r}))')
    again = run(_SURROUNDINGS, f'raise Exception(f({what!r}))')
    assert first[0].error == again[0].error != ''
  else:
    outcomes = run(_SURROUNDINGS, f'assert f({what!r}) == {expected!r}')
    assert statuses(outcomes) == [PASSED], outcomes


def test_a_virtual_environment_is_not_shown_to_programs():
  need_bubblewrap()
  if sys.prefix == sys.base_prefix:
    pytest.skip('these tests run in no virtual environment')
  command = isolation.sandbox_command('bubblewrap', LIMITS, Path(), 0)
  shown = [Path(command[index + 1]) for index, argument in enumerate(command)
           if argument == '--ro-bind']  # fmt: skip
  of_the_tests = Path(sys.prefix) / 'lib'
  assert len(shown) > 3
  assert not [path for path in shown if path.is_relative_to(of_the_tests)]


def test_a_program_that_starts_a_thread_gets_an_exception(run):
  source = '''
import threading
def f():
  try:
    threading.Thread(target=print).start()
  except RuntimeError as error:
    return str(error)
'''
  assert statuses(run(source, 'assert "start new thread" in f()')) == [PASSED]


@pytest.mark.parametrize('name', ['numpy', 'jax', 'pytest', 'pip', 'ctypes'])
def test_packages_and_ctypes_cannot_be_imported(name, run):
  (outcome,) = run(f'import {name}', 'pass')
  assert outcome.error.startswith('ModuleNotFoundError')


def test_no_call_that_the_filter_denies_succeeds_from_native_code(run):
  source = '''
import sys
for name in ('ctypes', '_ctypes'):
  sys.modules.pop(name, None)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(numbers):
  allowed = []
  for number in numbers:
    if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1:
      allowed.append(number)
    elif ctypes.get_errno() not in (1, 38):
      allowed.append(number)
  return allowed
'''
  column = ['x86_64', 'aarch64'].index(os.uname().machine)
  tables = confinement._DENIED | confinement._DENIED_TO_FORKS
  numbers = [n[column] for n in tables.values() if n[column] is not None]
  outcomes = run(source, f'assert f({numbers + [435, 425, 434]}) == []')
  assert statuses(outcomes) == [PASSED], outcomes


def test_memory_and_files_are_bounded_at_the_limits_given(run):
  source = '''
def f(memory, size):
  held = bytearray(memory)
  with open('/tmp/held', 'wb') as file:
    file.write(bytes(size))
  return True
'''
  within = f'assert f({LIMITS.memory_bytes // 2}, 1 << 20)'
  assert statuses(run(source, within)) == [PASSED]
  assert 'MemoryError' in run(source, f'f({LIMITS.memory_bytes}, 0)')[0].error
  assert 'OSError' in run(source, f'f(0, {LIMITS.file_bytes + 1})')[0].error


@pytest.mark.parametrize(('losses', 'status', 'error'), [
    (1, PASSED, ''), (2, CRASHED, 'the sandbox was lost')])  # fmt: skip
def test_a_sandbox_that_is_lost_is_replaced(
    losses, status, error, run, monkeypatch
):
  monkeypatch.setattr('codet5p_jax.execution.sandbox._GRACE_SECONDS', 0.3)
  sleeper = '''
import time
def f():
  time.sleep(1)
'''

  def lose():
    for _ in range(losses):
      # Until both processes of the program are there.
      while len(found := sorted(processes())) < _AT_REST + 2:
        time.sleep(0.02)
      os.kill(found[_AT_REST - 1], 9)  # Python in the sandbox.
      while {*found} & {*processes()}:
        time.sleep(0.02)

  losing = threading.Thread(target=lose)
  losing.start()
  # It may take an hour, so that it is not time that ends it.
  (outcome,) = run(sleeper, 'f()', seconds=3600.0)
  losing.join()
  assert (outcome.status, outcome.error) == (status, error)
  assert statuses(run(_RIGHT, _SUMS, tested=('add',))) == [PASSED]


def test_a_test_may_take_a_day_and_no_more(run):
  assert statuses(run(_RIGHT, _SUMS, tested=('add',), seconds=86400.0)) == [
      PASSED]  # fmt: skip
  for seconds in (0.0, -1.0, 86401.0, float('inf'), float('nan')):
    with pytest.raises(UserError, match='at most 86400 seconds'):
      Program(_RIGHT, (_SUMS,), ('add',), seconds)


def test_programs_run_at_a_time_and_are_told_apart():
  need_bubblewrap()
  programs = [
      Program(f'import time; time.sleep({0.1 * (3 - i)})\n'
              f'def f(): return {i}', (f'assert f() == {i}',), ('f',), 5.0)
      for i in range(4)
  ]  # fmt: skip
  with Sandbox('bubblewrap', workers=3, limits=LIMITS) as box:
    results = dict(box.run(iter(programs)))
  assert sorted(results) == [0, 1, 2, 3]
  assert all(statuses(outcomes) == [PASSED] for outcomes in results.values())


def need_bubblewrap():
  if shutil.which('bwrap') is None:
    pytest.skip('needs bubblewrap (Debian package bubblewrap)')


def test_nothing_is_left_of_a_sandbox_that_is_left_in_the_middle():
  need_bubblewrap()
  limits = Limits(file_bytes=LIMITS.file_bytes + 1)
  started = time.monotonic()
  with pytest.raises(KeyboardInterrupt):
    with Sandbox('bubblewrap', workers=2, limits=limits) as box:
      endless = Program('while True: pass', ('pass',), ('f',), 600.0)
      fine = Program(_RIGHT, (_SUMS,), ('add',), 5.0)
      for _ in box.run([fine, *[endless] * 5]):
        raise KeyboardInterrupt
  assert time.monotonic() - started < 10
  marker = f'"file_bytes": {limits.file_bytes}'.encode()
  for path in Path('/proc').glob('[0-9]*/cmdline'):
    try:
      assert marker not in path.read_bytes()
    except OSError:
      pass


def test_without_a_sandbox_time_and_memory_are_bounded():
  programs = [
      Program(source, (test,), ('f',), 2.0) for source, test in (
          ('def f(): return 1', 'assert f() == 1'),
          ('while True: pass', 'pass'),
          ('held = bytearray(1 << 40)', 'pass'),
          ('import sys; sys.exit(0)', 'pass'),
          ('import os; open("left", "w").close()', 'pass'),
          ('import os\ndef f(): return os.listdir()', 'assert f() == []'))
  ]  # fmt: skip
  with Sandbox('none') as box:
    results = dict(box.run(programs))
  assert [results[i][0].status for i in range(6)] == [
      PASSED, TIMED_OUT, FAILED, FAILED, PASSED, PASSED]


def test_a_sandbox_is_refused_where_bubblewrap_is_missing(monkeypatch):
  monkeypatch.setattr(isolation.shutil, 'which', lambda name: None)
  with pytest.raises(UserError, match='apt-get install bubblewrap') as raised:
    with Sandbox('bubblewrap'):
      pass
  assert '--sandbox=none' in str(raised.value)


@pytest.fixture
def failing_bubblewrap(monkeypatch, tmp_path):
  """Puts a bubblewrap in place that says a line and fails."""

  def install(said):
    fake = tmp_path / 'bwrap'
    fake.write_text(f'#!/bin/sh\necho "{said}" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(isolation.shutil, 'which', lambda name: str(fake))

  return install


def test_a_sandbox_is_refused_where_namespaces_cannot_be_had(
    failing_bubblewrap
):
  failing_bubblewrap('bwrap: no user namespaces')
  with pytest.raises(UserError, match='bwrap: no user namespaces') as raised:
    with Sandbox('bubblewrap'):
      pass
  assert '\n' not in str(raised.value)


def test_a_bubblewrap_that_is_too_old_is_named_as_such(failing_bubblewrap):
  failing_bubblewrap('bwrap: Unknown option --size')
  with pytest.raises(UserError, match='bubblewrap 0.7 or newer') as raised:
    with Sandbox('bubblewrap'):
      pass
  assert '\n' not in str(raised.value)
  assert 'user namespaces' not in str(raised.value)


def test_a_sandbox_is_refused_where_there_is_no_filter(monkeypatch, tmp_path):
  # In the place of bubblewrap, what says that its machine is another one.
  answer = b'{"problem": "this kernel offers no seccomp filters"}'
  fake = tmp_path / 'bwrap'
  fake.write_text(
      '#!/bin/sh\nprintf "\\\\0\\\\0\\\\0\\\\%03o%%s" \'%s\'\n'
      % (len(answer), answer.decode()))  # fmt: skip
  fake.chmod(0o755)
  monkeypatch.setattr(isolation.shutil, 'which', lambda name: str(fake))
  with pytest.raises(UserError, match='no seccomp filters'):
    with Sandbox('bubblewrap'):
      pass


@pytest.mark.parametrize(('kind', 'workers', 'message'), [
    ('docker', 1, "bubblewrap or none, found 'docker'"),
    ('bubblewrap', 0, 'workers'),
])  # fmt: skip
def test_what_is_no_sandbox_is_refused(kind, workers, message):
  with pytest.raises(UserError, match=message):
    Sandbox(kind, workers=workers)
