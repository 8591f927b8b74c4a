import dataclasses

import pytest

from codet5p_jax.corpus.source_files import (
    SourceFile,
    language_of_name,
    language_of_path,
)

FILE = SourceFile('def f(x):\n  return x\n', 'python', 'MIT', 'a', 'a/b.py')


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


@pytest.mark.parametrize(
    ('path', 'language'),
    [
        ('a/b.py', 'python'),
        ('a.b/C.CPP', 'cpp'),
        ('x.h', 'c'),
        ('x.min.mjs', 'javascript'),
        ('x.rs', 'unknown'),
        ('a.py/README', 'unknown'),
        ('.py', 'unknown'),
        ('', 'unknown'),
    ],
)
def test_the_extension_tells_the_language(path, language):
  assert language_of_path(path) == language


@pytest.mark.parametrize(
    ('name', 'language'),
    [('C++', 'cpp'), (' C# ', 'csharp'), ('PHP', 'php'), ('', 'unknown')],
)
def test_a_language_has_one_name(name, language):
  assert language_of_name(name) == language
