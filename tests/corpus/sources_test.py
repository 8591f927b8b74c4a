import json
import os

import pyarrow as pa
import pyarrow.parquet
import pytest

from codet5p_jax.corpus import units
from codet5p_jax.corpus.sources import plan_units
from codet5p_jax.corpus.tables import read_jsonl
from codet5p_jax.corpus.units import RowFields, archive_origin
from codet5p_jax.errors import UserError


def write(path, content=b'x = 1\n'):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)
  return path


def test_a_folder_is_read_in_order_with_its_folders_as_origins(tmp_path):
  for name in (
      'Two_Words/b.py', 'Two_Words/a/c.go', 'top.rb', 'one/x.JS', 'notes.txt',
      '.git/hook.py', 'one/__pycache__/y.py', 'one/.venv/z.py',
  ):  # fmt: skip
    write(tmp_path / name)
  (tmp_path / 'link.py').symlink_to(tmp_path / 'top.rb')
  [unit] = plan_units([str(tmp_path)])
  assert [(file.shown, file.origin) for file in unit.files] == [
      ('top.rb', 'top'),
      ('Two_Words/b.py', 'two-words'),
      ('Two_Words/a/c.go', 'two-words'),
      ('one/x.JS', 'one'),
  ]
  assert unit.size == sum(file.size for file in unit.files) == 24
  assert {file.licence for file in unit.files} == {'unknown'}


def test_a_large_folder_is_many_units(tmp_path, monkeypatch):
  for number in range(9):
    write(tmp_path / f'{number}.py', b'x' * 10)
  monkeypatch.setattr(units, 'FOLDER_UNIT_BYTES', 40)
  sizes = [len(unit.files) for unit in plan_units([str(tmp_path)])]
  assert sizes == [4, 4, 1]
  monkeypatch.setattr(units, 'FOLDER_UNIT_FILES', 3)
  assert [len(u.files) for u in plan_units([str(tmp_path)])] == [3, 3, 3]


@pytest.mark.parametrize(
    ('name', 'origin'),
    [
        ('lodash-4.17.21.tgz', 'lodash'),
        ('foo_1.2.orig.tar.xz', 'foo'),
        ('golang-1.19_1.19.8.orig.tar.gz', 'golang'),
        ('redis_7.0.15.orig.tar.gz', 'redis'),
        ('scikit_learn-1.5.0-cp311-cp311-linux_x86_64.whl', 'scikit_learn'),
        ('zope.interface-6.0.tar.gz', 'zope.interface'),
        ('babel-core-7.0.0-beta.1.tgz', 'babel-core'),
        ('main.zip', 'main'),
        ('7zip.zip', '7zip'),
        ('log4j2.tar.bz2', 'log4j2'),
        ('three-v0.160.0.ZIP', 'three'),
    ],
)
def test_an_archive_is_named_after_its_package(name, origin):
  assert archive_origin(name) == origin


def test_archives_and_tables_of_a_glob_are_units(tmp_path):
  write(tmp_path / 'Some_Pkg-1.0.whl')
  write(tmp_path / 'a.jsonl', b'{"text": "x"}\n')
  write(tmp_path / 'b.jsonl.gz')
  write(tmp_path / 'notes.txt')
  write(tmp_path / 'folder' / 'x.py')
  pyarrow.parquet.write_table(pa.table({'text': ['x']}), tmp_path / 'c.parquet')
  found = plan_units([f'{tmp_path}/*'])
  assert [(unit.kind, os.path.basename(unit.path)) for unit in found] == [
      ('archive', 'Some_Pkg-1.0.whl'),
      ('jsonl', 'a.jsonl'),
      ('jsonl', 'b.jsonl.gz'),
      ('parquet', 'c.parquet'),
      ('files', 'x.py'),
  ]
  assert found[0].origin == 'some-pkg'
  assert [unit.part for unit in found[1:4]] == [(0, 14), None, (0, 1)]
  assert all(unit.modified for unit in found[:4])


def test_a_long_table_is_many_units_that_cover_it(tmp_path, monkeypatch):
  path = write(tmp_path / 'a.jsonl', json.dumps({'text': 'x' * 80}).encode())
  monkeypatch.setattr(units, 'TABLE_UNIT_BYTES', 40)
  found = plan_units([str(path)])
  assert [unit.part for unit in found] == [(0, 40), (40, 80), (80, 92)]
  assert [unit.size for unit in found] == [40, 40, 12]


def test_an_empty_table_is_a_unit_without_rows(tmp_path):
  [unit] = plan_units([str(write(tmp_path / 'a.jsonl', b''))])
  assert (unit.part, unit.size) == (None, 0)
  assert not list(read_jsonl(unit))


def test_an_address_names_the_fields(tmp_path):
  write(tmp_path / 'a rows.txt')
  query = (
      'field=code&language=C%2B%2B&origin_field=repo&licence_field=license'
      '&path_field=file&language_field=lang'
  )
  expected = RowFields('code', 'repo', 'license', 'file', 'lang', 'cpp')
  [unit] = plan_units([f'jsonl://{tmp_path}/a%20rows.txt?{query}'])
  assert (unit.kind, unit.fields) == ('jsonl', expected)
  assert unit.path == str(tmp_path / 'a rows.txt')
  write(tmp_path / 'b rows.txt')
  assert len(plan_units([f'jsonl://{tmp_path}/*.txt?{query}'])) == 2


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  write(tmp_path / 'code' / 'a.py')
  assert len(plan_units(['~/code'])) == 1


@pytest.mark.parametrize(
    ('source', 'match'),
    [
        ('standard_libary', "'standard_libary'; did you mean standard_library"),
        ('{}/nowhere', 'found .*nowhere.; check the path'),
        ('{}/notes.txt', 'found .*notes.txt.; check the path'),
        ('{}/*.nothing', 'expected files that .* names, found none'),
        ('{}/*.txt', 'expected source files .* found none; archives and'),
        ('{}/empty', 'expected source files of python.* found none; archives'),
        ('jsonl://{}/nowhere?field=a', 'expected files that .* names'),
        ('jsonl://{}/notes.txt?feild=a', 'found feild; did you mean field?'),
        ('jsonl://{}/notes.txt?zzzz=a', 'found zzzz; did you mean field?'),
        ('jsonl://{}/notes.txt?field=', 'expected a value for field'),
        ('gs://bucket/code', 'mount the bucket'),
        ('https://a/b.zip', 'expected a source on a mounted file system'),
        ('parquet://{}/notes.txt', 'expected a whole table in .*notes.txt'),
    ],
)
def test_what_is_no_source_is_one_clear_line(tmp_path, source, match):
  write(tmp_path / 'notes.txt')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match=match) as error:
    plan_units([source.format(tmp_path)])
  assert '\n' not in str(error.value)


def test_a_folder_that_cannot_be_read_is_one_clear_line(tmp_path, monkeypatch):
  write(tmp_path / 'a.py')

  def refuse(path):
    raise PermissionError(13, 'Permission denied', str(path))

  monkeypatch.setattr(os, 'scandir', refuse)
  with pytest.raises(UserError, match='found: Permission denied; check'):
    plan_units([str(tmp_path)])
