"""Compiled programs kept on disk: a run that starts again need not compile."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from tqdm.contrib.logging import logging_redirect_tqdm

from codet5p_jax.storage import storage_fault

_logger = logging.getLogger(__name__)

# JAX's; it is recorded for each program that was taken from the cache.
_HIT = '/jax/compilation_cache/cache_hits'


@contextlib.contextmanager
def using_compilation_cache(default: Path) -> Iterator[None]:
  """Keeps programs that take JAX more than a second to compile, and uses them.

  They are kept where JAX_COMPILATION_CACHE_DIR says, JAX's own variable, and
  else in `default`, a folder of the run: it outlives a machine that is taken
  away, all hosts see it (the first writes, all read), and programs are worth
  keeping for the run that made them, since sizes and learning rates are
  constants in them. JAX trusts what it finds there: who can write into the
  folder can run code here.

  On CPUs nothing is kept unless that variable asks for it: a program fits only
  the kind of CPU that it was made on, and on some kinds JAX refuses what it
  has kept itself, with errors that would alarm (its issue 38445). With several
  CPU devices, emulated ones or those of several processes, nothing is kept at
  all: JAX 0.10 was seen to abort when it took such programs from the cache.

  A folder that cannot be written is told in one line, and nothing is kept.
  What goes wrong later, JAX warns of, and compiles.
  """
  before = jax.config.jax_compilation_cache_dir
  _set(_folder(before, default))
  try:
    yield
  finally:
    _set(before)


@contextlib.contextmanager
def telling_of_compilation(what: str) -> Iterator[None]:
  """Logs how long a program took to compile, or to come from the cache.

  In runs of several processes the first one does.

  Args:
    what: names it, such as "the train step".
  """
  hits = 0

  def listen(event: str, **_) -> None:
    nonlocal hits
    hits += event == _HIT

  begin = time.monotonic()
  jax.monitoring.register_event_listener(listen)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_listener(listen)
  seconds = time.monotonic() - begin
  if jax.process_index() != 0:
    return
  with logging_redirect_tqdm():
    if hits:
      _logger.info('Took %s from the cache in %.1f s.', what, seconds)
    else:
      _logger.info('Compiled %s in %.1f s.', what, seconds)


def _folder(asked: str | None, default: Path) -> str | None:
  """Where programs are kept: None for nowhere, which may have to be told."""
  if jax.default_backend() == 'cpu':
    if not asked:
      return None
    if jax.device_count() > 1:
      _logger.warning(
          'No compiled programs are kept in %s: it is not possible on CPUs '
          'with %d devices.',
          asked,
          jax.device_count(),
      )
      return None
  folder = asked or str(default)
  if '://' in folder:
    return folder  # A bucket is JAX's to open.
  probe = Path(folder) / f'.writable.{os.getpid()}.{jax.process_index()}'
  try:
    probe.parent.mkdir(parents=True, exist_ok=True)
    try:
      probe.write_bytes(bytes(2**20))  # An empty file fits on a full disk.
    finally:
      probe.unlink(missing_ok=True)
  except OSError as error:
    _logger.warning(
        'No compiled programs are kept, since %s cannot be written: %s.',
        folder,
        storage_fault(error) or error,
    )
    return None
  return folder


def _set(folder: str | None) -> None:
  """Changes JAX's folder, also after it has opened another."""
  if folder != jax.config.jax_compilation_cache_dir:
    compilation_cache.set_cache_dir(folder)
    compilation_cache.reset_cache()
