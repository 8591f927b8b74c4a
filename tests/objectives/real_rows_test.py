"""The properties of the objectives over 10,000 rows of real programs."""

import collections
import gzip
import json
import os
import pathlib

import numpy as np
import pytest
import scipy.stats

from codet5p_jax.data.vocabularies import ByteLevelBPE
from codet5p_jax.objectives.seq2seq_causal_lm import cut_at_pivot, pivot_range
from codet5p_jax.objectives.span_denoising import SpanDenoising
from codet5p_jax.training.batches import example_generator
from tests.objectives import rebuilding

ROWS = 10_000
OBJECTIVE = SpanDenoising()


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  if not (data := os.environ.get('CODET5P_TEST_DATA')):
    pytest.skip('CODET5P_TEST_DATA names no folder with real programs')
  folder, paths = tmp_path_factory.mktemp('vocabulary'), []
  for name in ('vocab.json', 'merges.txt'):
    packed = pathlib.Path(data) / 'tokenizers' / 'codet5' / f'{name}.gz'
    if not packed.exists():
      pytest.skip(f'there is no {packed}')
    paths.append(folder / name)
    paths[-1].write_bytes(gzip.decompress(packed.read_bytes()))
  return ByteLevelBPE.codet5(*paths)


@pytest.fixture(scope='module')
def stream(vocabulary):
  """Tokens and word starts of real programs, as a token store has them."""
  tokens, starts = [], []
  length = 0
  for path in sorted(
      pathlib.Path(os.environ['CODET5P_TEST_DATA']).glob('poj104/*.gz')
  ):
    with gzip.open(path, 'rt') as lines:
      for line in lines:
        program = json.loads(line)['code']
        ids, marks = vocabulary.encode_with_word_starts(program)
        tokens += [ids, [vocabulary.task_tokens.eos]]
        starts += [marks, [True]]
        length += len(ids) + 1
        if length > ROWS * OBJECTIVE.source_length:
          return np.concatenate(tokens), np.concatenate(starts)
  pytest.fail(f'too few programs for {ROWS} rows: {length} tokens')


def test_denoising_keeps_its_promises_over_real_rows(vocabulary, stream):
  tokens, starts = stream
  ids = vocabulary.task_tokens
  length = OBJECTIVE.source_length - 2
  hidden, words = 0, collections.Counter()
  for number in range(ROWS):
    part = slice(number * length, (number + 1) * length)
    row = {'tokens': tokens[part], 'word_starts': starts[part]}
    source, target = OBJECTIVE.source_and_target(
        row, example_generator(0, number), vocabulary
    )
    assert len(source) <= OBJECTIVE.source_length
    assert len(target) <= OBJECTIVE.target_length
    spans = rebuilding.spans(source, target, ids)
    # Nothing is lost.
    assert rebuilding.row(source, spans, ids) == row['tokens'].tolist()
    for begin, span in rebuilding.places(source, spans, ids):
      # No word is split, looking at the row's neighbours in the stream too.
      first = number * length + begin
      assert starts[first] and starts[first + len(span)]
      words[int(starts[first : first + len(span)].sum())] += 1
      hidden += len(span)
  share = hidden / (ROWS * length)
  uniform = scipy.stats.chisquare([words[n] for n in range(1, 6)]).pvalue
  print(f'hidden {share:.4%} in {words.total()} spans {dict(words)}, uniform '
        f'lengths p = {uniform:.3f}')
  assert sorted(words) == [1, 2, 3, 4, 5]
  assert 0.14 <= share <= 0.16
  assert uniform > 0.01


def test_pivots_are_uniform_over_real_rows(vocabulary, stream):
  tokens, _ = stream
  first, last = pivot_range(660)
  pivots = np.zeros(last - first + 1, int)
  for number in range(ROWS):
    # Rows that overlap: there are fewer of 660 tokens than of 510.
    row = {'tokens': tokens[number * 300 : number * 300 + 660]}
    source, target = cut_at_pivot(
        row, example_generator(0, number), vocabulary.task_tokens
    )
    rebuilt = source[2:].tolist() + target[1:-1].tolist()
    assert rebuilt == row['tokens'].tolist()
    pivots[len(source) - 2 - first] += 1
  uniform = scipy.stats.chisquare(pivots).pvalue
  print(f'uniform pivots p = {uniform:.3f}')
  assert uniform > 0.01
