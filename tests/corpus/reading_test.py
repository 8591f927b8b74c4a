import pathlib

import pytest

from codet5p_jax.corpus.reading import ReadUnit, read_documents, whole_folder
from codet5p_jax.corpus.source_files import LANGUAGES, SourceFile
from codet5p_jax.corpus.sources import plan_units
from codet5p_jax.corpus.splits import origin_key
from codet5p_jax.corpus.units import PlannedFile, Unit
from codet5p_jax.errors import UserError

CONTENTS = {
    'a.py': b'a = "\xc3\xa9\xe2\x80\xa8"\r\nb\x0c\n',
    'vendor/b.py': b'b = 1\n',
    'c.go': b'c\n' * 2**20,
    'd.c': b'\0',
    'e.java': b'class E {}\n',
    'f.rb': b'// @generated\n',
}


def planned(path: pathlib.Path, shown: str) -> PlannedFile:
  size = path.stat().st_size if path.exists() else 1
  return PlannedFile(str(path), shown, 'some-pkg', 'mit', size, 0)


@pytest.fixture
def unit(tmp_path):
  for name, content in CONTENTS.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
  files = tuple(planned(tmp_path / name, name) for name in CONTENTS)
  return Unit('files', files[0].path, 1, files=files)


def test_files_that_pass_are_left_with_their_keys(unit, tmp_path):
  reading = ReadUnit(str(tmp_path / 'work'), tuple(LANGUAGES), ('mit',))
  reading(4, unit)
  python = SourceFile(
      CONTENTS['a.py'].decode(), 'python', 'mit', 'some-pkg', 'a.py'
  )
  java = SourceFile('class E {}\n', 'java', 'mit', 'some-pkg', 'e.java')
  found = list(read_documents(reading.folder(4)))
  assert found == [python, java]
  assert [file.hash for file in found] == [python.hash, java.hash]
  keys = reading.keys(4)
  assert keys['characters'].tolist() == [len(python.text), len(java.text)]
  assert keys['origin'].tolist() == [origin_key('some-pkg')] * 2
  assert [
      f'{high:016x}{low:016x}' for high, low, *_ in keys.tolist()
  ] == [python.hash[:32], java.hash[:32]]
  assert reading.summary(4)['dropped'] == {
      'python': {'vendored': 1},
      'go': {'oversized': 1},
      'c': {'binary': 1},
      'ruby': {'generated': 1},
  }


def test_languages_that_are_not_wanted_are_no_drops(unit, tmp_path):
  reading = ReadUnit(str(tmp_path / 'work'), ('java',), ('mit',))
  reading(0, unit)
  assert [f.language for f in read_documents(reading.folder(0))] == ['java']
  assert reading.summary(0)['dropped'] == {}


def test_a_file_that_grew_since_it_was_planned_is_not_read_whole(tmp_path):
  path = tmp_path / 'a.py'
  path.write_bytes(b'x = 1\n')
  file = planned(path, 'a.py')
  path.write_bytes(b'x = 1\n' * 2**20)
  reading = ReadUnit(str(tmp_path / 'work'), tuple(LANGUAGES), ('mit',))
  reading(0, Unit('files', str(path), 1, files=(file,)))
  assert reading.summary(0)['dropped'] == {'python': {'oversized': 1}}


def test_a_name_that_is_not_utf_8_is_shown_as_far_as_it_can_be(tmp_path):
  path = tmp_path / '\udcff.py'
  path.write_bytes(b'x = 1\n')
  reading = ReadUnit(str(tmp_path / 'work'), tuple(LANGUAGES), ('mit',))
  [unit] = plan_units([str(tmp_path)])
  reading(0, unit)
  [file] = read_documents(reading.folder(0))
  assert (file.path, file.origin) == ('?.py', '?')


def test_a_file_that_is_gone_is_one_clear_line(tmp_path):
  file = planned(tmp_path / 'gone.py', 'gone.py')
  reading = ReadUnit(str(tmp_path / 'work'), tuple(LANGUAGES), ('mit',))
  with pytest.raises(UserError, match='gone.py, found: No such file') as error:
    reading(0, Unit('files', file.path, 1, files=(file,)))
  assert '\n' not in str(error.value)
  # Nothing half-made is left.
  assert not list((tmp_path / 'work' / 'read').iterdir())


def test_of_two_that_make_the_same_folder_the_first_wins(tmp_path):
  target = tmp_path / 'work' / '0'
  with whole_folder(target) as first:
    with whole_folder(target) as second:
      (first / 'who').write_text('first')
      (second / 'who').write_text('second')
    assert (target / 'who').read_text() == 'second'
  assert (target / 'who').read_text() == 'second'
  assert list(target.parent.iterdir()) == [target]
