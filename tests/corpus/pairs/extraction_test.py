import pytest

from codet5p_jax.corpus.pairs.extraction import Pair
from tests.corpus.pairs.extracting import extract

# Python.

PYTHON = '''\
"""A module is no function."""
import os


@functools.cache
@other
def plain(first, second=None):
  """Adds one number
  to another.

  It is long.
  """

  # What stays.
  return first + (second or 0)


class Outer:
  """A class is none either."""

  async def fetch(self, é):
    'Fetches é for them.'
    text = """
  indented
"""
    return text

  class Inner:
    @classmethod
    def make(cls):
      r"""Makes \\d of them."""; value = cls()
      return value

if os.name:
  def conditional():
    # Ahead of it.
    """Is there on some systems only."""  # noqa
    def nested():
      """Is not looked at ever."""
      first = 1
      return first
    return nested
'''


def test_functions_and_methods_of_python_are_paired_with_their_docstrings():
  assert extract('python', PYTHON) == [
      Pair(
          'Adds one number to another.',
          'def plain(first, second=None):\n  # What stays.\n'
          '  return first + (second or 0)',
          'plain',
      ),
      Pair(
          'Fetches é for them.',
          'async def fetch(self, é):\n  text = """\nindented\n"""\n'
          '  return text',
          'fetch',
      ),
      Pair(
          'Makes \\d of them.',
          'def make(cls):\n  value = cls()\n  return value',
          'make',
      ),
      Pair(
          'Is there on some systems only.',
          'def conditional():\n  # Ahead of it.\n  def nested():\n'
          '    """Is not looked at ever."""\n    first = 1\n    return first\n'
          '  return nested',
          'conditional',
      ),
  ]


@pytest.mark.parametrize('newline', ['\r\n', '\r'])
def test_the_ends_of_lines_make_no_difference(newline):
  text = PYTHON.replace('\n', newline)
  assert extract('python', text) == extract('python', PYTHON)
  assert extract('python', '\ufeff' + text) == extract('python', PYTHON)


def test_tabs_and_characters_of_several_bytes_move_nothing():
  text = (
      'class É:\n'
      '\tx = "é\u20ac\U0001f600"\n'
      '\tdef f(self, y="é"): # é\n'
      '\t\t"é"  """ Does é to \\ud800 y."""\n'
      '\n'
      '\t\t\n'
      '\t\tif y:\n'
      '\t\t\treturn 1\n'
      '\t\t# The end.\n'
  )
  assert extract('python', text) == [
      Pair(
          'é Does é to ? y.',
          'def f(self, y="é"): # é\n\tif y:\n\t\treturn 1',
          'f',
      )
  ]


BODY = '    first = 1\n    return first\n'


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('def f():\n' + BODY, 'undocumented'),
        ('def f():\n    # Says what it does.\n' + BODY, 'undocumented'),
        ('def f():\n    f"""Is no real {docstring}."""\n' + BODY,
         'undocumented'),
        ('def f():\n    """Two words."""\n' + BODY, 'short_documentation'),
        ('def f():\n    """Two words --\n\n    And then more of them."""\n'
         + BODY, 'short_documentation'),
        ('def f():\n    """:param x: a number of things"""\n' + BODY,
         'short_documentation'),
        ('def f():\n    """"""\n' + BODY, 'short_documentation'),
        ('def f(): "Is one line only."; return 1\n', 'short_code'),
        ('def f():\n    """Has no\n    more than two\n    lines."""\n\n'
         '    return 1\n', 'short_code'),
        ('def f(\n    first,\n    second,\n):\n    """Has no body at all."""\n',
         'short_code'),
        ('@overload\ndef f(x: int) -> int: ...\n', 'undocumented'),
        ('def check_test_data():\n    """Is a test of theirs."""\n' + BODY,
         'test'),
        ('def setUpTest():\n    """Is a test of theirs."""\n' + BODY, 'test'),
        ('def __init__(self):\n    """Makes one of them."""\n' + BODY,
         'special_method'),
        ('print "text"\n', 'unparsable'),
        ('def f():\n    """Raises for Python 2."""\n    raise E, "text"\n',
         'unparsable'),
        ('x = ' + '-' * 100_000 + '1\n', 'unparsable'),
        ('x = "\ud800"\n', 'unparsable'),
    ],
)  # fmt: skip
def test_what_is_no_pair_of_python_has_its_reason(text, reason):
  assert extract('python', text) == [reason]


def test_a_name_with_leading_underscores_only_is_not_special():
  text = 'def __private():\n    """Does it in secret."""\n' + BODY
  [pair] = extract('python', text)
  assert pair.name == '__private'


def test_old_escapes_warn_nobody(recwarn):
  text = 'def f():\n    """Matches digits \\d here."""\n' + BODY
  assert len(extract('python', text)) == 1
  assert not recwarn.list


# Rows of CodeSearchNet.


def test_the_docstring_of_a_row_is_taken_out_of_its_code():
  text = (
      'def f(self):\n'
      '        """Adds é.\n\n        More."""\n'
      '        first = 1\n'
      '        return first'
  )
  given = {'documentation': 'Adds é to it.\n\nMore.', 'name': 'A.f'}
  expected = Pair(
      'Adds é to it.',
      'def f(self):\n        first = 1\n        return first',
      'f',
  )
  assert extract('python', text, **given) == [expected]
  indented = ''.join(f'    {line}\n' for line in text.split('\n'))
  assert extract('python', indented, **given) == [expected]


@pytest.mark.parametrize(
    ('language', 'above'),
    [
        ('java', '/** Old. */\n// And new.\n'), ('go', '// One.\n// Two.\n'),
        ('php', '# One.\n/* Two.\n*/'), ('javascript', '/* One. */ // Two.\n'),
        ('ruby', '# One.\n# Two.\n'), ('php', ''),
    ],
)  # fmt: skip
def test_comments_above_the_code_of_a_row_go(language, above):
  text = f'{above}#[x] f(a) {{\r\n\t\t// What stays.\r\n\t\treturn 1;\r\n\t}}'
  if language == 'ruby':
    text = text.replace('#[x] ', '')
  [pair] = extract(language, text, documentation='Says it all.', name='f')
  head = 'f(a) {' if language == 'ruby' else '#[x] f(a) {'
  assert pair == Pair(
      'Says it all.', head + '\n\t// What stays.\n\treturn 1;\n}', 'f'
  )


JAVA_ROW = 'int f() {\n  return 1;\n}'


@pytest.mark.parametrize(
    ('language', 'text', 'documentation', 'name', 'reason'),
    [
        ('java', JAVA_ROW, '', 'A.f', 'empty'),
        ('java', JAVA_ROW, ' \n', 'A.f', 'empty'),
        ('java', '// Nothing but this.', 'Is all there is.', 'A.f', 'empty'),
        ('java', JAVA_ROW, 'Two words', 'A.f', 'short_documentation'),
        ('java', 'int f() {\n}', 'Is all there is.', 'A.f', 'short_code'),
        ('java', JAVA_ROW, 'Is all there is.', 'A.testF', 'test'),
        ('java', JAVA_ROW, 'Is all there is.', 'A.hashCode', 'special_method'),
        ('python', 'print "x"', 'Is all there is.', 'f', 'unparsable'),
        ('python', 'x = 1', 'Is all there is.', 'f', 'unparsable'),
        ('python', 'def test_f():\n  x = 1\n  return x', 'Is all there is.', '',
         'test'),
    ],
)  # fmt: skip
def test_rows_follow_the_same_rules(
    language, text, documentation, name, reason
):
  given = {'documentation': documentation, 'name': name}
  assert extract(language, text, **given) == [reason]
  if reason == 'test':
    # It is in the name of the class only.
    good = JAVA_ROW if language == 'java' else text
    given['name'] = 'Tests.f'
    assert extract(language, good, **given)[0].name == 'f'
