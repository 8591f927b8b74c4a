"""A run's folder, which describes itself: nothing else is needed to use it.

    config.json       model, objectives, optimizer, fingerprints
    vocabulary/       the tokenizer's files
    metrics.jsonl     one JSON object a line
    timeline.jsonl    where the time went, see training/timeline.py
    events/           for TensorBoard
    parts.json        what the model is made of: trained or frozen, from where
    checkpoints/      one folder per step; damaged ones in damaged/
    model/            weights alone; without frozen ones that lie elsewhere
    bad_steps/        batches of steps that ended the run, or were replayed
    evaluation/       <split>/metrics.json, by `evaluate`
    generation/       outputs.jsonl, by `generate`
    compiled/         programs, for a run that starts again
    report.md         what happened, in words; its curves are in report/

The `format_version` of config.json covers the whole folder, the schema of
metrics.jsonl included.
"""

import dataclasses
import importlib
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codet5p_jax.errors import UserError
from codet5p_jax.storage import explaining_storage_faults, local_path
from codet5p_jax.training.files import (
    ForeignFile,
    read_json,
    write_bytes,
    write_json,
    write_text,
)

# Whence the classes of a configuration may come.
_PACKAGE = 'codet5p_jax'

_CLASS_KEYS = {'class', 'fields'}


@dataclasses.dataclass(frozen=True)
class RunFolder:
  """Where the parts of a run lie.

  Attributes:
    path: the folder, absolute.
  """

  path: Path

  @property
  def config(self) -> Path:
    return self.path / 'config.json'

  @property
  def metrics(self) -> Path:
    return self.path / 'metrics.jsonl'

  @property
  def timeline(self) -> Path:
    return self.path / 'timeline.jsonl'

  @property
  def vocabulary(self) -> Path:
    return self.path / 'vocabulary'

  @property
  def events(self) -> Path:
    return self.path / 'events'

  @property
  def checkpoints(self) -> Path:
    return self.path / 'checkpoints'

  @property
  def model(self) -> Path:
    return self.path / 'model'

  @property
  def compiled(self) -> Path:
    return self.path / 'compiled'

  @property
  def lock(self) -> Path:
    return self.path / 'lock.json'

  @property
  def bad_steps(self) -> Path:
    return self.path / 'bad_steps'


def open_run_folder(
    path: str | os.PathLike,
    config: Mapping[str, Any],
    may_differ: Sequence[str] = (),
) -> RunFolder:
  """Creates a run's folder, or enters it again with the same configuration.

  Args:
    path: the folder; missing ones above it are created.
    config: as `describe` takes it; keys are those of config.json.
    may_differ: see `check_config`.

  Raises:
    UserError: the folder cannot be written, or belongs to a run of another
      configuration; every field that differs is named.
  """
  folder = RunFolder(local_path(path))
  with explaining_storage_faults(
      f'cannot write run folder {folder.path}',
      'free space, mend its permissions or choose another folder',
  ):
    folder.path.mkdir(parents=True, exist_ok=True)
    if folder.config.exists():
      check_config(folder, config, may_differ)
      # Finding it unwritable now is better than at the first checkpoint.
      # Named by chance: processes on two hosts may have the same id.
      probe = folder.path / f'.writable.{uuid.uuid4().hex}'
      probe.touch()
      probe.unlink()
    else:
      write_json(folder.config, describe(config))
  return folder


def read_config(path: str | os.PathLike) -> dict[str, Any]:
  """Returns the configuration of a run folder, for `rebuild`.

  Raises:
    UserError: there is none, it is unreadable, or of a newer version.
  """
  config = RunFolder(local_path(path)).config
  try:
    return read_json(config)
  except ForeignFile as error:
    raise UserError(
        f'expected the folder of a run or a converted model, found in {config} '
        f'no format_version; if {config.parent} is in the layout of Hugging '
        f'Face, run `codet5p convert` on it first'
    ) from error


def check_config(
    folder: RunFolder, config: Mapping[str, Any], may_differ: Sequence[str] = ()
) -> None:
  """Compares a run folder's configuration with the one given.

  Args:
    folder: has a config.json.
    config: as `describe` takes it.
    may_differ: fields that a run may go on with changed, such as
      `step.mesh_shape`, with all inside them. The folder keeps its own.

  Raises:
    UserError: they differ; one line with each field, what was given
      (expected) and what the folder has (found).
  """
  found = read_json(folder.config)
  differences = [
      f'{path}: {words}'
      for path, words in _differences('', describe(config), found)
      if not any(f'{path}.'.startswith((f'{x}.', f'{x}[')) for x in may_differ)
  ]
  if differences:
    raise UserError(
        f'run folder {folder.path} has another configuration: '
        f'{"; ".join(differences)}; give the same values, or another folder'
    )


def describe(value: Any, path: str = 'config') -> Any:
  """Returns a configuration as JSON values.

  >>> from codet5p_jax.training.optimizers import SGD
  >>> describe(SGD(learning_rate=0.5))
  {'class': 'codet5p_jax.training.optimizers.SGD',
   'fields': {'learning_rate': 0.5}}

  Args:
    value: None, a number, a string, a tuple or list, a mapping with keys of
      text, or a dataclass of this package; nested as deep as you like.
    path: where it stands, for messages.

  Raises:
    UserError: it is something else, which could not be rebuilt.
  """
  if value is None or type(value) in (bool, int, float, str):
    return value
  if isinstance(value, tuple | list):
    return [describe(x, f'{path}[{i}]') for i, x in enumerate(value)]
  if isinstance(value, Mapping) and all(type(key) is str for key in value):
    if value.keys() == _CLASS_KEYS:
      raise UserError(
          f'expected {path} to have other keys than "class" and "fields", '
          f'which stand for a class; rename one'
      )
    return {key: describe(x, f'{path}.{key}') for key, x in value.items()}
  kind = type(value)
  name = f'{kind.__module__}.{kind.__qualname__}'
  if dataclasses.is_dataclass(kind) and _find_class(name) is kind:
    return {
        'class': name,
        'fields': {
            field.name: describe(
                getattr(value, field.name), f'{path}.{field.name}'
            )
            for field in dataclasses.fields(kind)
            if field.init
        },
    }
  raise UserError(
      f'expected {path} to be None, a number, a string, a tuple, a mapping or '
      f'a dataclass of {_PACKAGE}, found {name}; give one of those'
  )


def rebuild(description: Any) -> Any:
  """Returns the value that `describe` described; lists come back as tuples.

  Imports modules of this package only.

  Raises:
    UserError: a class is unknown or not of this package, or its fields are
      not those described.
  """
  if isinstance(description, list):
    return tuple(rebuild(entry) for entry in description)
  if not isinstance(description, dict):
    return description
  if description.keys() != _CLASS_KEYS:
    return {key: rebuild(entry) for key, entry in description.items()}
  name, fields = str(description['class']), dict(description['fields'])
  kind = _find_class(name)
  if kind is None:
    raise UserError(
        f'expected a dataclass of {_PACKAGE} in the configuration, found '
        f'{name}; use the version of {_PACKAGE} that wrote it'
    )
  expected = {field.name for field in dataclasses.fields(kind) if field.init}
  if unlike := sorted(expected ^ fields.keys()):
    words = [
        f'{field} is {"missing" if field in expected else "unknown"}'
        for field in unlike
    ]
    raise UserError(
        f'expected the fields of {name} in the configuration, found that '
        f'{", ".join(words)}; use the version of {_PACKAGE} that wrote it'
    )
  return kind(**{field: rebuild(entry) for field, entry in fields.items()})


def write_result(path: Path, content: str | bytes | Mapping[str, Any]) -> None:
  """Writes a text, bytes, or JSON values, with the folders above the file.

  Args:
    path: the file in a run folder; replaced only by the whole new one.
    content: a text or bytes as they are; others as `write_json` takes them.

  Raises:
    UserError: the disk is full or the folder not writable.
  """
  with explaining_storage_faults(
      f'cannot write {path}', 'free space or mend its permissions'
  ):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
      write_text(path, content)
    elif isinstance(content, bytes):
      write_bytes(path, content)
    else:
      write_json(path, content)


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
  """Appends one row to metrics.jsonl; it is on its way to the disk at return.

  The file is opened for each row: `trim_metrics` may have replaced it.

  Args:
    path: the file, created if missing.
    row: JSON values, usually with the key `step`. JSON has no number that is
      none: such values become "nan", "inf" and "-inf".

  Raises:
    UserError: the disk is full or the file not writable.
  """
  values = {
      key: str(value)
      if isinstance(value, float) and not math.isfinite(value)
      else value
      for key, value in row.items()
  }
  line = json.dumps(values, allow_nan=False) + '\n'
  with (
      explaining_storage_faults(
          f'cannot write {path}', 'free space or mend its permissions'
      ),
      open(path, 'a', encoding='utf-8', newline='\n') as file,
  ):
    file.write(line)


def trim_metrics(path: Path, step: int) -> None:
  """Drops the rows of steps that a resumed run is going to make again.

  Args:
    path: metrics.jsonl; may be missing.
    step: the restored step. Rows with a greater `step` are dropped, and a
      last line that a killed run left half-written.

  Raises:
    UserError: another line is not JSON, or the file not writable.
  """
  if not path.exists():
    return
  kept = [
      line
      for line, row in _parse_lines(path)
      if not isinstance(row, dict) or row.get('step', step) <= step
  ]
  with explaining_storage_faults(
      f'cannot write {path}', 'free space or mend its permissions'
  ):
    write_text(path, ''.join(f'{line}\n' for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Reads the rows of metrics.jsonl, or of another file of rows.

  A last line that is half-written, by a run that was killed or goes on, is
  left out.

  Args:
    path: may be missing.

  Raises:
    UserError: another line is not JSON.
  """
  if not path.exists():
    return []
  return [row for _, row in _parse_lines(path) if isinstance(row, dict)]


def _parse_lines(path: Path) -> list[tuple[str, Any]]:
  """Returns (line, value) of each line but a half-written last one."""
  text = path.read_text(encoding='utf-8', errors='replace')
  lines = text.removesuffix('\n').split('\n')
  parsed = []
  for number, line in enumerate(lines, start=1):
    try:
      parsed.append((line, json.loads(line)))
    except ValueError as error:
      if number == len(lines):
        break
      raise UserError(
          f'expected JSON in line {number} of {path}, found {line[:40]!r}; '
          f'delete that line'
      ) from error
  return parsed


def _find_class(name: str) -> type | None:
  """Returns a dataclass of this package by its full name, or None."""
  module_name, _, class_name = name.rpartition('.')
  if not f'{module_name}.'.startswith(f'{_PACKAGE}.'):
    return None
  try:
    kind = getattr(importlib.import_module(module_name), class_name, None)
  except ModuleNotFoundError:
    return None
  is_ours = isinstance(kind, type) and dataclasses.is_dataclass(kind)
  return kind if is_ours else None


def _differences(
    path: str, expected: Any, found: Any
) -> list[tuple[str, str]]:
  """Returns (path, "expected ..., found ...") of each field that differs."""
  if isinstance(expected, dict) and isinstance(found, dict):
    differences = []
    for key in [*expected, *(key for key in found if key not in expected)]:
      # "fields" stands between any two names of a path, so it says nothing.
      inner = path if key == 'fields' else f'{path}.{key}' if path else key
      if key not in found:
        shown = _shown(expected[key])
        differences.append((inner, f'expected {shown}, found none'))
      elif key not in expected:
        shown = _shown(found[key])
        differences.append((inner, f'expected none, found {shown}'))
      else:
        differences += _differences(inner, expected[key], found[key])
    return differences
  if isinstance(expected, list) and isinstance(found, list):
    if len(expected) == len(found):
      return [
          difference
          for index, (x, y) in enumerate(zip(expected, found, strict=True))
          for difference in _differences(f'{path}[{index}]', x, y)
      ]
  elif expected == found and isinstance(expected, bool) == isinstance(
      found, bool
  ):
    return []
  return [(path, f'expected {_shown(expected)}, found {_shown(found)}')]


def _shown(value: Any) -> str:
  """Returns a value on one line, cut where it gets long."""
  text = json.dumps(value)
  return text if len(text) <= 80 else f'{text[:77]}...'
