"""Several processes as one program: one on each host of a pod.

Every process is started by the same command. `join` brings them together,
`agree` finds one that runs something else, and `failing_together` keeps a fault
of one from leaving the others waiting for ever.
"""

import atexit
import collections
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import codet5p_jax
from codet5p_jax.errors import Unavailable, UserError
from codet5p_jax.training.roll_call import Place, call_roll

_logger = logging.getLogger(__name__)

# All processes are there when JAX starts: this is for its own greetings.
_JAX_START_SECONDS = 60

# At its exit a process waits for the others; then JAX ends it, with a status
# that says nothing.
_SHUTDOWN_SECONDS = 40

# Before that, so that a process keeps the status with which it exits.
_LEAVE_SECONDS = 25

# Given to a process to find by itself that another has ended, and to end.
_ORDERLY_SECONDS = 10

# Where a process that cannot go on says why.
_LAST_WORDS = 'codet5p_jax/last_words'
_LISTEN_SECONDS = 2.0

_leaving = threading.Event()

# Held by the thread that takes leave: what others find broken by then, such as
# a barrier, is none of their business.
_departure = threading.Lock()

# Before a fault that may be gone when all start again.
_MAY_PASS = '~'

# Of a digest that is exchanged.
_DIGITS = 16

# What one process tells the others has a fixed size.
_TEXT_BYTES = 2**12

# Whose versions decide what is computed.
_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')

# Of JAX, which an environment variable may change on one host.
_SETTINGS = (
    'jax_default_matmul_precision',
    'jax_default_prng_impl',
    'jax_enable_x64',
    'jax_threefry_partitionable',
)


def join(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout_seconds: float = 300.0,
) -> None:
  """Makes this process one of several, once all of them are there.

  Must come before anything that makes JAX look for devices. Does nothing where
  there is one process, and nothing when called again.

  Where nothing is given, JAX says whether this host is one of several: under
  Slurm and Open MPI, in Kubernetes and on Cloud TPU, where it also finds the
  hosts of further slices (MEGASCALE_*). JAX_COORDINATOR_PORT then chooses the
  port.

  Args:
    coordinator_address: host:port of process 0, which all hosts can reach.
    num_processes: of the whole program.
    process_id: of this process, from 0 on.
    timeout_seconds: to wait for the others.

  Raises:
    UserError: some of the first three are given and others are not; JAX cannot
      find out; or as `call_roll`, which names the hosts that are missing.
  """
  if jax.distributed.is_initialized():
    return
  given = {
      '--coordinator_address': coordinator_address,
      '--num_processes': num_processes,
      '--process_id': process_id,
  }
  if num_processes == 1 and process_id in (None, 0):
    return
  if all(value is None for value in given.values()):
    place = _detect_place(timeout_seconds)
  elif missing := [flag for flag, value in given.items() if value is None]:
    raise UserError(
        f'expected {", ".join(given)} together or none of them, found no '
        f'{" and no ".join(missing)}; give what is missing'
    )
  else:
    place = Place(coordinator_address, num_processes, process_id)
  if place is None or place.num_processes == 1:
    return
  call_roll(place, timeout_seconds)
  jax.distributed.initialize(
      place.coordinator_address,
      place.num_processes,
      place.process_id,
      initialization_timeout=_JAX_START_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
  )
  listening = threading.Thread(
      target=_listen, args=(_state().client,), name='listening', daemon=True
  )
  listening.start()

  def stop_listening() -> None:
    _leaving.set()
    listening.join()

  atexit.register(stop_listening)  # Before JAX takes leave.
  _logger.info(
      'This is process %d of %d, on %s.',
      place.process_id,
      place.num_processes,
      socket.gethostname(),
  )
  if place.process_id:  # What all do, the first one tells.
    logging.getLogger('codet5p_jax').setLevel(logging.WARNING)


def leave(status: int, last_words: str = '', trace: str = '') -> None:
  """Takes leave of the other processes; the last thing that a process does.

  Returns at once where there is one process, and otherwise once all have come
  here. With last words the others come soon, see `_listen`, and this ends the
  process. It also does where they do not come: JAX would, with a status that
  says nothing.

  Args:
    status: with which this process exits, and so do others that it ends.
    last_words: why this one cannot go on, for the others to print; nothing if
      they know that it is time to end.
    trace: printed before this process is ended here.
  """
  with _departure:
    if not jax.distributed.is_initialized():
      return
    _leaving.set()
    if last_words:
      words = {
          'process': _state().process_id,
          'host': socket.gethostname(),
          'status': status,
          'words': last_words[:_TEXT_BYTES],
      }
      client = _state().client
      try:
        client.key_value_set(_LAST_WORDS, json.dumps(words))
      except jax.errors.JaxRuntimeError:
        # Another process was first, or cannot be reached any more.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
          first = json.loads(client.key_value_try_get(_LAST_WORDS))
          if trace:  # A bug, or what comes of waiting for that process.
            status, trace = first['status'], _retold(first)
    if not _shut_down() or last_words:
      # Threads may be waiting for the others still, which would be waited for.
      sys.stderr.write(trace)
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)


def _shut_down() -> bool:
  """Waits for the others, but not for ever; says whether they came."""
  farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  farewell.start()
  farewell.join(_LEAVE_SECONDS)
  return not farewell.is_alive()


def _retold(said: Mapping[str, Any]) -> str:
  """The last words of another process."""
  return (
      # After the progress bar.
      f'\ncodet5p: expected process {said["process"]} on {said["host"]} to go '
      f'on, found that it could not: {said["words"]}\n'
  )


def _listen(client: Any) -> None:
  """Waits for the last words of another process; the work of a thread.

  The main thread may be waiting for that process, for ever, in a computation.
  Where it is not, it gets to hear in its own way, and to end in order.
  """
  # Asks again and again: a thread that waits in C++ when Python ends takes the
  # process down.
  while not _leaving.wait(_LISTEN_SECONDS):
    try:
      said = client.key_value_try_get(_LAST_WORDS)
    except jax.errors.JaxRuntimeError as error:
      if 'NOT_FOUND' in str(error):
        continue
      return  # All is over.
    if _leaving.wait(_ORDERLY_SECONDS):
      return
    with _departure:
      if _leaving.is_set():
        return
      told = json.loads(said)
      sys.stderr.write(_retold(told))
      sys.stderr.flush()
      _shut_down()
      os._exit(told['status'])  # The main thread may be waiting still.


def _state() -> Any:
  # Private: JAX has no other place for a word between processes that does not
  # need all of them.
  from jax._src import distributed

  return distributed.global_state


def agree(name_to_digest: Mapping[str, str]) -> None:
  """Checks that all processes were given the same things.

  Every process calls it at the same point. One process agrees with itself.

  Args:
    name_to_digest: {what it is: a text that stands for it}, such as
      {'program': program_digest(), 'data': a fingerprint}.

  Raises:
    UserError: something differs. All processes raise the same sentence, which
      names what differs and where it is not as in most processes.
  """
  if jax.process_count() == 1:
    return
  digests = {
      name: hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
      for name, text in name_to_digest.items()
  }
  said = json.dumps({'host': socket.gethostname(), 'digests': digests})
  if len(said.encode()) > _TEXT_BYTES:
    raise ValueError(f'too many things to agree upon: {sorted(digests)}')
  found = disagreement([json.loads(text) for text in gather_texts(said)])
  if found is not None:
    raise UserError(found)


def disagreement(processes: Sequence[Mapping]) -> str | None:
  """Says in what processes differ, and which; None if in nothing.

  Args:
    processes: by process id, {'host': name, 'digests': {what: text}}.
  """
  names = {name: None for said in processes for name in said['digests']}
  found = []
  for name in names:
    digests = [said['digests'].get(name) for said in processes]
    # Of equally many, those that process 0 is one of.
    [(usual, _)] = collections.Counter(digests).most_common(1)
    others = [
        f'{process_id} ({said["host"]})'
        for process_id, said in enumerate(processes)
        if digests[process_id] != usual
    ]
    if others:
      found.append(f'another {name} in process {", ".join(others)}')
  if not found:
    return None
  return (
      f'expected the same program, settings and files in all {len(processes)} '
      f'processes, found {"; ".join(found)}; start all alike'
  )


def program_digest() -> str:
  """What runs here: versions, and a digest of this package's own sources."""
  package = Path(codet5p_jax.__file__).parent
  sources = hashlib.sha256()
  for path in sorted(package.rglob('*.py')):
    content = path.read_bytes()
    name = path.relative_to(package).as_posix()
    sources.update(f'{name} {len(content)}\n'.encode())
    sources.update(content)
  return ', '.join([
      f'codet5p_jax {codet5p_jax.__version__}',
      *(f'{name} {importlib.metadata.version(name)}' for name in _LIBRARIES),
      *(f'{name} {getattr(jax.config, name)}' for name in _SETTINGS),
      f'sources {sources.hexdigest()}',
  ])


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """What fails within, in one process, fails in all.

  Otherwise the others would wait for it at the next thing that they do
  together. So all wait here for all, at the end; nothing within may need the
  other processes, and what the devices compute should be finished
  (`jax.block_until_ready`): on CPUs the two may wait for one another. Used for
  what a host does alone, such as reading files.

  Raises:
    UserError: another process failed; names it. The one that failed raises its
      own error. Of `Unavailable`, or a bug, the others raise `Unavailable`.
  """
  if jax.process_count() == 1:
    yield
    return
  try:
    yield
  except Exception as error:
    is_mistake = isinstance(error, UserError)
    kind = '' if is_mistake else f'{type(error).__name__}: '
    # A launcher that starts one again must start all again.
    may_pass = isinstance(error, Unavailable) or not is_mistake
    gather_texts(
        f'{_MAY_PASS if may_pass else ""}{socket.gethostname()} could not go '
        f'on: {kind}{error}'
    )
    raise
  for process_id, fault in enumerate(gather_texts('')):
    if fault:
      words = f'process {process_id} on {fault.removeprefix(_MAY_PASS)}'
      kind = Unavailable if fault.startswith(_MAY_PASS) else UserError
      raise kind(words)


def on_first_process(action: Callable[[], object]) -> None:
  """Does what one process does for all; see `failing_together`."""
  with failing_together():
    if jax.process_index() == 0:
      action()


def as_first_process(value: Any) -> Any:
  """The value, one of JSON, that process 0 gave; every process calls it.

  For what is read from a folder and decides what all do together: network file
  systems may show hosts different things.
  """
  return json.loads(gather_texts(json.dumps(value))[0])


def wait_for_all() -> None:
  """Waits until every process has come here.

  So none takes leave while another still writes what they saved together.
  """
  gather_texts('')


def gather_texts(text: str) -> list[str]:
  """The texts of all processes, by process id; those over 4 KiB are cut.

  Every process calls it at the same point.
  """
  if jax.process_count() == 1:
    return [text]
  content = text.encode()[:_TEXT_BYTES]
  row = np.zeros(_TEXT_BYTES, np.uint8)
  row[: len(content)] = np.frombuffer(content, np.uint8)
  return [
      bytes(other).rstrip(b'\0').decode(errors='ignore')
      for other in np.asarray(multihost_utils.process_allgather(row))
  ]


def _detect_place(timeout_seconds: float) -> Place | None:
  """What the cluster that this process runs in says; None if it is in none.

  Raises:
    UserError: it is in one that says nothing clear.
  """
  try:
    # Private: `jax.distributed.initialize` finds the same, but tells nobody
    # before it waits for processes that may be missing.
    from jax._src.clusters import ClusterEnv

    with warnings.catch_warnings():
      # In a notebook's pod it advises to install something.
      warnings.simplefilter('ignore')
      address, num_processes, process_id, *_ = (
          ClusterEnv.auto_detect_unset_distributed_params(
              None, None, None, None, None, math.ceil(timeout_seconds)
          )
      )
  except Exception as error:  # Of web requests, of Kubernetes, of name servers.
    raise UserError(
        f'expected JAX {jax.__version__} to tell whether this is one of '
        f'several hosts, found {type(error).__name__}: {error}; give '
        f'--num_processes=1 if it is alone, otherwise --coordinator_address, '
        f'--num_processes and --process_id'
    ) from error
  if address is None or num_processes is None or process_id is None:
    return None
  return Place(address, num_processes, process_id)
