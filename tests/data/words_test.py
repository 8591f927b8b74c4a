"""Tests of what a word is."""

import re
import sys

import hypothesis
import numpy as np
from hypothesis import strategies as st

from codet5p_jax.data import words


def slow_word_starts_by_byte(text):
  """The definition, as a pattern over the text."""
  starts = []
  for match in re.finditer(r'[A-Za-z0-9_]+|\s+|.', text, re.DOTALL):
    starts += [True] + [False] * (len(match.group().encode()) - 1)
  return starts


def test_a_hand_made_line_splits_as_the_docstring_says():
  starts = words.word_starts_by_byte('a_1 =\n')
  assert starts.tolist() == [True, False, False, True, True, True]


def test_no_text_has_no_words():
  assert words.word_starts_by_byte('').shape == (0,)


def test_later_bytes_of_a_character_never_start_a_word():
  starts = words.word_starts_by_byte('\u00e9\U0001f600a')
  assert starts.tolist() == [True, False, True, False, False, False, True]


@hypothesis.given(st.text())
def test_starts_equal_the_pattern_on_random_text(text):
  found = words.word_starts_by_byte(text)
  assert found.tolist() == slow_word_starts_by_byte(text)


def test_every_character_has_the_class_the_pattern_gives_it():
  """Each character twice, then a dot: one word or two tells the class."""
  characters = [
      chr(point)
      for point in range(sys.maxunicode + 1)
      if not 0xD800 <= point < 0xE000
  ]
  text = ''.join(f'{character}{character}.' for character in characters)
  found = words.word_starts_by_byte(text)
  np.testing.assert_array_equal(found, slow_word_starts_by_byte(text))
