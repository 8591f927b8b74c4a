import dataclasses
import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet
import pytest

from codet5p_jax.corpus.filters import MAX_FILE_BYTES, Dropped
from codet5p_jax.corpus.source_files import SourceFile
from codet5p_jax.corpus.tables import parquet_parts, read_jsonl, read_parquet
from codet5p_jax.corpus.units import RowFields, Unit
from codet5p_jax.errors import UserError

ROW = {
    'code': 'x = 1\n',
    'repo_name': 'Some/Thing_One',
    'path': 'a/b.py',
    'language': 'Python',
    'license': 'MIT',
    'size': 6,
}
FILE = SourceFile('x = 1\n', 'python', 'mit', 'some/thing-one', 'a/b.py')


def unit_of(path, **options):
  kind = 'parquet' if path.suffix == '.parquet' else 'jsonl'
  return Unit(kind, str(path), path.stat().st_size, **options)


@pytest.fixture
def read(tmp_path):
  """Writes rows to a table of some kind and reads them back."""

  def write_and_read(rows, kind='jsonl', **options):
    path = tmp_path / f'rows.{kind}'
    if kind == 'parquet':
      pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
      return list(read_parquet(unit_of(path, **options)))
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode()
             for r in rows]
    content = b'\n'.join(lines)
    path.write_bytes(
        gzip.compress(content) if kind.endswith('gz') else content
    )
    return list(read_jsonl(unit_of(path, **options)))

  return write_and_read


@pytest.mark.parametrize('kind', ['jsonl', 'jsonl.gz', 'parquet'])
def test_rows_with_the_usual_fields_are_understood(read, kind):
  assert read([ROW, ROW | {'code': 'y'}], kind) == [
      FILE, SourceFile('y', 'python', 'mit', 'some/thing-one', 'a/b.py')
  ]  # fmt: skip


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_fields_that_are_named_are_used(read, kind):
  row = {'a': 'z', 'b': 'o', 'c': ['MIT', 'ISC'], 'd': 'p.go', 'e': 'C++',
         'text': 'no', 'origin': 'no', 'language': 'no'}  # fmt: skip
  fields = RowFields('a', 'b', 'c', 'd', 'e')
  assert read([row], kind, fields=fields) == [
      SourceFile('z', 'cpp', 'isc and mit', 'o', 'p.go')
  ]
  fields = RowFields('a', 'b', 'c', 'd', fixed_language='ruby')
  assert read([row], kind, fields=fields)[0].language == 'ruby'


def test_what_a_row_does_not_say_is_unknown(read):
  assert read([{'text': 'x'}, {'content': 'y', 'path': 'a.java'}]) == [
      SourceFile('x', 'unknown', 'unknown', '', ''),
      SourceFile('y', 'java', 'unknown', '', 'a.java'),
  ]


@pytest.mark.parametrize(
    ('row', 'reason', 'detail'),
    [
        (b'{"text": ', 'bad_row', 'no JSON: Expecting value'),
        (b'[1]', 'bad_row', 'no JSON object'),
        (b'{"text": "\xff"}', 'bad_row', 'no JSON: UnicodeDecodeError'),
        (b'[' * 10**5, 'bad_row', 'no JSON: RecursionError'),
        ({'other': 1}, 'bad_row', 'no text'),
        ({'text': 7}, 'bad_row', 'text is no text'),
        ({'text': None}, 'bad_row', 'text is no text'),
        ({'text': ' '}, 'empty', ''),
        ({'text': 'a\0b'}, 'binary', ''),
        ({'text': '"\ud800"'}, 'not_utf8', ''),
        ({'text': 'x' * (MAX_FILE_BYTES + 1)}, 'oversized', ''),
        ({'text': 'x', 'path': 'vendor/a.c'}, 'vendored', ''),
    ],
)
def test_a_row_that_is_no_source_file_is_told(read, row, reason, detail):
  found = read([b'', ROW, row, ROW])
  assert found[0] == found[2] == FILE
  assert isinstance(found[1], Dropped)
  assert found[1].reason == reason and found[1].detail == detail
  assert found[1].number in (0, 3)


def test_a_field_that_is_named_and_not_there_is_told(read):
  [found] = read([ROW], fields=RowFields('source'))
  assert (found.reason, found.detail) == ('bad_row', 'no source')


@pytest.mark.parametrize('size', [1, 7, 60, 113, 200, 10_000])
def test_parts_of_a_file_hold_each_line_once(tmp_path, size):
  rows = [{'text': 'x' * number} for number in range(1, 40)]
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'\n'.join(json.dumps(row).encode() for row in rows))
  total = path.stat().st_size
  texts = []
  for begin in range(0, total, size):
    part = begin, min(begin + size, total)
    texts += [file.text for file in read_jsonl(unit_of(path, part=part))]
  assert texts == [row['text'] for row in rows]


@pytest.mark.parametrize('kind', ['jsonl', 'jsonl.gz'])
def test_a_very_long_line_is_passed_over_in_little_memory(tmp_path, kind):
  path = tmp_path / f'rows.{kind}'
  opened = gzip.open if kind.endswith('gz') else open
  with opened(path, 'wb') as file:
    file.write(b'{"text": "a"}\n{"text": "')
    # Not so uniform that it would pass for a bomb.
    block = bytes(range(97, 123)) * 40000 if kind == 'jsonl' else bytes(
        (i * i * 7919 >> 8) % 26 + 97 for i in range(2**20)
    )
    for _ in range(200 if kind == 'jsonl' else 40):
      file.write(block)
    file.write(b'"}\n{"text": "b"}\n')
  tracemalloc.start()
  first, long, last = read_jsonl(unit_of(path))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert (first.text, long.reason, last.text) == ('a', 'oversized', 'b')
  assert peak < 40 * 2**20


def test_parquet_is_cut_between_row_groups(tmp_path):
  path = tmp_path / 'rows.parquet'
  texts = [f'x = {number}\n' for number in range(70)]
  pyarrow.parquet.write_table(
      pa.table({'text': texts}), path, row_group_size=10
  )
  parts = list(parquet_parts(str(path), 300))
  assert len(parts) > 2
  assert parts[0][0] == 0 and parts[-1][1] == 7
  assert [end for _, end, _ in parts[:-1]] == [begin for begin, *_ in parts[1:]]
  found = []
  for begin, end, size in parts:
    assert size > 0
    found += read_parquet(unit_of(path, part=(begin, end)))
  assert [file.text for file in found] == texts


# Damage.


def expect_damage(match, read, *arguments):
  with pytest.raises(UserError, match=match) as error:
    list(read(*arguments))
  assert '\n' not in str(error.value)
  assert 'leave it out' in str(error.value)


@pytest.mark.parametrize('lost', [1, 8, 30, 'all'])
def test_a_gz_that_is_cut_short_is_one_clear_line(tmp_path, lost):
  path = tmp_path / 'rows.jsonl.gz'
  content = gzip.compress(json.dumps(ROW).encode() * 3)
  path.write_bytes(b'' if lost == 'all' else content[:-lost])
  expect_damage('whole table in .*rows.jsonl.gz', read_jsonl, unit_of(path))


@pytest.mark.parametrize('place', [0, 20, -8])
def test_a_gz_that_is_damaged_is_one_clear_line(tmp_path, place):
  path = tmp_path / 'rows.jsonl.gz'
  content = bytearray(gzip.compress(json.dumps(ROW).encode()))
  content[place] ^= 0xFF
  path.write_bytes(content)
  expect_damage('whole table in .*rows.jsonl.gz', read_jsonl, unit_of(path))


def test_a_gz_that_is_a_bomb_is_one_clear_line(tmp_path):
  path = tmp_path / 'rows.jsonl.gz'
  with gzip.open(path, 'wb') as file:
    for _ in range(80):
      file.write(b' ' * 2**20)
  with pytest.raises(UserError, match='at most 250 times its size'):
    list(read_jsonl(unit_of(path)))


def test_a_parquet_that_is_damaged_is_one_clear_line(tmp_path):
  path = tmp_path / 'rows.parquet'
  pyarrow.parquet.write_table(pa.Table.from_pylist([ROW] * 9), path)
  content = path.read_bytes()
  path.write_bytes(content[:-9])
  expect_damage('whole table in .*rows.parquet', read_parquet, unit_of(path))
  expect_damage('whole table in .*rows.parquet', parquet_parts, str(path), 1)


def test_a_table_that_is_gone_is_one_clear_line(tmp_path):
  unit = Unit('jsonl', str(tmp_path / 'rows.jsonl'), 3)
  expect_damage('No such file or directory', read_jsonl, unit)


# Rows of CodeSearchNet.

DOCUMENTED = {
    'repo': 'Some/Thing.One',
    'path': 'a/b.py',
    'func_name': 'A.f',
    'original_string': 'x = 1\n',
    'language': 'python',
    'docstring': 'Says it.',
    'partition': 'valid',
}


@pytest.mark.parametrize('kind', ['jsonl', 'jsonl.gz', 'parquet'])
def test_a_documented_row_is_read_with_what_it_tells(tmp_path, kind):
  path = tmp_path / f'rows.{kind}'
  if kind == 'parquet':
    pyarrow.parquet.write_table(pa.Table.from_pylist([DOCUMENTED]), path)
  else:
    content = json.dumps(DOCUMENTED).encode()
    path.write_bytes(gzip.compress(content) if kind.endswith('z') else content)
  reader = read_parquet if kind == 'parquet' else read_jsonl
  plain = SourceFile('x = 1\n', 'python', 'unknown', 'some/thing-one', 'a/b.py')
  assert list(reader(unit_of(path))) == [plain]
  assert list(reader(unit_of(path), with_documentation=True)) == [
      dataclasses.replace(
          plain, documentation='Says it.', name='A.f', partition='validation'
      )
  ]


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({'docstring': None}, {'documentation': ''}),
        ({'docstring': 'a\ud800'}, {'documentation': 'a?'}),
        ({'func_name': None}, {'name': ''}),
        ({'func_name': 7}, {'name': ''}),
        ({'func_name': '\ud800'}, {'name': '?'}),
        ({'partition': 'train'}, {'partition': 'train'}),
        ({'partition': 'test'}, {'partition': 'test'}),
        ({'partition': ['test']}, {'partition': ''}),
        ({'partition': None}, {'partition': ''}),
    ],
)
def test_odd_values_of_a_documented_row_are_read(tmp_path, changes, expected):
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps(DOCUMENTED | changes))
  [file] = read_jsonl(unit_of(path), with_documentation=True)
  for name, value in expected.items():
    assert getattr(file, name) == value


def test_a_docstring_that_is_no_text_makes_a_bad_row(tmp_path):
  path = tmp_path / 'rows.jsonl'
  rows = [DOCUMENTED, DOCUMENTED | {'docstring': 7}, {'code': 'y'}, {}]
  path.write_text('\n'.join(map(json.dumps, rows)))
  good, bad, plain, empty = read_jsonl(unit_of(path), with_documentation=True)
  assert good.name == 'A.f' and plain.documentation is None
  assert bad == Dropped('bad_row', 'python', 2, 'docstring is no text')
  assert empty.reason == 'bad_row' and empty.detail == 'no text'
