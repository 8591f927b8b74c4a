import collections

import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from codet5p_jax.data.task_tokens import TaskTokens
from codet5p_jax.data.vocabularies import Vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.objectives import span_denoising as module
from codet5p_jax.objectives.span_denoising import (
    SpanDenoising,
    hide_spans,
    sample_spans,
)
from tests.objectives import rebuilding
from tests.training import small

IDS = TaskTokens(
    pad=0, bos=1, eos=2, unk=3, clm=9, match=4, tdec=5, cdec=6,
    sentinels=tuple(range(999, 899, -1)),
)  # fmt: skip
# As CodeGen's: one id for all of pad, end and unknown, and no beginning.
UNFRAMED = TaskTokens(
    pad=50, bos=None, eos=50, unk=50, clm=51, match=4, tdec=5, cdec=6,
    sentinels=tuple(range(100, 200)),
)  # fmt: skip


class Chosen(np.random.Generator):
  """A generator whose choices a test makes."""

  def __init__(self, places, words):
    super().__init__(np.random.PCG64(0))
    self._places, self._words = places, words

  def permutation(self, places):
    assert set(self._places) <= set(places.tolist())
    return np.array(self._places)

  def integers(self, low, high, size):
    assert (low, high) == (1, 4)
    return np.array([*self._words, *[0] * (size - len(self._words))])


# Words of the row below, in tokens: 1 2 1 1 3 1 1 (2, perhaps cut).
STARTS = np.array([0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0], bool)


def spans_of(places, words, **changes):
  arguments = {
      'max_tokens': 13,
      'max_target_tokens': 20,
      'max_spans': 9,
      'max_words': 3,
      **changes,
  }
  is_maskable = arguments.pop('is_maskable', np.ones(13, bool))
  generator = Chosen(places, words)
  return sample_spans(STARTS, is_maskable, generator, **arguments)


@pytest.mark.parametrize(
    ('places', 'words', 'changes', 'expected'),
    [
        # Words 0 to 2 of the seven whole ones begin at tokens 1, 2 and 4.
        ([1], [2], {}, [(2, 5)]),
        ([0, 4], [3, 2], {}, [(1, 5), (6, 10)]),
        # In the order of the row, whatever the order of drawing.
        ([4, 0], [1, 2], {}, [(1, 4), (6, 9)]),
        # A place whose longest span would touch another is passed over, and
        # the next place gets the length.
        ([0, 3, 4], [2, 1], {}, [(1, 4), (5, 6)]),
        ([0, 2, 4], [2, 1], {}, [(1, 4), (6, 9)]),
        # The longest span from word 3 takes 5 tokens, that from word 0 takes 4.
        ([3, 0], [1, 1], {'max_tokens': 4}, [(1, 2)]),
        ([3, 0], [1, 1], {'max_target_tokens': 5}, [(1, 2)]),
        ([0, 4], [1, 1], {'max_spans': 1}, [(1, 2)]),
        # With 4 of 6 tokens hidden, no room is left for the longest span.
        ([0, 4], [3, 1], {'max_tokens': 6}, [(1, 5)]),
    ],
)
def test_spans_are_drawn_as_the_docstring_says(
    places, words, changes, expected
):
  assert spans_of(places, words, **changes) == expected


def test_no_span_may_reach_what_must_stay():
  is_maskable = np.ones(13, bool)
  is_maskable[5] = False  # Word 3.
  # Words 0 and 4 are the only ones with three free words from them on.
  assert spans_of([0, 4], [1, 1], is_maskable=is_maskable) == [(1, 2), (6, 9)]
  with pytest.raises(AssertionError):
    spans_of([1], [1], is_maskable=is_maskable)


@pytest.mark.parametrize('length', [0, 1, 3])
def test_a_row_of_too_few_words_hides_nothing(length):
  row = {
      'tokens': np.arange(10, 10 + length),
      'word_starts': np.ones(length, bool),
  }
  source, target = hide_spans(row, np.random.default_rng(0), IDS, 9, 0.9)
  assert source.tolist() == [1, *row['tokens'].tolist(), 2]
  assert target.tolist() == [1, 2]


def random_row(seed, length=300, mean_word=2):
  numbers = np.random.default_rng(seed)
  tokens = numbers.integers(10, 50, length).astype(np.int32)
  starts = numbers.random(length) < 1 / mean_word
  ends = numbers.random(length) < 0.01
  tokens[ends] = IDS.eos
  starts |= ends
  starts[1:] |= ends[:-1]
  return {'tokens': tokens, 'word_starts': starts}


@hypothesis.given(
    seed=st.integers(0, 10**6),
    length=st.integers(0, 200),
    density=st.floats(0.05, 0.9),
    words=st.integers(1, 7),
    target_length=st.integers(4, 90),
    ids=st.sampled_from([IDS, UNFRAMED]),
)
@hypothesis.settings(deadline=None)
def test_source_and_target_rebuild_the_row_and_split_no_word(
    seed, length, density, words, target_length, ids
):
  row = random_row(seed, length)
  row['tokens'] = np.where(row['tokens'] == IDS.eos, ids.eos, row['tokens'])
  source, target = hide_spans(
      row, np.random.default_rng(seed), ids, target_length, density, words
  )
  assert source.dtype == target.dtype == np.int32
  assert len(target) <= target_length
  spans = rebuilding.spans(source, target, ids)
  assert rebuilding.row(source, spans, ids) == row['tokens'].tolist()
  hidden = np.zeros(length, bool)
  for begin, span in rebuilding.places(source, spans, ids):
    end = begin + len(span)
    assert row['word_starts'][begin] and row['word_starts'][end]
    assert 1 <= row['word_starts'][begin:end].sum() <= words
    assert ids.eos not in span
    hidden[begin:end] = True
    # Spans are apart from one another.
    assert not hidden[begin - 1 : begin].any()
  assert hidden.sum() <= round(density * length)


def test_lengths_are_uniform_and_the_share_is_reached():
  lengths, hidden, total = collections.Counter(), 0, 0
  for seed in range(1500):
    row = random_row(seed, length=400, mean_word=1.7)
    source, target = hide_spans(row, np.random.default_rng(seed), IDS, 400)
    spans = rebuilding.spans(source, target, IDS)
    for begin, span in rebuilding.places(source, spans, IDS):
      lengths[int(row['word_starts'][begin : begin + len(span)].sum())] += 1
      hidden += len(span)
    total += len(row['tokens'])
  assert set(lengths) == {1, 2, 3, 4, 5}
  assert scipy.stats.chisquare(list(lengths.values())).pvalue > 0.01
  assert 0.14 < hidden / total <= 0.15


def test_the_same_key_hides_the_same_and_another_something_else():
  row = random_row(3)

  def source(seed):
    return hide_spans(row, np.random.default_rng(seed), IDS, 99)[0].tolist()

  assert source(5) == source(5)
  assert source(5) != source(6)


@pytest.mark.parametrize(
    ('fields', 'expected'),
    [
        ({'source_length': 2}, 'source_length of span_denoising to hold a'),
        ({'target_length': 2}, 'target_length of span_denoising .* found 2'),
        ({'noise_density': 1.0}, 'noise_density between 0 and 1'),
        ({'max_words': 0}, 'max_words of 1 or more'),
        ({'batch_scale': 0}, 'batch_scale to be at least 1'),
        ({'rate': 0.0}, 'a rate above 0'),
        ({'first_step': -1}, 'first_step of 0 or more'),
        ({'loss_tile_length': 0}, 'loss_tile_length to be at least 1'),
    ],
)
def test_a_field_out_of_range_is_one_clear_line(fields, expected):
  with pytest.raises(UserError, match=expected) as error:
    SpanDenoising(**fields)
  assert '\n' not in str(error.value)


class Tokens(Vocabulary):
  """A vocabulary of a kind that a test may choose."""

  def __init__(self, kind):
    super().__init__(kind, {}, 3, UNFRAMED, [b'a', b'b', b'c'], {})

  def encode_batch(self, texts):
    raise NotImplementedError

  def encode_as_released(self, text):
    raise NotImplementedError


@pytest.mark.parametrize(
    ('kind', 'asked_for', 'is_warned'),
    [
        ('sentencepiece', False, False),
        ('codet5', True, False),
        ('codegen', True, True),
    ],
)
def test_codegens_untrained_sentinels_are_warned_of_once(
    monkeypatch, caplog, kind, asked_for, is_warned
):
  monkeypatch.setattr(module, 'token_rows', lambda *arguments: arguments[2:])
  objective = SpanDenoising(untrained_sentinels=asked_for)
  for split in ('train', 'validation'):
    assert objective.rows('corpus', split, Tokens(kind)) == (split, 511)
  messages = [
      record.getMessage()
      for record in caplog.records
      if record.levelname == 'WARNING'
  ]
  assert len(messages) == is_warned
  assert all('never trained the rows' in message for message in messages)


def test_codegens_untrained_sentinels_must_be_asked_for():
  for split in ('train', 'validation'):
    with pytest.raises(UserError, match='untrained_sentinels=True') as error:
      SpanDenoising().rows('corpus', split, Tokens('codegen'))
    assert '\n' not in str(error.value)


def test_a_model_is_not_refused_for_a_vocabulary_that_it_may_not_have():
  """The composite learns with our SentencePiece, whose sentinels are real."""
  SpanDenoising().check_model(small.COMPOSITE)
