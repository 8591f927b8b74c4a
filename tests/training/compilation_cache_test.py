import errno
import logging
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from codet5p_jax.training.compilation_cache import (
    telling_of_compilation,
    using_compilation_cache,
)

# One CPU device; prints the bits of a result.
PROGRAM = """
import logging, pathlib, sys
import jax
from codet5p_jax.training import compilation_cache
logging.basicConfig(level=logging.INFO, format='%(message)s')
with compilation_cache.using_compilation_cache(pathlib.Path(sys.argv[1])):
  with compilation_cache.telling_of_compilation('the product'):
    x = jax.numpy.linspace(0, 1, 35).reshape(5, 7)
    y = jax.jit(lambda x: jax.numpy.sin(x @ x.T).sum())(x)
print(float(y).hex())
"""


@pytest.fixture
def asked(monkeypatch):
  """Asks for a folder, as JAX_COMPILATION_CACHE_DIR does; None for none."""
  before = jax.config.jax_compilation_cache_dir

  def ask(folder):
    jax.config.update('jax_compilation_cache_dir', folder and str(folder))

  yield ask
  ask(before)


@pytest.fixture
def tpu(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')


def kept_in(default):
  with using_compilation_cache(default):
    return jax.config.jax_compilation_cache_dir


def messages(caplog):
  return [record.getMessage() for record in caplog.records]


def run(folder, default):
  """Runs the program on one device, which is told to keep all programs."""
  environment = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      **({'JAX_COMPILATION_CACHE_DIR': str(folder)} if folder else {}),
  }
  return subprocess.run(
      [sys.executable, '-c', PROGRAM, str(default)],
      env=environment,
      capture_output=True,
      text=True,
      check=True,
  )


def test_a_second_process_takes_the_program_from_the_folder(tmp_path):
  first, second = (run(tmp_path / 'kept', tmp_path / 'run') for _ in range(2))
  assert 'Compiled the product in ' in first.stderr
  assert 'Took the product from the cache in ' in second.stderr
  assert first.stdout == second.stdout != ''
  assert not (tmp_path / 'run').exists()


def test_programs_go_into_the_run_and_nowhere_else_afterwards(
    asked, tpu, tmp_path
):
  asked(None)
  assert kept_in(tmp_path / 'run' / 'a') == str(tmp_path / 'run' / 'a')
  assert jax.config.jax_compilation_cache_dir is None
  assert kept_in(tmp_path / 'run' / 'b') == str(tmp_path / 'run' / 'b')
  assert not list((tmp_path / 'run' / 'a').iterdir())


@pytest.mark.parametrize('folder', ['here', 'gs://bucket/programs'])
def test_a_folder_that_is_asked_for_comes_first(asked, tpu, tmp_path, folder):
  folder = folder if '://' in folder else str(tmp_path / folder)
  asked(folder)
  assert kept_in(tmp_path / 'run') == folder
  assert not (tmp_path / 'run').exists()


def test_cpus_keep_nothing_unasked(asked, tmp_path, caplog):
  asked(None)
  assert kept_in(tmp_path / 'run') is None
  assert not list(tmp_path.iterdir()) and not caplog.records


def test_several_cpu_devices_keep_nothing_and_say_so_when_asked(
    asked, tmp_path, caplog
):
  asked(tmp_path / 'kept')
  assert kept_in(tmp_path / 'run') is None
  assert messages(caplog) == [
      f'No compiled programs are kept in {tmp_path}/kept: it is not possible '
      f'on CPUs with 8 devices.'
  ]
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'kept')


def test_a_file_in_the_way_is_one_line(asked, tpu, tmp_path, caplog):
  asked(None)
  (tmp_path / 'run').write_text('')
  assert kept_in(tmp_path / 'run') is None
  assert messages(caplog) == [
      f'No compiled programs are kept, since {tmp_path}/run cannot be '
      f'written: a file is in the way.'
  ]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    asked, tpu, tmp_path, caplog, monkeypatch
):
  def fill(path, content):
    path.touch()
    raise OSError(errno.ENOSPC, 'full')

  asked(None)
  monkeypatch.setattr(pathlib.Path, 'write_bytes', fill)
  assert kept_in(tmp_path / 'run') is None
  assert messages(caplog) == [
      f'No compiled programs are kept, since {tmp_path}/run cannot be '
      f'written: No space left on device.'
  ]
  assert not list((tmp_path / 'run').iterdir())


def test_what_is_not_in_the_cache_is_told_as_compiled(caplog):
  with caplog.at_level(logging.INFO):
    with telling_of_compilation('the sum'):
      jax.jit(lambda x: x + 11)(jnp.ones(13)).block_until_ready()
  [message] = messages(caplog)
  assert message.startswith('Compiled the sum in ')


def test_only_the_first_process_tells(caplog, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with caplog.at_level(logging.INFO), telling_of_compilation('the sum'):
    pass
  assert not caplog.records
