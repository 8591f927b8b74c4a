"""What a word is, for whole-word masking."""

import numpy as np
import numpy.typing as npt

_OTHER, _IDENTIFIER, _WHITESPACE = range(3)


def _make_classes() -> npt.NDArray[np.uint8]:
  """Returns the class of each code point up to the last whitespace one."""
  classes = np.full(0x3000 + 2, _OTHER, np.uint8)
  for first, last in ('09', 'AZ', 'az', '__'):
    classes[ord(first) : ord(last) + 1] = _IDENTIFIER
  # What str.isspace accepts: the control characters and separators of Unicode.
  for first, last in (
      (0x09, 0x0D), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680),
      (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F),
      (0x3000, 0x3000),
  ):  # fmt: skip
    classes[first : last + 1] = _WHITESPACE
  return classes


_CLASSES = _make_classes()


def word_starts_by_byte(text: str) -> npt.NDArray[np.bool_]:
  """Marks the first byte of each word in a text's UTF-8.

  A word is a run of [A-Za-z0-9_], a run of whitespace (as `str.isspace` has
  it), or one other character:

  'a_1 =\\n' gives True, False, False, True, True, True.

  Args:
    text: Any text without lone surrogates.

  Returns:
    [bytes]; True at the first byte of a word.
  """
  points = np.frombuffer(text.encode('utf-32-le'), np.dtype('<u4'))
  # Everything above the table is, like its last entry, an other character.
  classes = _CLASSES[np.minimum(points, len(_CLASSES) - 1)]
  starts = np.ones(len(points), np.bool_)
  starts[1:] = (classes[1:] != classes[:-1]) | (classes[1:] == _OTHER)
  if text.isascii():
    return starts
  widths = 1 + sum(
      (points >= bound).astype(np.int64) for bound in (0x80, 0x800, 0x10000)
  )
  ends = np.cumsum(widths)
  starts_by_byte = np.zeros(ends[-1], np.bool_)
  starts_by_byte[ends - widths] = starts
  return starts_by_byte
