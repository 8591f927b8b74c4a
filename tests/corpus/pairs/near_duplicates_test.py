import numpy as np
import pytest

from codet5p_jax.corpus.pairs import near_duplicates
from codet5p_jax.corpus.pairs.near_duplicates import (
    BANDS,
    ROWS,
    are_near,
    band_keys,
    hash_tokens,
    mark_near_duplicates,
    tokens_of,
)


@pytest.mark.parametrize(
    ('language', 'code', 'expected'),
    [
        (
            'python',
            'def f(é, *, x_1=0x1F):\n  """Says "it\'s" # all."""\n'
            '  # don\'t say "this\n  return self.g(é, \'a\\\'b\', 2.5e3)\n',
            {'f', 'é', 'x_1', '0x1F', '"""Says "it\'s" # all."""', 'self', 'g',
             "'a\\'b'", '2.5e3'},
        ),
        (
            'javascript',
            'async f(a) {\n  // don\'t\n  /* "b" */ return `c ${d}\n'
            '"` + a + "//e";\n}',
            {'f', 'a', '`c ${d}\n"`', '"//e"'},
        ),
        ('go', 'func (v *V) F(a int) { return `\\` + "b" /* c', {
            'v', 'V', 'F', 'a', 'int', '`\\`', '"b"'}),
        ('java', "public int f(int x1) { return 'y' + x1; } // z", {
            'f', 'x1', "'y'"}),
        ('php', '#[Pure]\nfunction f($a) { # b\n return "$c"; }', {
            'Pure', 'f', 'a', '"$c"'}),
        ('ruby', 'def f!(a)\n  "#{b} c" # d\nend', {'f', 'a', '"#{b} c"'}),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha()
    else '',
)  # fmt: skip
def test_tokens_are_identifiers_and_literals(language, code, expected):
  assert tokens_of(code, language) == expected


@pytest.mark.parametrize(
    ('common', 'one', 'other', 'expected'),
    [
        (4, 0, 1, True),  # 4/5 = 0.8
        (3, 0, 1, False),  # 3/4
        (8, 1, 1, True),  # 8/10
        (7, 1, 1, False),  # 7/9 = 0.78
        (79, 10, 10, False),  # 79/99 = 0.798
        (81, 10, 10, True),  # 81/101 = 0.802
        (12, 3, 0, True),  # 12/15
        (0, 1, 1, False),
    ],
)
def test_codes_are_near_from_a_similarity_of_eight_tenths(
    common, one, other, expected
):
  first = {*range(common), *range(100, 100 + one)}
  second = {*range(common), *range(200, 200 + other)}
  assert are_near(frozenset(first), frozenset(second)) is expected
  assert are_near(frozenset(second), frozenset(first)) is expected


def mark(sets, sizes, keys_in_memory=10_000, keys=None, held_out=()):
  """As a corpus of units of these sizes is marked."""
  if keys is None:
    keys = np.array([band_keys(values) for values in sets]).reshape(-1, BANDS)
  ends = np.cumsum(sizes)

  def read_keys(band, unit):
    return keys[ends[unit] - sizes[unit] : ends[unit], band]

  numbers = np.array([len(values) for values in sets], np.int32)
  is_held_out = np.isin(np.arange(len(sets)), held_out)
  marked = mark_near_duplicates(
      read_keys, sizes, sets.__getitem__, numbers, is_held_out, keys_in_memory
  )
  return marked.tolist()


def near_one_before(sets):
  """The same by looking at every two."""
  sets = [frozenset(values.tolist()) for values in sets]
  return [
      any(are_near(sets[before], later) for before in range(index))
      for index, later in enumerate(sets)
  ]


@pytest.fixture(scope='module')
def families():
  """Sets of 1 to 60 hashes, many of them like another with some changed."""
  rng = np.random.default_rng(0)
  sets = []
  for _ in range(400):
    if sets and rng.random() < 0.6:
      values = sets[rng.integers(len(sets))].copy()
      changed = rng.random(len(values)) < rng.choice([0, 0.02, 0.08, 0.15, 0.4])
      values[changed] = rng.integers(0, 2**32, changed.sum())
    else:
      values = rng.integers(0, 2**32, rng.integers(1, 61))
    sets.append(np.unique(values.astype(np.uint32)))
  return sets


@pytest.mark.parametrize('keys_in_memory', [1, 37, 10_000])
def test_what_is_near_one_before_it_is_marked_and_nothing_else(
    families, keys_in_memory
):
  if keys_in_memory == 1:
    families = families[:60]
  expected = near_one_before(families)
  assert 0.2 < np.mean(expected) < 0.6
  sizes = [0, 7, len(families) - 20, 0, 13]
  assert mark(families, sizes, keys_in_memory) == expected


def test_no_pair_at_all_is_none_marked():
  assert mark([], [0, 0]) == []
  assert mark([], []) == []


def test_a_key_alone_makes_nothing_near():
  sets = [np.arange(10 * i, 10 * i + 10, dtype=np.uint32) for i in range(4)]
  sets.append(sets[2])
  keys = np.full((5, BANDS), 7, np.uint64)
  assert mark(sets, [5], keys=keys) == [False] * 4 + [True]


def test_a_key_of_very_many_is_compared_with_the_first_of_them(monkeypatch):
  monkeypatch.setattr(near_duplicates, '_COMPARED', 2)
  sets = [np.arange(10 * i, 10 * i + 10, dtype=np.uint32) for i in range(4)]
  sets += [sets[1], sets[3]]
  keys = np.full((6, BANDS), 7, np.uint64)
  assert mark(sets, [6], keys=keys) == [False] * 4 + [True, False]


def test_a_band_agrees_as_often_as_said():
  """One of 1 - (1 - s^7)^32 shares a key; here s is 0.6, so 0.60 of them."""
  rng = np.random.default_rng(1)
  shares = 0
  trials = 1500
  for _ in range(trials):
    values = rng.integers(0, 2**32, 40).astype(np.uint32)
    shares += (band_keys(values[:32]) == band_keys(values[8:])).any()
  similarity = 24 / 40
  expected = 1 - (1 - similarity**ROWS) ** BANDS
  # Three standard deviations.
  tolerance = 3 * np.sqrt(expected * (1 - expected) / trials)
  assert shares / trials == pytest.approx(expected, abs=tolerance)


def test_one_in_two_thousand_is_missed_at_the_border():
  assert (1 - 0.8**ROWS) ** BANDS == pytest.approx(5.4e-4, rel=0.01)
  assert (1 - 0.85**ROWS) ** BANDS == pytest.approx(4.2e-6, rel=0.02)


def test_a_set_has_one_key_whatever_its_size(monkeypatch):
  rng = np.random.default_rng(2)
  hashes = rng.integers(0, 2**32, 5000).astype(np.uint32)
  whole = band_keys(hashes)
  assert whole.shape == (BANDS,) and len(set(whole.tolist())) == BANDS
  monkeypatch.setattr(near_duplicates, '_TOKENS_AT_ONCE', 700)
  np.testing.assert_array_equal(band_keys(hashes[::-1]), whole)
  assert (band_keys(hashes[1:]) == whole).mean() > 0.9


def test_hashes_of_tokens_are_those_of_any_process():
  hashes = hash_tokens(frozenset({'a', 'é', '"x"'}))
  # By `crc32` of the shell for "a".
  assert 0xE8B7BE43 in hashes.tolist()
  assert hashes.dtype == np.uint32 and sorted(hashes) == hashes.tolist()


def test_what_is_held_out_gives_way_to_what_is_trained_on():
  sets = [np.arange(start, start + 9, dtype=np.uint32) for start in (0, 0, 50)]
  assert mark(sets, [2, 1]) == [False, True, False]
  assert mark(sets, [2, 1], held_out=[0, 2]) == [True, False, False]


def test_codes_without_a_name_are_near_none():
  nothing = np.array([], np.uint32)
  assert mark([nothing, nothing], [2]) == [False, False]
