import gzip
import json

import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.tasks.problem_files import Row, read_problems, read_rows

ROWS = [{'task_id': 3, 'a': 'é\u2028'}, {'task_id': '4', 'a': '\r'}]
LINES = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in ROWS)


@pytest.mark.parametrize('suffix', ['', '.gz'])
@pytest.mark.parametrize(
    'text',
    [LINES, LINES[:-1], LINES.replace('\n', '\r\n\n'), json.dumps(ROWS),
     '\n ' + json.dumps(ROWS, indent=2)],
    ids=['lines', 'no last end', 'blank lines', 'array', 'indented array'],
)  # fmt: skip
def test_rows_are_read_from_lines_and_arrays(tmp_path, text, suffix):
  path = tmp_path / f'rows.json{suffix}'
  content = text.encode()
  path.write_bytes(gzip.compress(content) if suffix else content)
  rows = read_rows(str(path))
  assert [row.fields for row in rows] == ROWS
  assert rows == read_problems(str(path), 'a')


def test_a_row_knows_its_place(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('{}\n\n{"a": 1}\n')
  assert [row.number for row in read_rows(str(path))] == [1, 3]
  path.write_text('[{}, {"a": 1}]')
  assert read_rows(str(path))[1].place == f'row 2 of {path}'


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('{"a": 1}\n{"a": \n', r'JSON in row 2 of .*rows\.jsonl, found .*"a":'),
        ('{}\n\n7\n', r'a JSON object in row 3 of .*found 7'),
        ('{}\n"' + 'x' * 999 + '"', 'in row 2 .*found "x{59};'),
        ('{}\n' + '[' * 100_000, 'JSON in row 2'),
        ('[{}, 1]', 'a JSON object in row 2 of .*found 1'),
        ('[{}, {}', 'a JSON array in .*found something else'),
        ('', 'found an empty file'),
        ('\n \n', 'found an empty file'),
        ('[]', 'found an empty file'),
    ],
    ids=range(9),
)
def test_what_is_no_json_object_is_one_clear_line(tmp_path, text, expected):
  path = tmp_path / 'rows.jsonl'
  path.write_text(text)
  with pytest.raises(UserError, match=expected) as error:
    read_rows(str(path))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('content', [b'{}\n\xff\xfe{}\n', b'[{}, "\xff"]'])
def test_bytes_that_are_no_text_are_one_clear_line(tmp_path, content):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(content)
  with pytest.raises(UserError, match='expected .*JSON'):
    read_rows(str(path))


@pytest.mark.parametrize(
    'damage', [lambda b: b[:-9], lambda b: b'', lambda b: b'{}',
               lambda b: b[:12] + b'\xff' * 9 + b[21:]],
)  # fmt: skip
def test_a_damaged_archive_is_one_clear_line(tmp_path, damage):
  path = tmp_path / 'rows.jsonl.gz'
  path.write_bytes(damage(gzip.compress(LINES.encode() * 9)))
  with pytest.raises(UserError, match='expected') as error:
    read_rows(str(path))
  assert '\n' not in str(error.value)


def test_a_file_that_is_not_there_is_one_clear_line(tmp_path):
  with pytest.raises(UserError, match='No such file or directory; check'):
    read_rows(str(tmp_path / 'rows.jsonl'))
  with pytest.raises(UserError, match='Is a directory; check'):
    read_rows(str(tmp_path))


@pytest.mark.parametrize(
    ('rows', 'expected'),
    [
        ([{'task_id': 'x', 'a': ''}, {'task_id': 'y', 'a': ''},
          {'task_id': 'x', 'a': ''}], 'found x in rows 1 and 3; remove one'),
        # Samples name their problem by its text.
        ([{'task_id': 3, 'a': ''}, {'task_id': '3', 'a': ''}], '3 in rows 1'),
        ([{'a': ''}], 'the field task_id, a text or a whole number, in row 1'),
        ([{'task_id': True, 'a': ''}], 'found task_id = True'),
        ([{'task_id': 1}], 'the field a, a text, in row 1 .*only task_id'),
        ([{'task_id': 1, 'a': None}], 'found a = None'),
    ],
)  # fmt: skip
def test_problems_have_an_id_of_their_own_and_their_texts(
    tmp_path, rows, expected
):
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps(rows))
  with pytest.raises(UserError, match=expected) as error:
    read_problems(str(path), 'a')
  assert '\n' not in str(error.value)


def test_a_field_of_an_empty_row_is_missed_in_words():
  with pytest.raises(UserError, match='found only an empty object'):
    Row(1, 'rows.jsonl', {}).text('a')
