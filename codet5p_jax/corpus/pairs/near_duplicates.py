"""Which pairs have nearly the same code as one before them.

Those to train on come before those that are held out: what a model may have
seen is not what it is measured with.

Two codes are nearly the same if the Jaccard similarity of their sets of
identifiers and literals is at least 0.8 (Allamanis 2019, "The adverse effects
of code duplication", section 3; so did CodeSearchNet). What may be is found by
MinHash (Broder 1997), in bands of minima of which one must agree; what is, is
then counted. So no pair is dropped that is not near one before it, and one of
similarity s is missed with the chance (1 - s**7)**32: 5.4e-4 at 0.8, 4e-6 at
0.85, none at 1.

Texts are not looked at again: units keep the sets as hashes, and the keys of
bands. In memory are the keys of one band in one range of hashes, and some
fourteen bytes a pair.
"""

import functools
import re
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

BANDS, ROWS = 32, 7
_KEYS_IN_MEMORY = 8_000_000
# A band's key that so many pairs share is compared with the first of them only.
_COMPARED = 500
_TOKENS_AT_ONCE = 4096
_SETS_IN_MEMORY = 10_000

_C_STRINGS = r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
_C_COMMENTS = r'//[^\n]*|/\*(?:.*?\*/|.*)'
_TOKENS = {
    'python': (
        r'#[^\n]*', r'"""(?:.*?"""|.*)|\'\'\'(?:.*?\'\'\'|.*)|' + _C_STRINGS
    ),
    'ruby': (r'#[^\n]*', _C_STRINGS),
    'php': (_C_COMMENTS + r'|\#(?!\[)[^\n]*', _C_STRINGS),
    'go': (_C_COMMENTS, _C_STRINGS + r'|`[^`]*`'),
    'javascript': (_C_COMMENTS, _C_STRINGS + r'|`(?:\\.|[^`\\])*`'),
    'java': (_C_COMMENTS, _C_STRINGS),
}
# Comments come first, for there may be quotes in them.
_TOKEN = {
    language: re.compile(
        rf'(?:{comments})|({strings}|\d[\w.]*|[^\W\d]\w*)', re.DOTALL
    )
    for language, (comments, strings) in _TOKENS.items()
}
_KEYWORDS = {
    'python': (
        'False None True and as assert async await break class continue def '
        'del elif else except finally for from global if import in is lambda '
        'nonlocal not or pass raise return try while with yield'
    ),
    'javascript': (
        'async await break case catch class const continue debugger default '
        'delete do else export extends false finally for function if import in '
        'instanceof let new null return static super switch this throw true '
        'try typeof undefined var void while with yield'
    ),
    'go': (
        'break case chan const continue default defer else fallthrough false '
        'for func go goto if import interface map nil package range return '
        'select struct switch true type var'
    ),
    'java': (
        'abstract assert boolean break byte case catch char class const '
        'continue default do double else enum extends false final finally '
        'float for goto if implements import instanceof int interface long '
        'native new null package private protected public return short static '
        'strictfp super switch synchronized this throw throws transient true '
        'try void volatile while'
    ),
    'php': (
        'abstract and array as break callable case catch class clone const '
        'continue declare default do echo else elseif empty enddeclare endfor '
        'endforeach endif endswitch endwhile extends false final finally fn '
        'for foreach function global goto if implements include include_once '
        'instanceof insteadof interface isset list match namespace new null or '
        'print private protected public readonly require require_once return '
        'static switch throw trait true try unset use var while xor yield'
    ),
    'ruby': (
        'BEGIN END alias and begin break case class def defined do else elsif '
        'end ensure false for if in module next nil not or redo rescue retry '
        'return self super then true undef unless until when while yield'
    ),
}
_KEYWORD_SETS = {
    language: frozenset(words.split()) for language, words in _KEYWORDS.items()
}


def tokens_of(code: str, language: str) -> frozenset[str]:
  """The identifiers and literals of a code; no keywords, no comments.

  >>> sorted(tokens_of('if (x1 == "a b") { y(2.5) }  // z', 'java'))
  ['"a b"', '2.5', 'x1', 'y']
  """
  found = set(_TOKEN[language].findall(code))
  return frozenset(found - _KEYWORD_SETS[language] - {''})


def hash_tokens(tokens: frozenset[str]) -> np.ndarray:
  """A hash of each token, uint32, ascending; equal hashes become one."""
  hashes = [zlib.crc32(token.encode()) for token in tokens]
  return np.unique(np.array(hashes, np.uint32))


def band_keys(hashes: np.ndarray) -> np.ndarray:
  """The MinHash keys of a set, uint64 [BANDS].

  Args:
    hashes: of the tokens, uint32 [number].
  """
  minima = np.full(BANDS * ROWS, 2**64 - 1, np.uint64)
  for begin in range(0, len(hashes), _TOKENS_AT_ONCE):
    part = hashes[begin : begin + _TOKENS_AT_ONCE].astype(np.uint64)
    mixed = _mix(part[None] ^ _SEEDS[:, None])
    minima = np.minimum(minima, mixed.min(1))
  keys = np.arange(BANDS, dtype=np.uint64)
  for row in minima.reshape(BANDS, ROWS).T:
    keys = _mix(keys ^ row)
  return keys


def _mix(values: np.ndarray) -> np.ndarray:
  """A permutation of uint64 whose results look drawn (SplitMix64)."""
  values = values + np.uint64(0x9E3779B97F4A7C15)
  values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return values ^ values >> np.uint64(31)


# Far from any hash of a token, so that no two of them give the same values.
_SEEDS = _mix(np.arange(BANDS * ROWS, dtype=np.uint64) << np.uint64(32))


def mark_near_duplicates(
    read_keys: Callable[[int, int], np.ndarray],
    sizes: Sequence[int],
    read_set: Callable[[int], np.ndarray],
    set_sizes: np.ndarray,
    is_held_out: np.ndarray,
    keys_in_memory: int = _KEYS_IN_MEMORY,
) -> np.ndarray:
  """Marks the pairs that are near one before; those held out come last.

  Args:
    read_keys: (band, unit) to the keys of the unit's pairs, uint64.
    sizes: number of pairs of each unit.
    read_set: the hashed tokens of a pair, by its index in all units.
    set_sizes: their number, int [pairs].
    is_held_out: bool [pairs].
    keys_in_memory: how many are compared at a time.

  Returns:
    bool [pairs].
  """
  total = sum(sizes)
  first_of_unit = np.cumsum([0, *sizes])
  is_near = np.zeros(total, bool)
  cached_set = functools.lru_cache(_SETS_IN_MEMORY)(
      lambda index: frozenset(read_set(index).tolist())
  )
  num_ranges = -(-total // keys_in_memory)
  for band in range(BANDS):
    for number in range(num_ranges):
      # Keys are uniform, so ranges of equal width hold about equally many.
      first = np.uint64(number * 2**64 // num_ranges)
      last = np.uint64((number + 1) * 2**64 // num_ranges - 1)
      places, parts = [], []
      for unit in range(len(sizes)):
        keys = read_keys(band, unit)
        inside = np.flatnonzero((keys >= first) & (keys <= last))
        places.append(inside + first_of_unit[unit])
        parts.append(keys[inside])
      for group in _groups(np.concatenate(parts), np.concatenate(places)):
        in_turn = group[np.argsort(is_held_out[group], kind='stable')]
        _compare(in_turn, is_near, cached_set, set_sizes)
  return is_near


def _groups(keys: np.ndarray, places: np.ndarray) -> Iterator[np.ndarray]:
  """The places that share a key with others, ascending, a key at a time."""
  order = np.argsort(keys, kind='stable')
  keys = keys[order]
  borders = np.flatnonzero(keys[1:] != keys[:-1]) + 1
  begins, ends = np.append(0, borders), np.append(borders, len(keys))
  for number in np.flatnonzero(ends - begins > 1).tolist():
    yield places[order[begins[number] : ends[number]]]


def _compare(
    group: np.ndarray,
    is_near: np.ndarray,
    cached_set: Callable[[int], frozenset[int]],
    set_sizes: np.ndarray,
) -> None:
  """Marks those of a group that are near one before them."""
  members = group.tolist()
  numbers = set_sizes[group].tolist()
  for later in range(1, len(members)):
    if is_near[members[later]]:
      continue
    for before in range(min(later, _COMPARED)):
      less, more = sorted((numbers[before], numbers[later]))
      # A quick no: what both hold is no more than the smaller. Codes without
      # a name are like no other.
      if less and 5 * less >= 4 * more and are_near(
          cached_set(members[before]), cached_set(members[later])
      ):
        is_near[members[later]] = True
        break


def are_near(one: frozenset, other: frozenset) -> bool:
  """Whether the Jaccard similarity of two sets is at least 0.8.

  >>> are_near(frozenset('abcd'), frozenset('abcde'))
  True
  >>> are_near(frozenset('abc'), frozenset('abcd'))
  False
  """
  common = len(one & other)
  return 5 * common >= 4 * (len(one) + len(other) - common)
