import json
import shutil

import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.checkpoints.verify import (
    BOOKKEEPING,
    CHECKSUMS,
    DamagedCheckpoint,
    complete_checksums,
    size_on_disk,
    verify,
    write_checksums,
)


@pytest.fixture
def folder(tmp_path):
  """A folder of three files with checksums."""
  folder = tmp_path / '5'
  (folder / 'inner').mkdir(parents=True)
  (folder / 'a').write_bytes(b'first')
  (folder / 'inner' / 'b').write_bytes(b'second')
  (folder / 'empty').write_bytes(b'')
  write_checksums(folder)
  return folder


def test_an_untouched_folder_passes(folder):
  verify(folder)
  verify(str(folder))


@pytest.mark.parametrize(
    ('damage', 'fault'),
    [
        (lambda f: (f / 'inner/b').unlink(), 'inner/b is missing'),
        (lambda f: (f / 'a').write_bytes(b'firs'), 'a has 4 bytes where 5'),
        (lambda f: (f / 'inner/b').write_bytes(b'sEcond'), 'inner/b has an'),
        (lambda f: (f / 'new').write_bytes(b''), 'new was not there'),
        (lambda f: (f / CHECKSUMS).unlink(), 'json is missing, so it is half'),
        (lambda f: (f / CHECKSUMS).write_text('{"fo'), 'json is unreadable'),
        (lambda f: (f / CHECKSUMS).write_text('[]'), 'json is unreadable'),
        (
            lambda f: (f / CHECKSUMS).write_text('{"format_version": 1}'),
            'json is unreadable',
        ),
        (
            lambda f: (f / CHECKSUMS).write_text(
                (f / CHECKSUMS).read_text().replace('sha256"', 'md5"', 1)
            ),
            'json is unreadable',
        ),
        (
            lambda f: ((f / 'a').unlink(), (f / 'a').symlink_to('nowhere')),
            'a file cannot be read',
        ),
        (lambda f: (shutil.rmtree(f), f.touch()), 'it is no folder'),
        (
            lambda f: (shutil.rmtree(f), f.symlink_to('nowhere')),
            'it is no folder',
        ),
    ],
)
def test_the_first_wrong_file_is_named(folder, damage, fault):
  damage(folder)
  with pytest.raises(DamagedCheckpoint, match=fault) as raised:
    verify(folder)
  assert isinstance(raised.value, UserError)
  assert str(raised.value).startswith(f'checkpoint {folder} is damaged: ')
  assert '\n' not in str(raised.value)


def test_every_file_of_a_step_is_covered(states, tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(7, states.make(frozen=False), {'row': 1}, {})
  folder = tmp_path / '7'
  names = {
      path.relative_to(folder).as_posix()
      for path in folder.rglob('*')
      if path.is_file()
  }
  listed = json.loads((folder / CHECKSUMS).read_text())['files']
  assert listed.keys() == names - {CHECKSUMS}
  assert names > BOOKKEEPING | {'cursor/metadata', 'metadata/metadata'}
  verify(folder)
  for name in sorted(listed):
    content = (folder / name).read_bytes()
    damaged = bytes([content[0] ^ 1]) + content[1:] if content else b'x'
    for change in (damaged, content[:-1], None):
      if change is None:
        (folder / name).unlink()
      elif change != content:
        (folder / name).write_bytes(change)
      with pytest.raises(DamagedCheckpoint, match=f'damaged: {name} '):
        verify(folder)
      (folder / name).write_bytes(content)
  verify(folder)


def test_bookkeeping_may_be_unlisted_but_not_changed_once_listed(folder):
  for name in BOOKKEEPING:
    (folder / name).write_text('of Orbax')
  verify(folder)
  complete_checksums(folder)
  verify(folder)
  name = min(BOOKKEEPING)
  (folder / name).write_text('of others')
  with pytest.raises(DamagedCheckpoint, match=name):
    verify(folder)


def test_checksums_being_rewritten_are_no_damage(folder):
  (folder / f'.{CHECKSUMS}.0123').write_text('{"form')
  verify(folder)


def test_a_newer_format_is_not_called_damage(folder):
  content = json.loads((folder / CHECKSUMS).read_text())
  (folder / CHECKSUMS).write_text(json.dumps({**content, 'format_version': 2}))
  with pytest.raises(UserError, match='found 2; update') as raised:
    verify(folder)
  assert not isinstance(raised.value, DamagedCheckpoint)


def test_a_folder_that_is_not_there_is_the_users_error(tmp_path):
  with pytest.raises(UserError, match='found no folder'):
    verify(tmp_path / 'none')


def test_the_size_on_disk_counts_every_file(folder):
  listed = sum(map(len, (b'first', b'second')))
  assert size_on_disk(folder) == listed + (folder / CHECKSUMS).stat().st_size
