"""The roll call before several processes become one program.

Where a host is missing, JAX's own start ends the others after a while and does
not say which it waited for. So every process first tells process 0 who it is,
at the very address where JAX is going to listen, and process 0 answers all of
them alike: that all are there, or what is wrong, in one sentence.

A line of JSON goes each way. Whoever connects and says anything else is no
process of this run and is left standing.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import selectors
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from codet5p_jax.errors import Unavailable, UserError

_logger = logging.getLogger(__name__)

# What a first line must carry to be one of ours, and how long it may be. A
# sentence that names many hosts is longer.
_GREETING = 'codet5p_jax roll call'
_LONGEST_HELLO = 2**12
_LONGEST_ANSWER = 2**16

# Seconds between attempts to reach process 0, and for each of them.
_PAUSE = 0.2
_CONNECTING = 2.0

# Process 0 answers at the deadline of whoever waits shortest: its line is given
# so many seconds to arrive, and those who got it as many to hang up.
_GRACE = 2.0

# Seconds in which a run that was just ended gives its port free.
_PORT_PATIENCE = 10.0

# Processes that may connect at the same moment.
_BACKLOG = 1024

# Processes named in a message; a pod has hundreds.
_NAMED = 16


@dataclasses.dataclass(frozen=True)
class Place:
  """The place of a process among all.

  Attributes:
    coordinator_address: host:port, [IPv6]:port or name:port of process 0.
    num_processes: of the whole program.
    process_id: from 0 on.

  Raises:
    UserError: they are none.
  """

  coordinator_address: str
  num_processes: int
  process_id: int

  def __post_init__(self):
    host, _, port = self.coordinator_address.rpartition(':')
    # Without brackets the port could as well be the last group of the address.
    is_clear = ':' not in host or (host.startswith('[') and host.endswith(']'))
    if not host or not is_clear or not _is_port(port):
      raise UserError(
          f'expected a coordinator address host:port, such as 10.0.0.2:8476 or '
          f'[fd00::2]:8476, found {self.coordinator_address!r}; mend '
          f'--coordinator_address'
      )
    if not 0 <= self.process_id < self.num_processes:
      raise UserError(
          f'expected a process id from 0 to one less than the number of '
          f'processes, found {self.process_id} of {self.num_processes}; mend '
          f'--process_id or --num_processes'
      )

  @property
  def host(self) -> str:
    return self.coordinator_address.rpartition(':')[0].strip('[]')

  @property
  def port(self) -> int:
    return int(self.coordinator_address.rpartition(':')[2])


@dataclasses.dataclass(frozen=True)
class Hello:
  """What a process says of itself.

  Attributes:
    process_id: its own.
    num_processes: as it was told.
    host: the name of its host.
    seconds_left: until it gives up.
  """

  process_id: int
  num_processes: int
  host: str
  seconds_left: float


# Of its fields, in JSON.
_KINDS = {
    'process_id': int,
    'num_processes': int,
    'host': str,
    'seconds_left': float,
}


def call_roll(place: Place, timeout_seconds: float) -> None:
  """Returns, in all processes at about the same time, when all are there.

  No process waits longer than its timeout: at the first one's end process 0
  tells all who came.

  Args:
    place: of this process.
    timeout_seconds: to wait at most, and a second or two for the answer.

  Raises:
    Unavailable: some did not come, in time; process 0 cannot listen, or cannot
      be reached.
    UserError: two have the same id; they were told different numbers of
      processes. Who came reads the same sentence.
  """
  if place.process_id == 0:
    _listen(place, timeout_seconds)
  else:
    _report(place, timeout_seconds)


def parse_hello(line: bytes) -> Hello | None:
  """Reads a process's first line; None where it comes from a stranger."""
  said = _parse(line)
  if said is None or said.pop('greeting', None) != _GREETING:
    return None
  kinds = {key: type(value) for key, value in said.items()}
  if kinds != _KINDS or not math.isfinite(said['seconds_left']):
    return None
  hello = Hello(**said)
  is_place = 0 <= hello.process_id < hello.num_processes
  return hello if is_place else None


def contradiction(
    hello: Hello, num_processes: int, hosts: Mapping[int, str]
) -> str | None:
  """What is wrong with another process, given those that are there.

  Args:
    hello: of that process.
    num_processes: as process 0 was told.
    hosts: {process id: host} of those that are there.

  Returns:
    A sentence for the user, None where it is welcome.
  """
  newcomer = f'process {hello.process_id} on {hello.host}'
  if hello.num_processes != num_processes:
    return (
        f'expected the same number of processes everywhere, found '
        f'{num_processes} for process 0 on {hosts[0]} and '
        f'{hello.num_processes} for {newcomer}; give all the same '
        f'--num_processes'
    )
  if hello.process_id in hosts:
    return (
        f'expected every process to have an id of its own, found {newcomer} '
        f'and process {hello.process_id} on {hosts[hello.process_id]}; mend '
        f'--process_id, or end what is left of another run'
    )
  return None


def absence(
    place: Place, hosts: Mapping[int, str], timeout_seconds: float
) -> str:
  """Says who did not come.

  Args:
    place: of process 0.
    hosts: {process id: host} of those that came.
    timeout_seconds: that a process waits.
  """
  missing = [i for i in range(place.num_processes) if i not in hosts]
  came = [f'{i} on {host}' for i, host in sorted(hosts.items())]
  return (
      f'expected {place.num_processes} processes at '
      f'{place.coordinator_address} within {timeout_seconds:g} s, found no '
      f'process {_listed(missing)}; there are {_listed(came)}; start what is '
      f'missing, or see why it cannot reach that address'
  )


def _listen(place: Place, timeout_seconds: float) -> None:
  """Process 0's part; see `call_roll`."""
  with (
      _open_port(place) as server,
      contextlib.closing(_Doorkeeper(place, server, timeout_seconds)) as keeper,
  ):
    fault = keeper.wait()
    keeper.answer(fault)
  if fault is not None:
    raise fault


@dataclasses.dataclass
class _Caller:
  """Whoever has connected."""

  address: str
  received: bytes = b''
  hello: Hello | None = None


class _Doorkeeper:
  """Knows who has connected to process 0; owns their connections."""

  def __init__(
      self, place: Place, server: socket.socket, timeout_seconds: float
  ):
    self._place = place
    self._timeout_seconds = timeout_seconds
    self._deadline = time.monotonic() + timeout_seconds
    self._hosts = {0: socket.gethostname()}
    self._selector = selectors.DefaultSelector()
    server.setblocking(False)
    self._server = server
    self._selector.register(server, selectors.EVENT_READ)

  def close(self) -> None:
    for connection, _ in self._callers():
      connection.close()
    self._selector.close()

  def wait(self) -> UserError | None:
    """Waits for all; returns what is wrong, None if nothing is."""
    while len(self._hosts) < self._place.num_processes:
      left = self._deadline - time.monotonic()
      if left <= 0:
        return Unavailable(
            absence(self._place, self._hosts, self._timeout_seconds)
        )
      for key, _ in self._selector.select(left):
        if key.fileobj is self._server:
          self._let_in()
        elif fault := self._hear(key.fileobj, key.data):
          return UserError(fault)
    return None

  def answer(self, fault: UserError | None) -> None:
    """Tells those who came; `fault` is None where all did."""
    present = [
        connection for connection, caller in self._callers() if caller.hello
    ]
    answer = _line({
        'greeting': _GREETING,
        'fault': None if fault is None else str(fault),
        'may_come': isinstance(fault, Unavailable),
    })
    for connection in present:
      with contextlib.suppress(OSError):
        connection.settimeout(_GRACE)
        connection.sendall(answer)
    # They hang up first: connections that process 0 closes would linger at the
    # port on which JAX is going to listen.
    deadline = time.monotonic() + _GRACE
    for connection in present:
      with contextlib.suppress(OSError):
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        connection.recv(1)

  def _callers(self) -> Iterator[tuple[socket.socket, _Caller]]:
    for key in list(self._selector.get_map().values()):
      if key.fileobj is not self._server:
        yield key.fileobj, key.data

  def _let_in(self) -> None:
    with contextlib.suppress(OSError):  # Gone again.
      connection, address = self._server.accept()
      connection.setblocking(False)
      self._selector.register(
          connection, selectors.EVENT_READ, _Caller(str(address[0]))
      )

  def _hear(self, connection: socket.socket, caller: _Caller) -> str | None:
    """Takes what a caller says; returns what is wrong with the run."""
    try:
      received = connection.recv(_LONGEST_HELLO)
    except OSError:
      received = b''
    if not received:
      self._dismiss(connection, caller)
      return None
    if caller.hello is not None:
      return None  # It has nothing more to say.
    caller.received += received
    line, end, _ = caller.received.partition(b'\n')
    if not end and len(line) < _LONGEST_HELLO:
      return None
    hello = parse_hello(line)
    if hello is None:
      _logger.warning(
          'Something at %s that is no process of this run has connected to '
          '%s; it is ignored.',
          caller.address,
          self._place.coordinator_address,
      )
      self._dismiss(connection, caller)
      return None
    caller.hello = hello  # It hears the answer, whatever that is.
    fault = contradiction(hello, self._place.num_processes, self._hosts)
    if fault is None:
      self._hosts[hello.process_id] = hello.host
      self._deadline = min(
          self._deadline, time.monotonic() + hello.seconds_left
      )
    return fault

  def _dismiss(self, connection: socket.socket, caller: _Caller) -> None:
    self._selector.unregister(connection)
    connection.close()
    if caller.hello is not None:  # It was ended; it may be started again.
      del self._hosts[caller.hello.process_id]


def _report(place: Place, timeout_seconds: float) -> None:
  """The part of all processes but 0; see `call_roll`."""
  deadline = time.monotonic() + timeout_seconds
  found = 'no answer'
  while (left := deadline - time.monotonic()) > 0:
    try:
      line = _ask(place, deadline)
    except OSError as error:
      found = error.strerror or str(error)
    else:
      answer = _parse(line)
      if answer is not None and answer.get('greeting') == _GREETING:
        if answer.get('fault') is None:
          return
        kind = Unavailable if answer.get('may_come') else UserError
        raise kind(str(answer['fault']))
      found = 'another program' if line else 'that it hung up'
    time.sleep(min(_PAUSE, left))
  raise Unavailable(
      f'expected process 0 at {place.coordinator_address} within '
      f'{timeout_seconds:g} s, found {found} (this is process '
      f'{place.process_id} on {socket.gethostname()}); start process 0 there, '
      f'or mend --coordinator_address or what blocks the way'
  )


def _ask(place: Place, deadline: float) -> bytes:
  """Tells process 0 who this is; returns its line, b'' where it hung up.

  Raises:
    OSError: it is not there, or silent.
  """
  left = deadline - time.monotonic()
  with socket.create_connection(
      (place.host, place.port), timeout=max(min(left, _CONNECTING), 0.01)
  ) as connection:
    hello = Hello(
        place.process_id,
        place.num_processes,
        socket.gethostname(),
        deadline - time.monotonic(),
    )
    connection.sendall(
        _line({'greeting': _GREETING, **dataclasses.asdict(hello)})
    )
    received = b''
    while b'\n' not in received and len(received) < _LONGEST_ANSWER:
      left = deadline + _GRACE - time.monotonic()
      connection.settimeout(max(left, 0.01))
      more = connection.recv(2**12)
      if not more:
        return b''
      received += more
  return received.partition(b'\n')[0]


def _open_port(place: Place) -> socket.socket:
  """Listens on all addresses of this host, as JAX is going to.

  Raises:
    Unavailable: the port is taken, or not for this user.
  """
  deadline = time.monotonic() + _PORT_PATIENCE
  while True:
    try:
      if socket.has_dualstack_ipv6():
        return socket.create_server(
            ('', place.port),
            family=socket.AF_INET6,
            backlog=_BACKLOG,
            dualstack_ipv6=True,
        )
      return socket.create_server(('', place.port), backlog=_BACKLOG)
    except OSError as error:
      is_taken = error.errno == errno.EADDRINUSE
      if not is_taken or time.monotonic() > deadline:
        raise Unavailable(
            f'expected to listen on port {place.port} of '
            f'{socket.gethostname()}, as process 0, found: '
            f'{os.strerror(error.errno)}; end the program that has it, or give '
            f'all processes a --coordinator_address with another port'
        ) from error
    time.sleep(_PAUSE)


def _is_port(text: str) -> bool:
  return text.isdecimal() and 0 < int(text) < 2**16


def _line(content: Mapping[str, Any]) -> bytes:
  return json.dumps(content).encode() + b'\n'


def _parse(line: bytes) -> dict[str, Any] | None:
  """A JSON object; None for anything else."""
  try:
    content = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return content if isinstance(content, dict) else None


def _listed(entries: Sequence[Any]) -> str:
  """Returns "0, 2, 5 and 7 more"."""
  words = ', '.join(map(str, entries[:_NAMED]))
  more = len(entries) - _NAMED
  return f'{words} and {more} more' if more > 0 else words
