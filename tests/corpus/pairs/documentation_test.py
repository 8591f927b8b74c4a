import pytest

from codet5p_jax.corpus.pairs.documentation import (
    clean_block,
    clean_lines,
    count_words,
    first_paragraph,
)


@pytest.mark.parametrize(
    ('documentation', 'expected'),
    [
        ('\n\n  One two\n\tthree.  \n', 'One two three.'),
        ('One two.\n \t\nThree.', 'One two.'),
        ('One two.\n@param x three', 'One two.'),
        ('One two.\n  @return three', 'One two.'),
        ('One two.\n\\param x three', 'One two.'),
        ('One two.\n:param int x: three', 'One two.'),
        ('One two.\n:rtype: three', 'One two.'),
        ('One uses\n:func:`two` and three.', 'One uses :func:`two` and three.'),
        ('One two.\nArgs:\n  x: three', 'One two.'),
        ('One two.\nReturns\n-------\nthree', 'One two.'),
        ('One two\n=======\nThree', 'One two'),
        ('One two.\n>>> three()', 'One two.'),
        ('One two.\nReturns three.', 'One two. Returns three.'),
        ('Mail one@two.three, or\nthe other.',
         'Mail one@two.three, or the other.'),
        ('@param x all there is', ''),
        ('', ''),
    ],
)  # fmt: skip
def test_a_description_ends_where_something_else_begins(
    documentation, expected
):
  assert first_paragraph(documentation) == expected


@pytest.mark.parametrize(
    ('text', 'number'),
    [('', 0), ('one', 1), ('a.b - c()', 2), ('*** --- !!!', 0),
     ('\u00e9 \u4e00\u4e8c 3', 3)],
)  # fmt: skip
def test_words_hold_a_letter_or_a_digit(text, number):
  assert count_words(text) == number


def test_the_frame_of_a_block_goes_and_its_stars_stay():
  comment = '/**\n\t * One *two*.\n   *\n   three **four**\n  *  * five\n */'
  assert clean_block(comment) == '\nOne *two*.\n\nthree **four**\n* five\n'
  assert clean_block('/** One. **/') == 'One.'


def test_the_marks_of_lines_go():
  lines = ['// One:', '//', '//\ttwo', '//go:embed x', '//nolint:all', '/// 3']
  assert clean_lines(lines) == 'One:\n\ntwo\n3'
  assert clean_lines(['#One', '##  two #2', '#']) == 'One\ntwo #2\n'
