import importlib.metadata
import itertools
import sysconfig

import pytest

from codet5p_jax.corpus.installed import installed_packages, standard_library
from codet5p_jax.errors import UserError


@pytest.fixture
def library(tmp_path, monkeypatch):
  """A folder that takes the place of the interpreter's own library."""
  monkeypatch.setattr(sysconfig, 'get_path', {'stdlib': tmp_path}.__getitem__)

  def write(path, content=b'x = 1\n'):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(content)

  return write


def test_the_library_is_read_in_order_with_its_packages_as_origins(library):
  library('zlib_like.py', b'z = 1\n')
  library('email/mime/text.py', b's = 1234567\n')
  library('email/charset.py')
  library('email/notes.txt')
  files = list(standard_library())
  assert files == list(standard_library())
  assert [(file.shown, file.origin) for file in files] == [
      ('email/charset.py', 'email'),
      ('email/mime/text.py', 'email'),
      ('zlib_like.py', 'zlib-like'),
  ]
  assert [file.size for file in files] == [6, 12, 6]
  assert {file.licence for file in files} == {'psf-2.0'}


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
  assert [file.shown for file in standard_library()] == ['testing.py']


def test_a_library_without_source_is_one_clear_line(library, tmp_path):
  library('os.pyc')
  with pytest.raises(UserError, match='found no .py file; install') as error:
    next(standard_library())
  assert str(tmp_path) in str(error.value)
  assert '\n' not in str(error.value)


def test_the_interpreters_own_library_can_be_read():
  files = list(itertools.islice(standard_library(), 5))
  assert all(file.size and file.path.endswith('.py') for file in files)


@pytest.fixture
def install(tmp_path, monkeypatch):
  """Installs distributions where the interpreter sees only them."""
  monkeypatch.setattr(
      importlib.metadata,
      'distributions',
      lambda: importlib.metadata.Distribution.discover(path=[str(tmp_path)]),
  )

  def write(name, metadata, files):
    info = tmp_path / f'{name}-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Name: {name}\n{metadata}\n')
    (info / 'RECORD').write_text(''.join(f'{file},,\n' for file in files))
    for file in files:
      path = tmp_path / file
      if not file.startswith(('..', 'gone')):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'{name} = 1\n')

  return write


def test_installed_source_has_its_distribution_as_origin(install):
  install('Zope.Thing', 'License: MIT', ['zope/b.py', 'zope/a.c', 'zope/n.txt'])
  install('codet5p_jax', 'License: MIT', ['ours/a.py'])
  install('absl', '', ['absl/x.py', '../bin/absl.py', 'gone/y.py'])
  assert [
      (file.shown, file.origin, file.licence) for file in installed_packages()
  ] == [
      ('absl/x.py', 'absl', 'unknown'),
      ('zope/a.c', 'zope-thing', 'mit'),
      ('zope/b.py', 'zope-thing', 'mit'),
  ]


@pytest.mark.parametrize(
    ('metadata', 'licence'),
    [
        ('License-Expression: MIT OR GPL-2.0-only\nLicense: x',
         'mit or gpl-2.0-only'),
        ('License: GPL\nClassifier: License :: OSI Approved :: MIT License\n'
         'Classifier: Topic :: Software Development', 'mit'),
        ('Classifier: License :: OSI Approved :: BSD License\n'
         'Classifier: License :: OSI Approved :: Apache Software License',
         'apache-2.0 and bsd-3-clause'),
        ('License: Apache License, Version 2.0\n'
         'Classifier: License :: OSI Approved', 'apache-2.0'),
    ],
)  # fmt: skip
def test_the_clearest_statement_of_a_licence_counts(install, metadata, licence):
  install('absl', metadata, ['absl/x.py'])
  [file] = installed_packages()
  assert file.licence == licence
