"""Eight emulated devices, so that any test can build a real mesh."""

import dataclasses
import gc
import importlib.metadata
import json
import os
import sys

# Before anything imports JAX, which reads them once.
os.environ['JAX_PLATFORMS'] = 'cpu'
FLAGS = ' '.join([
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    # Most of a test's time is compilation: optimise less.
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    # Programs as small as these are not worth cutting into 32 modules.
    '--xla_cpu_parallel_codegen_split_count=1',
]).strip()
os.environ['XLA_FLAGS'] = FLAGS
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  # The older emitters compile in half the time; later versions have none.
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
CPU_FLAGS = os.environ['XLA_FLAGS']

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping._import_hook import _JaxtypingLoader

# The flags are read, and the TPU compiler refuses those that it does not know.
jnp.zeros(1).block_until_ready()
os.environ['XLA_FLAGS'] = FLAGS

# Tracing makes millions of small objects, and few that are garbage.
gc.freeze()
gc.set_threshold(200_000, 20, 100)

# Whole runs, and steps on several meshes: half of the time of all tests.
SLOW_FOLDERS = ('runs', 'training')


def pytest_configure():
  """Lets slipcover count the lines of modules that jaxtyping has rewritten.

  jaxtyping's import hook stands before slipcover's, which sees none of them.
  """
  if 'SLIPCOVER_ENABLED' not in os.environ:
    return
  sys.meta_path.sort(
      key=lambda finder: type(finder).__module__ != 'slipcover.importer'
  )
  # What is cached may be without jaxtyping's checks.
  _JaxtypingLoader.get_code = lambda loader, name: loader.source_to_code(
      loader.get_data(loader.path), loader.path
  )


def pytest_collection_modifyitems(items):
  """Begins with what is slow, so that no worker is left with it at the end."""
  items.sort(key=lambda item: item.path.parent.name not in SLOW_FOLDERS)


@pytest.fixture(scope='session')
def cpu_flags():
  """XLA's flags for other processes that compile for CPUs alone."""
  return CPU_FLAGS


def _random_parameters(model, seed=0):
  """Returns parameters that hide nothing, without compiling `init_params`.

  Initial weights would: all norms scale by one, queries are nearly zero, so
  attention is uniform, and a swap of two weights may go unseen.
  """
  shapes = jax.eval_shape(model.init_params, jax.random.key(0))
  numbers = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name == 'scale':
      values = numbers.uniform(0.5, 1.5, leaf.shape)
    elif name == 'value':  # A temperature.
      values = numbers.uniform(0.01, 0.4, leaf.shape)
    else:
      deviation = {'kernel': 0.3, 'bias': 0.3, 'embedding': 1.0}[name]
      values = numbers.normal(0, deviation, leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))


@pytest.fixture(scope='session')
def random_parameters():
  """See `_random_parameters(model, seed)`."""
  return _random_parameters


def _source_files():
  """Twelve packages of three files each, every one different."""
  from codet5p_jax.corpus.source_files import SourceFile

  names = ('alpha', 'beta', 'gamma', 'delta', 'epsilon', 'zeta', 'eta', 'theta')
  numbers = np.random.default_rng(0)

  def function(index):
    first, second, third = numbers.choice(names, 3)
    return (
        f'def {first}_{index}({second}, {third}=None):\n'
        f'  """Adds {second} to {third}, {index} times."""\n'
        f'  for number in range({index}):\n'
        f'    if {second}[number] is not {third}:\n'
        f'      return {first}({second} + {third} * {numbers.integers(99)})\n'
        f'  return {second}\n\n\n'
    )

  return [
      SourceFile(
          text=''.join(function(index) for index in range(2 + 5 * number)),
          language='python',
          licence='mit',
          origin=f'{name}-{origin}',
          path=f'{name}_{origin}/module_{number}.py',
      )
      for origin in range(4)
      for name in names[:3]
      for number in range(3)
  ]


@pytest.fixture(scope='session')
def source_files():
  return _source_files()


def _write_rows(path, files):
  """Writes source files as JSON lines."""
  lines = [json.dumps(dataclasses.asdict(file)) for file in files]
  path.write_text(''.join(line + '\n' for line in lines))
  return path


@pytest.fixture(scope='session')
def write_rows():
  """See `_write_rows(path, files)`."""
  return _write_rows


@pytest.fixture(scope='session')
def make_small_corpus(tmp_path_factory):
  """A function that makes a corpus of source files in a folder."""
  from codet5p_jax.corpus.build import CorpusSettings, build_corpus
  from codet5p_jax.corpus.executors import Processes

  def make(files, folder, executor=Processes(1), **settings):
    rows = tmp_path_factory.mktemp('sources') / 'rows.jsonl'
    settings = {
        'sources': (str(_write_rows(rows, files)),), 'vocab_size': 600
    } | settings
    return build_corpus(CorpusSettings(**settings), folder, None, executor)

  return make


@pytest.fixture(scope='session')
def paired_corpus(source_files, make_small_corpus, tmp_path_factory):
  """As `small_corpus`, with pairs of text and code."""
  folder = tmp_path_factory.mktemp('corpora') / 'paired'
  make_small_corpus(source_files, folder, pairs=True)
  return folder


@pytest.fixture(scope='session')
def small_corpus(source_files, make_small_corpus, tmp_path_factory):
  """A corpus folder, made as `prepare_corpus` makes one; not to be changed."""
  folder = tmp_path_factory.mktemp('corpora') / 'small'
  make_small_corpus(source_files, folder)
  return folder
