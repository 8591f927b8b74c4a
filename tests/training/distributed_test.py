import atexit
import contextlib
import json
import logging
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import jax._src.clusters
import numpy as np
import pytest
from jax.experimental import multihost_utils

import codet5p_jax
from codet5p_jax.errors import Unavailable, UserError
from codet5p_jax.training import distributed
from codet5p_jax.training.checkpoints.fingerprint import fingerprint_tree
from codet5p_jax.training.distributed import (
    agree,
    as_first_process,
    disagreement,
    failing_together,
    join,
    leave,
    program_digest,
)
from codet5p_jax.training.roll_call import Place

ROOT = pathlib.Path(__file__).parents[2]
HOST = socket.gethostname()

# A process that joins, then does one thing after the other with the others and
# prints what came of each.
PROGRAM = """
import os, sys, time
# Gloo tells of its peers in pieces, amid our lines.
sys.stdout = os.fdopen(os.dup(1), 'w')
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from codet5p_jax.errors import UserError
from codet5p_jax.training import distributed
from codet5p_jax.training.checkpoints.fingerprint import fingerprint_tree

address, count, index, timeout, late, *alone = sys.argv[1:]
index = int(index)
distributed._LISTEN_SECONDS, distributed._ORDERLY_SECONDS = 0.1, 0.5

def tell(name, action):
  begin = time.monotonic()
  try:
    said = action()
  except UserError as error:
    said = f'{type(error).__name__}: {error}'
  print(f'{name}: {said}', flush=True)
  return time.monotonic() - begin

time.sleep(float(late))
join = lambda: distributed.join(address, int(count), index, float(timeout))
seconds = tell('join', join)
print(f'seconds: {seconds}', flush=True)
if not jax.distributed.is_initialized():
  sys.exit(2)
if alone:
  if index == int(alone[0]):
    print('leaves: alone', flush=True)
    distributed.leave(69, 'the disk is full', trace='with its traceback')
  distributed.gather_texts('waits for the other')
tell('again', join)
print('processes:', jax.process_count(), jax.process_index())
tell('same', lambda: distributed.agree({'program': 'p' * 9999, 'data': 'd'}))
tell('other', lambda: distributed.agree({
    'program': 'p', 'configuration': f'{index // 2}', 'data': 'd'}))
tell('more', lambda: distributed.agree(
    {'p': 'p', 'new': 'q'} if index == 1 else {'p': 'p'}))

def fail():
  with distributed.failing_together():
    if index == 1:
      raise UserError('expected rain, found sun; wait')

def crash():
  with distributed.failing_together():
    if index == 0:
      raise KeyError('lost')

def work():
  with distributed.failing_together():
    return 'done'

tell('fail', fail)
try:
  tell('crash', crash)
except KeyError as error:
  print('crash: its own', error)
tell('work', work)
tell('first', lambda: distributed.as_first_process([index, 'ü', None]))
numbers = np.arange(12, dtype=np.float32).reshape(6, 2)
mesh = Mesh(np.array(jax.devices()), 'x')
cut = jax.make_array_from_callback(
    numbers.shape, NamedSharding(mesh, PartitionSpec('x')),
    lambda slices: numbers[slices])
tell('fingerprint', lambda: fingerprint_tree({'layers': {'a': cut}}))
tell('leave', lambda: distributed.leave(3))
"""


def free_port():
  with socket.create_server(('', 0)) as server:
    return server.getsockname()[1]


def run_processes(
    present, num_processes, timeout_seconds, late=0.0, alone=()
):
  """Runs PROGRAM in the processes that are present.

  Returns:
    Of each its exit status and {what it did: what it printed of it}.
  """
  address = f'localhost:{free_port()}'
  environment = {
      **os.environ,
      'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
      'PYTHONPATH': str(ROOT),
  }
  with contextlib.ExitStack() as stack:
    processes = [
        stack.enter_context(
            subprocess.Popen(
                [sys.executable, '-c', PROGRAM, address, str(num_processes),
                 str(process_id), str(timeout_seconds), str(late * place),
                 *map(str, alone)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=environment,
            )
        )
        for place, process_id in enumerate(present)
    ]  # fmt: skip
    for process in processes:
      stack.callback(process.kill)
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    return [
        (process.returncode, dict(
            line.split(': ', 1) for line in out.splitlines() if ': ' in line
        ))
        for process, out in zip(processes, outputs, strict=True)
    ]  # fmt: skip


@pytest.fixture(scope='module')
def three():
  """What three processes printed that came late, the first one last."""
  results = run_processes((2, 1, 0), 3, timeout_seconds=60.0, late=0.5)
  assert [status for status, _ in results] == [0, 0, 0], results
  return [printed for _, printed in reversed(results)]


def test_processes_that_come_late_are_one_program(three):
  assert [said['join'] for said in three] == ['None'] * 3
  assert [said['again'] for said in three] == ['None'] * 3
  assert [said['processes'] for said in three] == ['3 0', '3 1', '3 2']


def test_processes_that_were_given_the_same_go_on(three):
  assert [said['same'] for said in three] == ['None'] * 3


def test_the_process_that_was_given_something_else_is_named(three):
  assert {said['other'] for said in three} == {
      f'UserError: expected the same program, settings and files in all 3 '
      f'processes, found another configuration in process 2 ({HOST}); start '
      f'all alike'
  }
  assert all(f'another new in process 1 ({HOST});' in s['more'] for s in three)


def test_a_fault_of_one_process_is_raised_by_all(three):
  own = 'expected rain, found sun; wait'
  told = f'UserError: process 1 on {HOST} could not go on: {own}'
  assert [said['fail'] for said in three] == [told, f'UserError: {own}', told]
  # Where one is started again, the others must be, too.
  told = f"Unavailable: process 0 on {HOST} could not go on: KeyError: 'lost'"
  assert [s['crash'] for s in three] == ["its own 'lost'", told, told]
  assert [said['work'] for said in three] == ['done'] * 3


def test_all_decide_by_what_the_first_process_found(three):
  assert [said['first'] for said in three] == ["[0, 'ü', None]"] * 3


def test_a_fingerprint_is_that_of_the_whole_array(three):
  numbers = np.arange(12, dtype=np.float32).reshape(6, 2)
  expected = fingerprint_tree({'layers': {'a': numbers}})
  assert {said['fingerprint'] for said in three} == {expected}


def test_a_missing_process_ends_the_others_with_its_name():
  results = run_processes((0, 2), 3, timeout_seconds=4.0)
  for status, said in results:
    assert status == 2
    assert said['join'].startswith('Unavailable: expected 3 processes at ')
    assert 'found no process 1;' in said['join']
    assert f'there are 0 on {HOST}, 2 on {HOST};' in said['join']
    assert float(said['seconds']) < 6


def test_who_leaves_together_keeps_its_own_status(three):
  assert [said['leave'] for said in three] == ['None'] * 3


@pytest.mark.parametrize('first', [0, 1])
def test_the_last_words_of_one_end_those_that_wait_for_it(first):
  begin = time.monotonic()
  results = run_processes((0, 1), 2, timeout_seconds=60.0, alone=[first])
  assert [status for status, _ in results] == [69, 69]
  assert results[first][1]['leaves'] == 'alone'
  said = results[1 - first][1]
  assert said['codet5p'] == (
      f'expected process {first} on {HOST} to go on, found that it could not: '
      f'the disk is full'
  )
  assert 'processes' not in said
  assert time.monotonic() - begin < 60


# In this process.


@pytest.fixture(autouse=True)
def leaving(monkeypatch):
  """A flag of each test's own."""
  monkeypatch.setattr(distributed, '_leaving', threading.Event())


@pytest.fixture
def joined(monkeypatch):
  """Records the place that a process joins at, in place of joining."""
  places = []
  monkeypatch.setattr(threading.Thread, 'start', lambda thread: None)
  monkeypatch.setattr(atexit, 'register', lambda action: None)
  monkeypatch.setattr(
      distributed, 'call_roll', lambda place, seconds: places.append(place)
  )

  def initialize(address, num_processes, process_id, **options):
    assert places == [Place(address, num_processes, process_id)]
    assert options['initialization_timeout'] > 0

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  log = logging.getLogger('codet5p_jax')
  level = log.level
  yield places
  log.setLevel(level)


def detect(monkeypatch, answer):
  monkeypatch.setattr(
      jax._src.clusters.ClusterEnv,
      'auto_detect_unset_distributed_params',
      lambda *given: answer,
  )


@pytest.mark.parametrize(
    'given', [(None, None, None), (None, 1, None), (None, 1, 0), ('a:80', 1, 0)]
)
def test_a_process_alone_joins_nothing(monkeypatch, joined, given):
  for found in [(None, None, None, None), ('a:80', 1, 0, None)]:
    detect(monkeypatch, found)
    join(*given)
  assert joined == []


def test_what_is_given_is_joined(joined):
  join('a:80', 5, 3)
  assert joined == [Place('a:80', 5, 3)]
  # What all do, the first one tells.
  assert logging.getLogger('codet5p_jax').level == logging.WARNING


def test_a_cluster_says_where_a_process_belongs(monkeypatch, joined):
  for name, value in {
      'SLURM_JOB_ID': '4097',
      'SLURM_STEP_NODELIST': 'node[003,007-9]',
      'SLURM_NTASKS': '4',
      'SLURM_PROCID': '2',
      'SLURM_LOCALID': '0',
  }.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv('JAX_COORDINATOR_PORT', '1234')
  join(None, None, None)
  assert joined == [Place('node003:1234', 4, 2)]


def test_a_second_time_nothing_is_joined(monkeypatch, joined):
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  join('a:80', 5, 3)
  assert joined == []


@pytest.mark.parametrize(
    ('given', 'missing'),
    [
        (('a:80', None, None), 'no --num_processes and no --process_id;'),
        ((None, 2, 0), 'no --coordinator_address;'),
        ((None, 1, 3), 'no --coordinator_address;'),
        ((None, None, 0), 'no --coordinator_address and no --num_processes;'),
    ],
)
def test_half_a_place_is_refused(joined, given, missing):
  with pytest.raises(UserError, match=f'found {missing} give what is missing'):
    join(*given)
  assert joined == []


def test_a_cluster_that_says_nothing_clear_is_one_line(monkeypatch, joined):
  def fail(*given):
    raise RuntimeError('only supports Job')

  monkeypatch.setattr(
      jax._src.clusters.ClusterEnv, 'auto_detect_unset_distributed_params', fail
  )
  with pytest.raises(UserError, match='RuntimeError: only supports Job; give'):
    join(None, None, None)


def test_a_jax_that_has_changed_is_named(monkeypatch, joined):
  monkeypatch.delattr(jax._src.clusters, 'ClusterEnv')
  with pytest.raises(UserError, match=f'expected JAX {jax.__version__} to'):
    join(None, None, None)


def said(*digests):
  return [
      {'host': f'h{i}', 'digests': each} for i, each in enumerate(digests)
  ]


def test_what_most_processes_have_is_right():
  a, b = {'x': '1', 'y': '2'}, {'x': '1', 'y': '3'}
  assert disagreement(said(a, a, a)) is None
  assert 'found another y in process 1 (h1);' in disagreement(said(a, b, a))
  assert 'found another y in process 0 (h0);' in disagreement(said(b, a, a))
  # Of two, process 0.
  assert 'found another y in process 1 (h1);' in disagreement(said(b, a))


def test_all_that_differs_is_named():
  a, b = {'x': '1', 'y': '2'}, {'x': '5', 'y': '2'}
  found = disagreement(said(a, b, a, {'z': '3'}, a))
  assert 'settings and files in all 5 processes' in found
  assert (
      'found another x in process 1 (h1), 3 (h3); another y in process 3 (h3); '
      'another z in process 3 (h3); start'
  ) in found


def test_one_process_agrees_with_itself_for_nothing(monkeypatch):
  monkeypatch.delattr(multihost_utils, 'process_allgather')
  agree({'x': '1'})
  leave(1, 'nobody hears it')
  with failing_together():
    pass
  with pytest.raises(KeyError), failing_together():
    raise KeyError


def test_leaving_waits_for_the_others_but_not_for_ever(monkeypatch):
  left, statuses = threading.Event(), []
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(jax.distributed, 'shutdown', left.wait)
  monkeypatch.setattr(distributed, '_LEAVE_SECONDS', 0.1)
  monkeypatch.setattr(os, '_exit', statuses.append)
  leave(70)
  assert statuses == [70]
  left.set()
  leave(71)
  assert statuses == [70]


def test_a_process_with_last_words_ends_whoever_comes(monkeypatch, capsys):
  statuses, words = [], {}
  client = types.SimpleNamespace(key_value_set=words.__setitem__)
  state = types.SimpleNamespace(client=client, process_id=3)
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(jax.distributed, 'shutdown', lambda: None)
  monkeypatch.setattr(distributed, '_state', lambda: state)
  monkeypatch.setattr(os, '_exit', statuses.append)
  leave(1, 'KeyError: lost', trace='line 7')
  assert statuses == [1]
  assert capsys.readouterr().err == 'line 7'
  [said] = map(json.loads, words.values())
  assert said == {
      'process': 3, 'host': HOST, 'status': 1, 'words': 'KeyError: lost'
  }


@pytest.mark.parametrize(
    ('trace', 'status', 'printed'),
    [
        (
            'Traceback of a barrier',
            2,
            '\ncodet5p: expected process 1 on far to go on, found that it '
            'could not: the disk is full\n',
        ),
        ('', 69, ''),  # It has said its own line.
    ],
)
def test_what_comes_of_another_process_is_not_told_as_a_bug(
    monkeypatch, capsys, trace, status, printed
):
  statuses = []
  said = {'process': 1, 'host': 'far', 'status': 2, 'words': 'the disk is full'}

  def refuse(key, value):
    raise jax.errors.JaxRuntimeError('ALREADY_EXISTS')

  client = types.SimpleNamespace(
      key_value_set=refuse, key_value_try_get=lambda key: json.dumps(said)
  )
  state = types.SimpleNamespace(client=client, process_id=0)
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(jax.distributed, 'shutdown', lambda: None)
  monkeypatch.setattr(distributed, '_state', lambda: state)
  monkeypatch.setattr(os, '_exit', statuses.append)
  leave(1 if trace else 69, 'TimeoutError: barrier', trace)
  assert statuses == [status]
  assert capsys.readouterr().err == printed


def test_one_thread_takes_leave(monkeypatch, capsys):
  """What the shutdown breaks for the main thread is not told."""
  left, ended = threading.Event(), []
  said = {'process': 1, 'host': 'far', 'status': 2, 'words': 'the disk is full'}
  client = types.SimpleNamespace(
      key_value_try_get=lambda key: json.dumps(said)
  )
  monkeypatch.setattr(distributed, '_LISTEN_SECONDS', 0.01)
  monkeypatch.setattr(distributed, '_ORDERLY_SECONDS', 0.01)
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: not ended)
  monkeypatch.setattr(jax.distributed, 'shutdown', left.wait)
  monkeypatch.setattr(os, '_exit', ended.append)
  listening = threading.Thread(target=distributed._listen, args=(client,))
  listening.start()
  while not distributed._departure.locked():
    time.sleep(0.01)
  late = threading.Thread(target=leave, args=(1, 'TimeoutError', 'its trace'))
  late.start()
  late.join(0.1)
  assert late.is_alive() and not ended
  left.set()
  late.join(5)
  distributed._leaving.set()  # Here the process lives on.
  listening.join(5)
  assert set(ended) == {2}
  assert 'its trace' not in capsys.readouterr().err


@pytest.fixture
def as_second(monkeypatch):
  """Makes this process the second of three.

  Returns a function that says what the first and the third tell; its `heard`
  is what this one told last.
  """
  told = []

  def tell(texts):
    told[:] = texts

  def gather(row):
    tell.heard = bytes(row).rstrip(b'\0').decode()
    texts = [text.encode()[: len(row)] for text in told]
    rows = [np.frombuffer(t.ljust(len(row), b'\0'), np.uint8) for t in texts]
    return np.stack([rows[0], row, rows[1]])

  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  monkeypatch.setattr(multihost_utils, 'process_allgather', gather)
  return tell


def test_texts_are_compared_and_never_sent(as_second):
  digest = '9f86d081884c7d65'
  same = json.dumps({'host': 'h', 'digests': {'x': digest}})  # Of "test".
  as_second([same, same])
  agree({'x': 'test'})
  with pytest.raises(UserError, match=rf'another x in process 1 \({HOST}\);'):
    agree({'x': 'tset'})
  with pytest.raises(ValueError, match='too many'):
    agree({f'thing {i}': '' for i in range(999)})


def test_whatever_another_process_says_of_its_fault_is_told(as_second):
  as_second(['', 'h2 could not go on: ' + 9999 * 'ü'])
  with pytest.raises(UserError, match='^process 2 on h2 .* üüü') as raised:
    with failing_together():
      pass
  assert len(str(raised.value)) > 1000
  with pytest.raises(OSError, match='full'), failing_together():
    raise OSError('full')


@pytest.mark.parametrize(
    ('error', 'kind'),
    [
        (UserError('no such file'), UserError),
        (Unavailable('no such host'), Unavailable),
        (KeyError('lost'), Unavailable),
    ],
)
def test_others_may_try_again_where_the_fault_may_pass(as_second, error, kind):
  as_second(['', ''])
  with pytest.raises(type(error)) as raised, failing_together():
    raise error
  assert raised.value is error
  # It is heard as it was told.
  as_second([as_second.heard, ''])
  with pytest.raises(UserError) as raised, failing_together():
    pass
  assert type(raised.value) is kind
  assert str(raised.value).startswith(f'process 0 on {HOST} could not go on: ')
  assert str(error) in str(raised.value)


def test_what_the_first_process_found_is_believed(as_second):
  as_second([json.dumps({'step': 7}), 'null'])
  assert as_first_process(None) == {'step': 7}


def test_the_digest_of_the_program_is_of_its_sources(tmp_path, monkeypatch):
  before = program_digest()
  assert f'codet5p_jax {codet5p_jax.__version__}, jax {jax.__version__}, ' in (
      before
  )
  assert program_digest() == before
  (tmp_path / 'inner').mkdir()
  (tmp_path / '__init__.py').write_text('')
  module = tmp_path / 'inner' / 'module.py'
  monkeypatch.setattr(codet5p_jax, '__file__', str(tmp_path / '__init__.py'))
  seen = {before}
  for change in (
      lambda: module.write_text('x = 1'),
      lambda: module.write_text('x = 2'),
      lambda: module.rename(tmp_path / 'module.py'),
      lambda: (tmp_path / 'empty.py').touch(),
  ):
    change()
    seen.add(program_digest())
  assert len(seen) == 5
  (tmp_path / '__pycache__').mkdir()
  (tmp_path / '__pycache__' / 'module.pyc').write_text('x = 2')
  assert program_digest() in seen
