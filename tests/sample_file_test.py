import errno
import json

import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.sample_file import open_sample_file

BATCHES = [[('a', 0), ('a', 1)], [('b', 0), ('b', 1)], [('c', 0)]]
SETTINGS = {'prompts': 'f00', 'temperature': 0.8, 'stop_strings': ('\n',)}


def rows(number):
  return [
      {
          'prompt_id': prompt_id,
          'sample': sample,
          'completion': f'\ud800 {number}',  # Half a character.
          'settings': SETTINGS,
      }
      for prompt_id, sample in BATCHES[number]
  ]


def fill(path, count=3):
  with open_sample_file(path, BATCHES, SETTINGS) as file:
    for number in range(file.batches_done, count):
      file.append(rows(number))


@pytest.fixture
def whole(tmp_path):
  path = tmp_path / 'whole.jsonl'
  fill(path)
  return path.read_bytes()


def test_a_file_cut_anywhere_ends_up_whole(tmp_path, whole):
  path = tmp_path / 'samples.jsonl'
  ends = [i for i, byte in enumerate(whole) if byte == ord('\n')]
  for size in sorted({0, 1, *ends, *(i + 1 for i in ends), len(whole) - 1}):
    path.write_bytes(whole[:size])
    with open_sample_file(path, BATCHES, SETTINGS) as file:
      lines = whole[:size].count(b'\n')
      # Of a batch of which a line is missing, all are made again.
      done = 3 if lines == 5 else lines // 2
      assert file.batches_done == done
    assert path.read_bytes().count(b'\n') == min(2 * done, 5)
    fill(path)
    assert path.read_bytes() == whole


def test_rows_are_json_whatever_the_text(whole):
  first = json.loads(whole.splitlines()[0])
  assert first['completion'] == '\ud800 0'


def test_a_second_writer_is_told(tmp_path):
  path = tmp_path / 'samples.jsonl'
  with open_sample_file(path, BATCHES, SETTINGS):
    with pytest.raises(UserError, match='found another `codet5p generate`'):
      fill(path)


@pytest.mark.parametrize(
    ('old', 'new', 'told'),
    [
        (b'"temperature": 0.8', b'"temperature": 0.2', 'another temperature'),
        (b'"prompts": "f00", ', b'', 'another prompts'),
        (b'"sample": 1', b'"sample": 2', 'found sample 2 of a'),
        (b'"prompt_id": "b"', b'"prompt_id": "x"', 'sample 0 of b in row 3'),
        (b'"settings"', b'"setting"', 'something else in row 1'),
        (b'{"prompt_id"', b'["prompt_id"', 'something else in row 1'),
        (b'"settings": {', b'"settings": 7, "x": {', 'something else in row 1'),
    ],
)
def test_a_file_of_something_else_is_told_and_left_alone(
    tmp_path, whole, old, new, told
):
  path = tmp_path / 'samples.jsonl'
  assert old in whole
  content = whole.replace(old, new)
  path.write_bytes(content)
  with pytest.raises(UserError, match=told):
    fill(path)
  assert path.read_bytes() == content


@pytest.mark.parametrize('content', [b'{"mine": 1}', b'x', b'\0\0'])
def test_a_file_of_another_kind_is_left_alone_without_an_end_of_line_too(
    tmp_path, content
):
  path = tmp_path / 'samples.jsonl'
  path.write_bytes(content)
  with pytest.raises(UserError, match='something else in row 1'):
    fill(path)
  assert path.read_bytes() == content


def test_what_is_no_plain_file_is_told(tmp_path):
  for path in ('/dev/null', tmp_path, tmp_path / 'samples.jsonl.gz'):
    with pytest.raises(UserError, match='expected a plain file for the samp'):
      fill(path)


def test_more_samples_than_asked_for_are_told(tmp_path, whole):
  path = tmp_path / 'samples.jsonl'
  path.write_bytes(whole + whole.splitlines(keepends=True)[0])
  with pytest.raises(UserError, match='expected 5 samples in .*, found more'):
    fill(path)


def test_a_full_disk_is_told_and_what_was_written_of_a_batch_is_dropped(
    tmp_path, whole
):
  path = tmp_path / 'samples.jsonl'

  class Full:
    """A file on a disk that has place for 20 bytes more."""

    name = str(path)

    def __init__(self, file):
      self._file, self._left = file, 20

    def write(self, content):
      if not self._left:
        raise OSError(errno.ENOSPC, 'No space left on device')
      written = self._file.write(content[: self._left])
      self._left -= written
      return written

  with open_sample_file(path, BATCHES, SETTINGS) as file:
    file.append(rows(0))
    size = path.stat().st_size
    file._file = Full(file._file)
    with pytest.raises(UserError, match='cannot write .*: No space left'):
      file.append(rows(1))
    assert file.batches_done == 1
  assert path.stat().st_size == size + 20
  fill(path)
  assert path.read_bytes() == whole


def test_a_missing_folder_is_told(tmp_path):
  with pytest.raises(UserError, match='expected a folder .* for the samples'):
    fill(tmp_path / 'none' / 'samples.jsonl')
