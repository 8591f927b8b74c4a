import dataclasses
import itertools
import sysconfig

import pytest

from codet5p_jax.corpus.source_files import SourceFile, standard_library
from codet5p_jax.errors import UserError

FILE = SourceFile('def f(x):\n  return x\n', 'python', 'MIT', 'a', 'a/b.py')


@pytest.fixture
def library(tmp_path, monkeypatch):
  """A folder that takes the place of the interpreter's own library."""
  monkeypatch.setattr(sysconfig, 'get_path', {'stdlib': tmp_path}.__getitem__)

  def write(path, content=b'x = 1\n'):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(content)

  return write


@pytest.mark.parametrize(
    ('text', 'is_equal'),
    [
        ('def f(x):\r\n\treturn x', True),
        ('\n\ndef f ( x ) :\u00a0return\fx', True),
        ('def f(x):\n  return y\n', False),
        ('def F(x):\n  return x\n', False),
    ],
)
def test_the_hash_ignores_white_space_and_nothing_else(text, is_equal):
  other = dataclasses.replace(FILE, text=text)
  assert (other.hash == FILE.hash) == is_equal


def test_the_hash_is_that_of_the_text_alone():
  other = SourceFile(FILE.text, 'java', 'unknown', 'other', 'elsewhere.java')
  assert other.hash == FILE.hash


def test_a_text_that_utf_8_cannot_hold_has_a_hash():
  assert len(dataclasses.replace(FILE, text='"\ud800"').hash) == 64


def test_the_library_is_read_in_order_with_its_packages_as_origins(library):
  library('zlib_like.py', b'z = 1\n')
  library('email/mime/text.py', 's = "\u00e9"\n'.encode())
  library('email/charset.py')
  library('email/notes.txt')
  files = list(standard_library())
  assert files == list(standard_library())
  assert [(file.path, file.origin) for file in files] == [
      ('email/charset.py', 'email'),
      ('email/mime/text.py', 'email'),
      ('zlib_like.py', 'zlib_like'),
  ]
  assert files[1].text == 's = "\u00e9"\n'
  assert {(file.language, file.licence) for file in files} == {
      ('python', 'PSF-2.0')
  }


@pytest.mark.parametrize(
    'path',
    [
        'test/test_os.py',
        'unittest/test/support.py',
        'pip_like/tests/a.py',
        'site-packages/numpy/core.py',
        'ensurepip/__main__.py',
        'lib2to3/pygram.py',
        'idlelib/idle_test/a.py',
        'os/__pycache__/a.py',
    ],
)
def test_tests_and_what_others_wrote_are_left_out(library, path):
  library('testing.py')  # Its name only resembles a folder of tests.
  library(path)
  assert [file.path for file in standard_library()] == ['testing.py']


def test_a_file_that_is_not_utf_8_is_none(library):
  library('a.py')
  library('b.py', b'name = "caf\xe9"\n')
  library('c.py')
  assert [file and file.path for file in standard_library()] == [
      'a.py', None, 'c.py',
  ]  # fmt: skip


def test_a_library_without_source_is_one_clear_line(library, tmp_path):
  library('os.pyc')
  with pytest.raises(UserError, match='found no .py file; install') as error:
    next(standard_library())
  assert str(tmp_path) in str(error.value)
  assert '\n' not in str(error.value)


def test_the_interpreters_own_library_can_be_read():
  files = list(itertools.islice(standard_library(), 5))
  assert all(file.text and file.path.endswith('.py') for file in files if file)
  assert any(files)
