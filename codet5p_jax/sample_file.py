"""A file of samples that grows by whole batches, and goes on after a kill.

One JSON object a line, a line a completion. What batches there are follows from
the prompts and settings, so a file tells how far it came; a batch of which some
lines are missing is made again as a whole.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from codet5p_jax.errors import UserError
from codet5p_jax.storage import local_path
from codet5p_jax.training.files import sync

# As every row begins, and so what is left of one.
_BEGINNING = b'{"prompt_id": '

# Prompt and number of each sample of a batch, in order.
BatchNames = Sequence[tuple[str, int]]


class SampleFile:
  """See `open_sample_file`.

  Attributes:
    batches_done: how many batches it holds.
  """

  def __init__(self, file: Any, batches_done: int):
    self._file = file
    self.batches_done = batches_done

  def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds the rows of the next batch; they outlive a kill and a power cut.

    Raises:
      UserError: the disk is full. What was written of the batch will be
        dropped.
    """
    content = b''.join(_line(row) for row in rows)
    try:
      while content:  # A disk that fills up takes a part, and then none.
        content = content[self._file.write(content) :]
      os.fsync(self._file.fileno())
    except OSError as error:
      raise UserError(
          f'cannot write {self._file.name}: {error.strerror}; mend that, and '
          f'give the same command to go on'
      ) from error
    self.batches_done += 1


@contextlib.contextmanager
def open_sample_file(
    path: str | os.PathLike,
    batches: Sequence[BatchNames],
    settings: Mapping[str, Any],
) -> Iterator[SampleFile]:
  """Opens a file of samples to add to; drops what is left of a broken batch.

  Args:
    path: the file, made if there is none. Its folder must exist.
    batches: all that the file shall hold.
    settings: what every row has as `settings`.

  Raises:
    UserError: another process writes to it, or it holds something else than
      the first samples of these batches. It is then left as it is.
  """
  path = local_path(path)
  if not path.parent.is_dir():
    raise UserError(
        f'expected a folder {path.parent} for the samples, found none; make it '
        f'or set OUTPUT'
    )
  if path.suffix == '.gz' or (path.exists() and not path.is_file()):
    raise UserError(
        f'expected a plain file for the samples, found {path}; set OUTPUT to '
        f'another, such as samples.jsonl'
    )
  try:
    # Without a buffer, which would be written once more as it is closed.
    file = open(path, 'ab', buffering=0)
  except OSError as error:
    raise UserError(
        f'cannot write {path}: {error.strerror}; mend that or set OUTPUT'
    ) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise UserError(
          f'expected to be the only one to write to {path}, found another '
          f'`codet5p generate`, or a disk without locks; wait for it or set '
          f'OUTPUT'
      ) from None
    with open(path, 'rb') as written:
      done, size = _measure(path, written, batches, settings)
    file.truncate(size)
    sync(path.parent)
    yield SampleFile(file, done)


def _measure(
    path: Path,
    file: Any,
    batches: Sequence[BatchNames],
    settings: Mapping[str, Any],
) -> tuple[int, int]:
  """How many whole batches a file holds, and their bytes."""
  # As it comes back from JSON, in which a tuple is a list.
  settings = json.loads(json.dumps(settings))
  size = number = 0
  for done, names in enumerate(batches):
    end = size
    for prompt_id, sample in names:
      line = file.readline()
      number += 1
      is_whole = line.endswith(b'\n')
      if not is_whole and _BEGINNING.startswith(line[: len(_BEGINNING)]):
        return done, size
      try:
        row = json.loads(line)
        found = row['prompt_id'], row['sample']
        found_settings = row['settings']
        is_ours = is_whole and isinstance(found_settings, dict)
      except (ValueError, LookupError, TypeError):
        is_ours = False
      if not is_ours:
        raise UserError(
            f'expected samples in {path}, found something else in row '
            f'{number}; set OUTPUT to another file, or remove this one'
        )
      if found_settings != settings:
        names = sorted(
            name
            for name in settings.keys() | found_settings.keys()
            if settings.get(name) != found_settings.get(name)
        )
        raise UserError(
            f'expected samples of the same settings in {path} to add to, found '
            f'another {_changes(names, found_settings, settings)}; set OUTPUT '
            f'to another file'
        )
      if found != (prompt_id, sample):
        raise UserError(
            f'expected sample {sample} of {prompt_id} in row {number} of '
            f'{path}, found sample {found[1]} of {found[0]}; set OUTPUT to '
            f'another file'
        )
      end += len(line)
    size = end
  if file.readline():
    raise UserError(
        f'expected {number} samples in {path}, found more; set OUTPUT to '
        f'another file'
    )
  return len(batches), size


def _changes(
    names: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]
) -> str:
  """Names settings with their values, those that have short ones."""
  told = []
  for name in names:
    values = f'{before.get(name)} before, {now.get(name)} now'
    told.append(f'{name} ({values})' if len(values) < 160 else name)
  return ', '.join(told)


def _line(row: Mapping[str, Any]) -> bytes:
  return json.dumps(row).encode('ascii') + b'\n'
