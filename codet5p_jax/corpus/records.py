"""ArrayRecord files: written, opened, and what is said of damaged ones.

The library is imported within the functions; none of it needs TensorFlow.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from codet5p_jax.errors import UserError


def open_writer(path: pathlib.Path) -> Any:
  """A writer of records, with `write` and `close`."""
  from array_record.python.array_record_module import ArrayRecordWriter

  # One record a group: a record is read without decoding its neighbours.
  return ArrayRecordWriter(os.fspath(path), 'group_size:1')


def open_source(path: pathlib.Path) -> Any:
  """The records of a file, by index."""
  from array_record.python.array_record_data_source import (
      ArrayRecordDataSource,
  )

  return ArrayRecordDataSource(os.fspath(path))


@contextlib.contextmanager
def explaining_damage(
    path: pathlib.Path, whole: str, found: str, advice: str
) -> Iterator[None]:
  """One clear line for a file or folder that is damaged.

  Args:
    path: of it.
    whole: what is expected there, such as 'a whole token store'.
    found: how it is found, such as 'it damaged'.
    advice: what to do.

  Raises:
    UserError: reading it failed within.
  """
  try:
    yield
  # ArrayRecord raises RuntimeError, also for a file that is missing.
  except (
      RuntimeError, ValueError, KeyError, TypeError, IndexError, OSError
  ) as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    raise UserError(
        f'expected {whole} in {path}, found {found} ({reason}); {advice}'
    ) from error
