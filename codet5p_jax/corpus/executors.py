"""How a function is mapped over units: in processes, or on Apache Beam."""

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Sequence
from multiprocessing import connection
from typing import Protocol, runtime_checkable

import tqdm

from codet5p_jax.corpus.units import Unit
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.storage import StorageFault


@runtime_checkable
class UnitFunction(Protocol):
  """What is mapped: it writes its result to a folder of its own."""

  def folder(self, index: int) -> pathlib.Path:
    """Where the result of a unit appears once it is whole."""

  def __call__(self, index: int, unit: Unit) -> None:
    """Makes the result of a unit."""


@runtime_checkable
class Executor(Protocol):
  """Runs a function on all units that are not done."""

  def run(
      self, function: UnitFunction, units: Sequence[Unit], description: str
  ) -> None:
    """Returns when all are done; raises the first error."""


@dataclasses.dataclass(frozen=True)
class Processes:
  """Processes of this machine.

  Attributes:
    count: how many; None for one a core.
  """

  count: int | None = None

  def __post_init__(self):
    require_positive(processes=self.count)

  def run(
      self, function: UnitFunction, units: Sequence[Unit], description: str
  ) -> None:
    """Runs a function on all units that are not done.

    Raises:
      UserError: the function did, or a process was killed.
    """
    waiting = collections.deque(
        (index, unit)
        for index, unit in enumerate(units)
        if not function.folder(index).is_dir()
    )
    done = sum(unit.size for unit in units) - sum(u.size for _, u in waiting)
    count = min(self.count or _cores(), len(waiting))
    with tqdm.tqdm(
        desc=description,
        total=sum(unit.size for unit in units),
        initial=done,
        unit='B',
        unit_scale=True,
    ) as bar:
      if count > 1:
        _run_in_processes(function, waiting, count, bar)
        return
      for index, unit in waiting:
        function(index, unit)
        bar.update(unit.size)


def _cores() -> int:
  # Those that this process may use, where the system tells.
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _run_in_processes(
    function: UnitFunction,
    waiting: collections.deque[tuple[int, Unit]],
    count: int,
    bar: tqdm.tqdm,
) -> None:
  # Threads of libraries that are loaded here would not survive a fork.
  context = multiprocessing.get_context('spawn')
  pool = concurrent.futures.ProcessPoolExecutor(
      count, context, initializer=_follow_parent
  )
  before = multiprocessing.active_children()
  running = {}
  try:
    while waiting or running:
      # A short queue: units of a large plan are not all pickled at once.
      while waiting and len(running) < 2 * count:
        index, unit = waiting.popleft()
        running[pool.submit(function, index, unit)] = unit.size
      finished, _ = concurrent.futures.wait(
          running, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for future in finished:
        size = running.pop(future)
        future.result()
        bar.update(size)
  except BaseException as error:
    # What they would still do is not wanted; results appear whole or not.
    for process in set(multiprocessing.active_children()) - set(before):
      process.kill()
    if not isinstance(error, concurrent.futures.process.BrokenProcessPool):
      raise
    raise UserError(
        f'expected {count} processes to work to the end, found one killed, '
        f'probably for want of memory; run the same again to go on, with fewer '
        f'--processes'
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
  """Leaves Control-C to the parent, and ends when the parent is killed."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def watch():
    connection.wait([parent.sentinel])
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class Beam:
  """A runner of Apache Beam, whose workers share this file system.

  Attributes:
    runner: its name, such as DirectRunner or FlinkRunner.
  """

  runner: str

  def run(
      self, function: UnitFunction, units: Sequence[Unit], description: str
  ) -> None:
    """Runs a function on all units that are not done.

    Raises:
      UserError: the function did, Beam is not installed, or it has no such
        runner.
    """
    try:
      import apache_beam as beam
      from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
      raise UserError(
          "expected Apache Beam for --runner, found it not installed; run pip "
          "install 'codet5p_jax[beam]'"
      ) from error
    waiting = [
        (index, unit)
        for index, unit in enumerate(units)
        if not function.folder(index).is_dir()
    ]
    try:
      pipeline = beam.Pipeline(
          self.runner, PipelineOptions([], save_main_session=False)
      )
    except (ValueError, ImportError) as error:
      raise UserError(
          f'expected a runner of Apache Beam, found {self.runner!r}; set '
          f'--runner=DirectRunner or one of its documentation'
      ) from error
    tasks = (
        pipeline
        | f'{description}: units' >> beam.Create(waiting)
        | f'{description}: spread' >> beam.Reshuffle()
    )
    fault = function.folder(0).with_name('fault.json')
    fault.unlink(missing_ok=True)
    tasks | description >> beam.Map(_RecordingFaults(function, str(fault)))
    pipeline.run().wait_until_finish()
    if fault.exists():
      name, message = json.loads(fault.read_text())
      raise (StorageFault if name == 'StorageFault' else UserError)(message)


@dataclasses.dataclass(frozen=True)
class _RecordingFaults:
  """Keeps a user's error for the launcher, where Beam would make it a bug.

  Once there is one, the units that are left are passed over.
  """

  function: UnitFunction
  fault: str

  def __call__(self, task: tuple[int, Unit]) -> None:
    path = pathlib.Path(self.fault)
    if path.exists():
      return
    try:
      self.function(*task)
    except UserError as error:
      path.write_text(json.dumps([type(error).__name__, str(error)]))
