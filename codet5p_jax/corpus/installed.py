"""The interpreter's own library and the packages installed beside it."""

import email.message
import importlib.metadata
import os
import pathlib
import sysconfig
from collections.abc import Iterator

from codet5p_jax.corpus.licences import join_licences, normalise_licence
from codet5p_jax.corpus.source_files import (
    UNKNOWN,
    language_of_path,
    normalise_origin,
)
from codet5p_jax.corpus.units import PlannedFile
from codet5p_jax.errors import UserError

_OURSELVES = 'codet5p-jax'

# Folders of the standard library that hold tests or vendored packages.
_SKIPPED = {
    '__pycache__',
    'ensurepip',
    'idle_test',
    'lib2to3',
    'site-packages',
    'test',
    'tests',
}


def standard_library() -> Iterator[PlannedFile]:
  """The running interpreter's own standard library, without its tests.

  Yields:
    Its files in a stable order; a module or package is an origin.
  """
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  paths = sorted(
      path
      for path in root.rglob('*.py')
      if not _SKIPPED & set(path.relative_to(root).parts)
  )
  if not paths:
    raise UserError(
        f"expected the standard library's source in {root}, found no .py "
        f'file; install the interpreter with its library source'
    )
  for path in paths:
    relative = path.relative_to(root)
    origin = normalise_origin(relative.parts[0].removesuffix('.py'))
    yield planned_file(path, relative.as_posix(), origin, 'psf-2.0')


def installed_packages() -> Iterator[PlannedFile]:
  """The source files of the distributions that this interpreter sees.

  Yields:
    Files in a stable order; a distribution is an origin. Our own is left out.
  """
  found = {}
  for distribution in importlib.metadata.distributions():
    origin = normalise_origin(distribution.metadata['Name'] or '')
    # The first one on the path is the one that is imported.
    if origin and origin != _OURSELVES:
      found.setdefault(origin, distribution)
  for origin, distribution in sorted(found.items()):
    licence = distribution_licence(distribution.metadata)
    for file in sorted(distribution.files or (), key=str):
      if language_of_path(file.as_posix()) == UNKNOWN:
        continue
      path = pathlib.Path(os.path.normpath(distribution.locate_file(file)))
      # What was removed since, or is listed outside of the packages.
      if '..' not in file.parts and path.is_file():
        yield planned_file(path, file.as_posix(), origin, licence)


def distribution_licence(metadata: email.message.Message) -> str:
  """The licence a distribution states: expression, classifiers, free text."""
  if expression := metadata.get('License-Expression'):
    return normalise_licence(expression)
  classified = [
      line
      for line in metadata.get_all('Classifier') or ()
      if line.startswith('License ::')
  ]
  licence = join_licences(classified)
  if licence != UNKNOWN:
    return licence
  return normalise_licence(metadata.get('License') or '')


def planned_file(
    path: pathlib.Path, shown: str, origin: str, licence: str
) -> PlannedFile:
  """The file with its size and time."""
  status = path.stat()
  return PlannedFile(
      str(path), shown, origin, licence, status.st_size, status.st_mtime_ns
  )
