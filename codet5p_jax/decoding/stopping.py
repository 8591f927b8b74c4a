"""Texts at which a completion ends."""

import bisect
from collections.abc import Callable, Sequence


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str | None:
  """The text before the first stop string in it; None if there is none.

  >>> cut_at_stop('return 1' + chr(10) + 'def g():', [chr(10) + 'def'])
  'return 1'
  """
  found = [text.find(stop) for stop in stop_strings]
  found = [place for place in found if place >= 0]
  return text[: min(found)] if found else None


def tokens_until_stop(
    tokens: Sequence[int],
    render: Callable[[Sequence[int]], str],
    stop_strings: Sequence[str],
) -> int | None:
  """How many tokens it takes until their text has a stop string; None: none.

  Args:
    tokens: generated, without an end token.
    render: gives their text.
    stop_strings: none of them empty.
  """

  def has_stop(count: int) -> bool:
    return cut_at_stop(render(tokens[:count]), stop_strings) is not None

  if not stop_strings or not has_stop(len(tokens)):
    return None
  return bisect.bisect_left(range(len(tokens)), True, key=has_stop)
