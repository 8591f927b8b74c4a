import concurrent.futures
import json
import socket
import struct
import threading
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from codet5p_jax.errors import Unavailable, UserError
from codet5p_jax.training import roll_call
from codet5p_jax.training.roll_call import (
    Hello,
    Place,
    absence,
    call_roll,
    contradiction,
    parse_hello,
)

HOST = socket.gethostname()


@pytest.fixture
def port():
  with socket.create_server(('', 0)) as server:
    return server.getsockname()[1]


@pytest.fixture
def address(port):
  return f'localhost:{port}'


@pytest.fixture
def call():
  """Calls the roll of one process in a thread; gives its future."""
  with concurrent.futures.ThreadPoolExecutor(8) as pool:

    def start(address, num_processes, process_id, timeout_seconds=20.0):
      place = Place(address, num_processes, process_id)
      return pool.submit(call_roll, place, timeout_seconds)

    yield start


def refusals(futures, kind):
  """The sentences that all of them were refused with.

  What is `Unavailable` may come by itself, and a launcher goes on trying; of
  what has to be mended it must not.
  """
  sentences = []
  for future in futures:
    with pytest.raises(UserError) as raised:
      future.result()
    assert type(raised.value) is kind
    sentences.append(str(raised.value))
  return sentences


def hello_line(process_id, num_processes, seconds_left=9.5, **changes):
  said = {
      'greeting': 'codet5p_jax roll call',
      'process_id': process_id,
      'num_processes': num_processes,
      'host': 'elsewhere',
      'seconds_left': seconds_left,
      **changes,
  }
  return json.dumps(said).encode() + b'\n'


def speak(port, content):
  """Connects to process 0, which may not listen yet, and says something."""
  for _ in range(100):
    try:
      connection = socket.create_connection(('localhost', port), timeout=5)
      break
    except ConnectionRefusedError:
      time.sleep(0.05)
  connection.sendall(content)
  return connection


@pytest.mark.parametrize('order', [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_all_go_when_the_last_has_come(call, address, order):
  futures = []
  for process_id in order:
    time.sleep(0.15)
    assert not any(future.done() for future in futures)
    futures.append(call(address, 4, process_id))
  assert [future.result(timeout=3) for future in futures] == [None] * 4


def test_the_port_is_free_at_once_for_whoever_comes_next(call, port, address):
  futures = [call(address, 3, process_id) for process_id in range(3)]
  concurrent.futures.wait(futures)
  # Without SO_REUSEADDR a connection that lingers would be in the way.
  with socket.socket() as server:
    server.bind(('', port))


def test_who_is_missing_is_named_everywhere_in_time(call, address):
  begin = time.monotonic()
  futures = [call(address, 5, i, timeout_seconds=1.0) for i in (0, 1, 3)]
  sentences = refusals(futures, Unavailable)
  assert 0.9 < time.monotonic() - begin < 2.5
  assert set(sentences) == {
      f'expected 5 processes at {address} within 1 s, found no process 2, 4; '
      f'there are 0 on {HOST}, 1 on {HOST}, 3 on {HOST}; start what is '
      f'missing, or see why it cannot reach that address'
  }


def test_nobody_waits_longer_than_its_own_timeout(call, address):
  begin = time.monotonic()
  futures = [call(address, 3, 0, 30.0), call(address, 3, 1, 1.0)]
  first, second = refusals(futures, Unavailable)
  assert first == second and 'found no process 2;' in first
  assert time.monotonic() - begin < 2.5


def test_a_missing_process_0_is_named_with_its_address(call, address):
  begin = time.monotonic()
  [sentence] = refusals([call(address, 3, 2, timeout_seconds=0.7)], Unavailable)
  assert 0.6 < time.monotonic() - begin < 2
  assert f'process 0 at {address} within 0.7 s' in sentence
  assert 'found Connection refused' in sentence
  assert f'process 2 on {HOST}' in sentence


def test_a_host_that_nobody_knows_is_named(call):
  [sentence] = refusals([call('no-host.invalid:5000', 2, 1, 0.3)], Unavailable)
  assert 'process 0 at no-host.invalid:5000' in sentence


def test_two_processes_of_one_id_are_found_at_once(call, address):
  begin = time.monotonic()
  futures = [call(address, 4, process_id) for process_id in (0, 2, 2)]
  assert set(refusals(futures, UserError)) == {
      f'expected every process to have an id of its own, found process 2 on '
      f'{HOST} and process 2 on {HOST}; mend --process_id, or end what is left '
      f'of another run'
  }
  assert time.monotonic() - begin < 5


def test_two_numbers_of_processes_are_found_at_once(call, address):
  begin = time.monotonic()
  futures = [call(address, 3, 0), call(address, 4, 1)]
  assert set(refusals(futures, UserError)) == {
      f'expected the same number of processes everywhere, found 3 for process '
      f'0 on {HOST} and 4 for process 1 on {HOST}; give all the same '
      f'--num_processes'
  }
  assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    'rubbish',
    [
        b'',
        b'GET / HTTP/1.1\r\n\r\n',
        b'\x16\x03\x01\x00\xff\xfe\n',
        b'[]\n',
        b'x' * 10_000,
        hello_line(1, 3, greeting='hello'),
        hello_line(7, 3),
        hello_line('1', 3),
        hello_line(True, 3),
        hello_line(1, 3, host=5),
        hello_line(1, 3, float('nan')),
        hello_line(1, 3, 'long'),
        hello_line(1, 3, more=1),
        hello_line(1, 3)[:-30],
    ],
    ids=lambda content: content[:60].decode(errors='replace'),
)
def test_strangers_are_ignored(call, port, address, rubbish):
  first = call(address, 2, 0)
  with speak(port, rubbish):
    second = call(address, 2, 1)
    assert [x.result(timeout=5) for x in (first, second)] == [None, None]


@pytest.mark.parametrize('resets', [False, True])
def test_a_process_that_was_ended_may_come_again(call, port, address, resets):
  first = call(address, 3, 0)
  connection = speak(port, hello_line(1, 3))
  # Closed with this, the other side reads an error in place of the end.
  linger = struct.pack('ii', resets, 0)
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
  time.sleep(0.2)
  connection.close()
  time.sleep(0.2)
  futures = [first, call(address, 3, 1), call(address, 3, 2)]
  assert [future.result(timeout=5) for future in futures] == [None] * 3


def test_what_a_process_says_besides_is_not_heard(call, port, address):
  first = call(address, 3, 0)
  with speak(port, hello_line(1, 3)) as connection:
    time.sleep(0.2)
    connection.sendall(hello_line(2, 3))
    time.sleep(0.2)
    assert not first.done()
    second = call(address, 3, 2)
    assert [x.result(timeout=9) for x in (first, second)] == [None, None]
    answer = connection.makefile().readline()
  assert json.loads(answer)['fault'] is None


def test_another_program_at_the_address_is_told_from_process_0(call, port):
  answers = [b'HTTP/1.1 400 Bad Request\r\n', b'{"fault": null}\n', b'']
  found = []
  for answer in answers:
    with socket.create_server(('127.0.0.1', port)) as server:

      def serve(server=server, answer=answer):
        while True:
          try:
            connection, _ = server.accept()
          except OSError:
            return
          with connection:
            connection.recv(4096)
            connection.sendall(answer)

      thread = threading.Thread(target=serve, daemon=True)
      thread.start()
      [sentence] = refusals([call(f'127.0.0.1:{port}', 2, 1, 0.5)], Unavailable)
      server.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=5)
    found.append(sentence)
  assert 'found another program' in found[0]
  assert 'found another program' in found[1]
  assert 'found that it hung up' in found[2]


def test_a_silent_program_at_the_address_keeps_nobody(call, port):
  begin = time.monotonic()
  with socket.create_server(('127.0.0.1', port)):
    [sentence] = refusals([call(f'127.0.0.1:{port}', 2, 1, 0.5)], Unavailable)
  assert 'found timed out' in sentence
  assert time.monotonic() - begin < 0.5 + roll_call._GRACE + 1


def test_a_port_that_stays_taken_is_named(call, port, address, monkeypatch):
  monkeypatch.setattr(roll_call, '_PORT_PATIENCE', 0.5)
  with socket.create_server(('', port)):
    [sentence] = refusals([call(address, 2, 0)], Unavailable)
  assert f'listen on port {port} of {HOST}' in sentence
  assert 'Address already in use' in sentence


def test_a_port_that_is_given_free_is_waited_for(call, port, address):
  with socket.create_server(('', port)):
    futures = [call(address, 2, 0), call(address, 2, 1)]
    time.sleep(0.5)
  assert [future.result(timeout=5) for future in futures] == [None, None]


def test_addresses_of_ipv6_work(call, port):
  try:
    with socket.create_server(('::1', 0), family=socket.AF_INET6):
      pass
  except OSError:
    pytest.skip('this host has no IPv6')
  futures = [call(f'[::1]:{port}', 2, process_id) for process_id in (0, 1)]
  assert [future.result(timeout=5) for future in futures] == [None, None]


def test_hosts_without_ipv6_listen_too(call, port, monkeypatch):
  monkeypatch.setattr(socket, 'has_dualstack_ipv6', lambda: False)
  futures = [call(f'127.0.0.1:{port}', 2, i) for i in (0, 1)]
  assert [future.result(timeout=5) for future in futures] == [None, None]


@pytest.mark.parametrize(
    'address',
    ['', 'host', 'host:', ':80', 'host:0', 'host:65536', 'host:x', '::1:80',
     '[::1]', 'http://host:80'],
)  # fmt: skip
def test_what_is_no_address_is_refused(address):
  with pytest.raises(UserError, match='host:port.*mend --coordinator_address'):
    Place(address, 2, 1)


@pytest.mark.parametrize('place', [(2, 2), (2, -1), (0, 0)])
def test_a_process_id_is_one_of_those_there_are(place):
  with pytest.raises(UserError, match='process id from 0'):
    Place('host:80', *place)


def test_a_place_knows_host_and_port():
  assert (Place('a.b:80', 2, 0).host, Place('a.b:80', 2, 0).port) == ('a.b', 80)
  place = Place('[fd00::2]:8476', 2, 0)
  assert (place.host, place.port) == ('fd00::2', 8476)


def test_long_lists_are_cut():
  hosts = {process_id: f'h{process_id}' for process_id in range(40)}
  sentence = absence(Place('a:80', 60, 0), hosts, 300.0)
  assert 'within 300 s, found no process 40, 41, ' in sentence
  assert '55 and 4 more; there are 0 on h0, ' in sentence
  assert '15 on h15 and 24 more;' in sentence


def test_whoever_fits_contradicts_nobody():
  hosts = {0: 'a', 3: 'b'}
  assert contradiction(Hello(2, 5, 'b', 1.0), 5, hosts) is None
  assert 'process 0 on c' in contradiction(Hello(0, 5, 'c', 1.0), 5, hosts)


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.binary() | st.text().map(str.encode))
def test_no_line_breaks_the_reading(line):
  assert parse_hello(line) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


@hypothesis.given(
    st.sampled_from(
        ['greeting', 'process_id', 'num_processes', 'host', 'seconds_left']
    ),
    JSON,
)
def test_only_what_a_process_would_say_is_believed(key, value):
  said = json.loads(hello_line(1, 3)) | {key: value}
  hello = parse_hello(json.dumps(said).encode())
  if hello is not None:
    said.pop('greeting')
    assert hello == Hello(**said)
    Place('a:80', hello.num_processes, hello.process_id)
