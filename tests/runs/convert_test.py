"""Tests of the command `convert`; conversion/ has those of what it does."""

import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import huggingface_hub
import pytest

from codet5p_jax import main
from codet5p_jax.conversion.sources import open_source
from codet5p_jax.errors import UserError
from codet5p_jax.runs import convert as module
from codet5p_jax.runs.convert import convert
from tests.conversion.conftest import MODELS, random_folder

ROOT = pathlib.Path(main.__file__).parents[1]


@pytest.fixture
def make_folder(tmp_path):
  """See `random_folder`."""
  return functools.partial(random_folder, tmp_path)


def to_ours(source, tmp_path):
  convert(str(source), str(tmp_path / 'ours'))
  return tmp_path / 'ours'


def test_what_is_there_is_never_overwritten(make_folder, tmp_path):
  source = make_folder('t5').write()
  (tmp_path / 'ours').mkdir()
  with pytest.raises(UserError, match='no folder at .*ours, found that it ex'):
    to_ours(source, tmp_path)
  assert not os.listdir(tmp_path / 'ours')


def test_a_source_that_is_none_is_told(tmp_path, capsys):
  def fails(*argv):
    assert main.main(['convert', *argv, str(tmp_path / 'ours')]) == 2
    return capsys.readouterr().err

  assert '--from_hub' in fails('Salesforce/codet5p-220m')
  assert 'expected a folder' in fails(str(tmp_path / 'nowhere'))
  (tmp_path / 'empty').mkdir()
  assert 'config.json of a run' in fails(str(tmp_path / 'empty'))
  assert os.listdir(tmp_path) == ['empty']


@pytest.mark.parametrize(
    ('form', 'weights'),
    [('safetensors', 'model.safetensors'), ('bin', 'pytorch_model.bin')],
)
def test_a_name_of_the_hub_is_downloaded_when_asked(
    make_folder, tmp_path, monkeypatch, form, weights
):
  hub, cache = make_folder('codegen', 'hub').write(form), tmp_path / 'cache'
  # The same weights in other formats, which are left there.
  (hub / 'tf_model.h5').touch()
  (hub / 'pytorch_model.bin').touch()

  def download(name, allow_patterns):
    if name != 'some/model':
      raise ValueError('no\nsuch model')
    # As that of the hub: what is there already stays there.
    for pattern in allow_patterns:
      for path in hub.glob(pattern):
        copy = cache / path.relative_to(hub)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return str(cache)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  convert('some/model', str(tmp_path / 'ours'), from_hub=True)
  assert open_source(tmp_path / 'ours').model == MODELS['codegen']
  assert sorted(os.listdir(cache)) == ['config.json', weights]
  # A vocabulary of our own comes along.
  (hub / 'vocabulary').mkdir()
  (hub / 'vocabulary' / 'sentencepiece.model').touch()
  folder = module._download('some/model')
  assert (folder / 'vocabulary' / 'sentencepiece.model').exists()
  with pytest.raises(UserError, match='ValueError: no such model') as error:
    convert('other/model', str(tmp_path / 'other'), from_hub=True)
  assert '\n' not in str(error.value)


def test_a_killed_conversion_leaves_nothing_that_looks_whole(
    make_folder, tmp_path
):
  source = make_folder('codegen').write()
  target = tmp_path / 'ours'
  code = '''
import os, sys, time
from codet5p_jax.conversion import to_ours
from codet5p_jax.runs.convert import convert
compare = to_ours.compare_modules
def wait(*arguments):
  open(sys.argv[3], 'w').close()
  time.sleep(600)
to_ours.compare_modules = wait
convert(sys.argv[1], sys.argv[2])
'''
  ready = tmp_path / 'ready'
  process = subprocess.Popen(
      [sys.executable, '-c', code, str(source), str(target), str(ready)],
      cwd=ROOT, env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )  # fmt: skip
  try:
    while not ready.exists():
      assert process.poll() is None
      time.sleep(0.1)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  left = set(os.listdir(tmp_path)) - {'theirs', 'ready'}
  assert left == {'ours.partial'}
  # Again, it succeeds, and what was left is gone.
  convert(str(source), str(target))
  assert set(os.listdir(tmp_path)) == {'theirs', 'ready', 'ours'}


def test_the_report_tells_what_was_done(make_folder, tmp_path, caplog):
  folder = make_folder('codegen')
  with caplog.at_level('INFO', 'codet5p_jax'):
    to_ours(folder.write(), tmp_path)
  count = sum(tensor.size for tensor in folder.tensors.values())
  assert re.search(
      rf'Converted .*theirs to .*ours: {count:,} parameters. Largest '
      r'difference of a module: \d\.\de-0\d\.', caplog.text
  )  # fmt: skip
  assert 'has no tokenizer files' in caplog.text
