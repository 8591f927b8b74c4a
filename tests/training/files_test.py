import errno
import json
import os

import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.training.files import (
    UnreadableFile,
    read_json,
    write_json,
    write_text,
)


def test_json_comes_back_with_its_version_checked(tmp_path):
  write_json(tmp_path / 'a.json', {'x': [1, None]})
  assert json.loads((tmp_path / 'a.json').read_text())['format_version'] == 1
  assert read_json(tmp_path / 'a.json') == {'x': [1, None]}
  with pytest.raises(ValueError, match='itself'):
    write_json(tmp_path / 'a.json', {'format_version': 1})


@pytest.mark.parametrize('text', ['', '{"x": ', '[1]', '{}', '\x00\xff'])
def test_unreadable_json_is_named(tmp_path, text):
  (tmp_path / 'a.json').write_text(text)
  with pytest.raises(UnreadableFile, match=f'{tmp_path}/a.json') as raised:
    read_json(tmp_path / 'a.json')
  assert '\n' not in str(raised.value)


def test_missing_and_newer_json_are_the_users_errors(tmp_path):
  with pytest.raises(UserError, match='found none'):
    read_json(tmp_path / 'a.json')
  (tmp_path / 'a.json').write_text('{"format_version": 2}')
  with pytest.raises(UserError, match='1 or older .* found 2; update'):
    read_json(tmp_path / 'a.json')


def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch):
  write_text(tmp_path / 'a', 'old')

  def fail(_):
    raise OSError(errno.ENOSPC, 'ignored')

  monkeypatch.setattr(os, 'fsync', fail)
  with pytest.raises(OSError):
    write_text(tmp_path / 'a', 'new')
  assert (tmp_path / 'a').read_text() == 'old'
  assert os.listdir(tmp_path) == ['a']
