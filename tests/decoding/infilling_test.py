import dataclasses
import re

import pytest

from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.decoding.infilling import (
    gap_answers,
    infilling_source,
    split_at_gaps,
)
from codet5p_jax.errors import UserError

PROMPT = 'def <extra_id_0>(a, b):\n  return <extra_id_1> + b\n'


@pytest.fixture(scope='module')
def vocabulary(small_corpus):
  return load_vocabulary(small_corpus / 'vocabulary')


def test_a_prompt_is_split_at_its_gaps():
  assert split_at_gaps(PROMPT) == ['def ', '(a, b):\n  return ', ' + b\n']
  assert split_at_gaps('<extra_id_0>') == ['', '']


@pytest.mark.parametrize(
    'prompt, words',
    [
        ('def f():', "found none in 'def f():'; put it there"),
        ('<extra_id_1>', 'found <extra_id_1>; number them in order'),
        ('<extra_id_0> <extra_id_0>', 'found <extra_id_0>, <extra_id_0>;'),
        ('<extra_id_00>', 'found <extra_id_00>;'),
    ],
)
def test_gaps_must_be_there_and_be_numbered_in_order(prompt, words):
  with pytest.raises(UserError, match=re.escape(words)) as error:
    split_at_gaps(prompt)
  assert '\n' not in str(error.value)


def test_the_source_has_a_sentinel_in_each_gap(vocabulary):
  ids, texts = vocabulary.task_tokens, split_at_gaps(PROMPT)
  source = infilling_source(texts, vocabulary)
  first, second = source.index(ids.sentinel(0)), source.index(ids.sentinel(1))
  assert source[0] == ids.bos and source[-1] == ids.eos
  parts = source[1:first], source[first + 1 : second], source[second + 1 : -1]
  assert [vocabulary.decode(part) for part in parts] == texts


def test_the_source_of_a_vocabulary_without_bos_begins_with_the_text(
    vocabulary, monkeypatch
):
  with_bos = infilling_source(['x = ', ''], vocabulary)
  ids = dataclasses.replace(vocabulary.task_tokens, bos=None)
  monkeypatch.setattr(vocabulary, 'task_tokens', ids)
  assert infilling_source(['x = ', ''], vocabulary) == with_bos[1:]


def test_more_gaps_than_sentinels_are_one_clear_line(vocabulary):
  with pytest.raises(UserError, match='100 spans, but sentinel 100 was asked'):
    infilling_source([' '] * 102, vocabulary)


def test_answers_are_cut_at_the_following_sentinels(vocabulary):
  ids = vocabulary.task_tokens
  zero, one, two = (ids.sentinel(k) for k in range(3))
  cut = [zero, 531, 532, two, 533, one, ids.eos, 534]
  assert gap_answers(cut, ids) == {0: [531, 532], 2: [533], 1: []}
  assert gap_answers([zero, 531, zero, 532], ids) == {0: [531]}
  assert gap_answers([zero], ids) == {0: []}
