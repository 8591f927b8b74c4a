"""Words, numbers and tables as a report has them."""

import re
import textwrap
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table that is also one to the eye."""
  columns = list(zip(header, *rows))
  widths = [max(map(len, column)) for column in columns]
  is_text = [
      any(cell[:1].isalpha() and cell != 'n/a' for cell in column[1:])
      for column in columns
  ]
  lines = [
      '| ' + ' | '.join(
          f'{cell:<{width}}' if left else f'{cell:>{width}}'
          for cell, width, left in zip(row, widths, is_text)
      ) + ' |'
      for row in (header, *rows)
  ]  # fmt: skip
  rule = '|'.join(
      '-' * (width + 2) if left else '-' * (width + 1) + ':'
      for width, left in zip(widths, is_text)
  )
  return '\n'.join([lines[0], f'|{rule}|', *lines[1:]])


def fenced(text: str, language: str = '') -> str:
  """A block of code, whatever backticks are in it."""
  longest = max(map(len, re.findall('`+', text)), default=0)
  fence = '`' * max(3, longest + 1)
  return f'{fence}{language}\n{text.rstrip()}\n{fence}'


def paragraph(text: str) -> str:
  return textwrap.fill(
      text, 80, break_long_words=False, break_on_hyphens=False
  )


def listed(names: Sequence[str]) -> str:
  *first, last = names
  return f'{", ".join(first)} and {last}' if first else last


def number(value: float | int | str | None, form: str) -> str:
  if isinstance(value, str):
    return value  # What is not finite is no number in JSON.
  return 'n/a' if value is None else format(value, form)


def rounded(number: float | int) -> str:
  """A number in words, of three digits: 2,500,000 is "2.5 million"."""
  for size, word in ((1e9, 'billion'), (1e6, 'million')):
    if number >= size:
      return f'{number / size:.3g} {word}'
  return f'{number:,.0f}'


def duration(seconds: float | int) -> str:
  if seconds < 60:
    return f'{seconds:.3g} s'
  minutes = round(seconds / 60)
  return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else (
      f'{minutes} min')
