"""Tests of the package as a whole: what is installed, and what it costs."""

import ast
import configparser
import pathlib
import subprocess
import sys

import pytest

import codet5p_jax
from codet5p_jax import gin_paths

PACKAGE = pathlib.Path(codet5p_jax.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob('*.py'))
# Python files that are data: exported folders get copies.
CARRIED = PACKAGE / 'conversion' / 'huggingface'
# Gone from JAX, or about to go.
DEPRECATED = {
    'pjit', 'pmap', 'xmap', 'soft_pmap', 'host_callback', 'maps',
    'PositionalSharding', 'linear_util',
}
HEAVY = (
    'tensorflow', 'tensorflow_datasets', 'torch', 'transformers', 'seqio',
    'gin', 'grain', 'matplotlib',
)
# What a notebook imports to use the networks and to train them.
LIGHT = (
    'codet5p_jax.models.t5',
    'codet5p_jax.layers.attention',
    'codet5p_jax.losses',
    'codet5p_jax.decoding.beam_search',
    'codet5p_jax.decoding.sampler',
    'codet5p_jax.objectives.causal_lm',
    'codet5p_jax.objectives.sequence_to_sequence',
    'codet5p_jax.planning.parameters',
    'codet5p_jax.training.train_step',
    'codet5p_jax.trained_model',
)


def name_of(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).as_posix()


def imported_by(statement: str) -> set[str]:
  """What a fresh interpreter has imported after a statement."""
  finished = subprocess.run(
      [sys.executable, '-c',
       f'import sys\n{statement}\nprint(*sorted(sys.modules))'],
      cwd=ROOT, text=True, capture_output=True, check=False,
  )
  assert finished.returncode == 0, finished.stderr
  return set(finished.stdout.split())


@pytest.fixture(scope='module')
def setup():
  parser = configparser.ConfigParser()
  assert parser.read(ROOT / 'setup.cfg')
  return parser


def lines(option: str) -> list[str]:
  return [x for x in option.splitlines() if x and not x.startswith('#')]


def test_every_package_is_installed(setup):
  folders = {path.parent for path in MODULES} - {CARRIED}
  assert all((folder / '__init__.py').is_file() for folder in folders)
  on_disk = {name_of(folder).replace('/', '.') for folder in folders}
  declared = lines(setup['options']['packages'])
  assert sorted(declared) == declared
  assert set(declared) == on_disk | {'codet5p_jax.gin_files'}
  # A folder of this name would be taken instead of the one that is mapped.
  assert not (PACKAGE / 'gin_files').exists()


def test_every_gin_file_is_installed(setup):
  folder = dict(
      line.split(' = ') for line in lines(setup['options']['package_dir'])
  )['codet5p_jax.gin_files']
  patterns = lines(setup['options.package_data']['codet5p_jax.gin_files'])
  installed = {p for x in patterns for p in (ROOT / folder).glob(x)}
  on_disk = {p for p in (ROOT / folder).rglob('*') if p.is_file()}
  assert installed == on_disk
  assert len(on_disk) == len(gin_paths.shipped())


def test_carried_code_is_installed_and_is_no_package(setup):
  [pattern] = lines(setup['options.package_data']['codet5p_jax.conversion'])
  installed = set(CARRIED.parent.glob(pattern))
  # Without this file, import-linter and coverage do not look at the folder.
  assert not (CARRIED / '__init__.py').exists()
  assert installed == {p for p in CARRIED.iterdir() if p.suffix}
  assert {p.suffix for p in installed} == {'.py'}
  imported = imported_by('import codet5p_jax.conversion.remote_code')
  assert not imported & set(HEAVY)


def test_the_command_is_the_main_function(setup):
  [command] = lines(setup['options.entry_points']['console_scripts'])
  assert command == 'codet5p = codet5p_jax.main:main'


def test_networks_and_training_import_nothing_heavy():
  imported = imported_by(f'import {", ".join(LIGHT)}')
  assert set(LIGHT) <= imported
  assert not imported & set(HEAVY)


def test_a_file_of_events_imports_nothing_heavy(tmp_path):
  (tmp_path / 'torch.py').touch()  # Whether it is installed or not.
  imported = imported_by(
      'import importlib.util, pathlib\n'
      f'sys.path.insert(0, {str(tmp_path)!r})\n'
      'from codet5p_jax.training.event_file import EventFile\n'
      f'EventFile(pathlib.Path({str(tmp_path)!r}), 0).close()\n'
      'assert importlib.util.find_spec("torch")'
  )
  assert 'tensorboardX' in imported
  assert not imported & set(HEAVY)


def test_importing_a_network_costs_little_more_than_jax_and_flax():
  def seconds(statement: str) -> float:
    # Of the processor, so that what else this machine does counts less.
    code = f'import time, {statement}; print(time.process_time())'
    command = [sys.executable, '-c', code]
    return float(subprocess.check_output(command, cwd=ROOT))

  pairs = [
      (seconds('codet5p_jax.models.t5'), seconds('jax, flax')) for _ in range(3)
  ]
  ours, theirs = map(min, zip(*pairs, strict=True))
  assert ours <= 1.3 * theirs


def test_modules_are_short_and_say_what_they_are():
  for path in MODULES:
    text = path.read_text()
    assert text.count('\n') <= 600, path
    is_empty = path.name == '__init__.py' and not text
    assert is_empty or ast.get_docstring(ast.parse(text)), path


def test_nothing_deprecated_is_used():
  for path in MODULES:
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Name):
        used.add(node.id)
      elif isinstance(node, ast.Attribute):
        used.add(node.attr)
      elif isinstance(node, ast.alias):
        used.update(node.name.split('.'))
    assert not used & DEPRECATED, path
