"""Source files on their way into a corpus."""

import dataclasses
import hashlib
import pathlib
import re
import sysconfig
from collections.abc import Iterator

from codet5p_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """One file of source code.

  Attributes:
    text: its content.
    language: in lower case, such as "python".
    licence: SPDX identifier, or "unknown".
    origin: the package or repository; splits are drawn by origin.
    path: within the origin's source tree, for people.
  """

  text: str
  language: str
  licence: str
  origin: str
  path: str

  @property
  def hash(self) -> str:
    """Equal for files that differ in white space only (paper, 4.1)."""
    squeezed = re.sub(r'\s+', '', self.text)
    return hashlib.sha256(squeezed.encode('utf-8', 'replace')).hexdigest()


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


def standard_library() -> Iterator[SourceFile | None]:
  """The running interpreter's own standard library, without its tests.

  Yields:
    Files in a stable order; None for one that is not valid UTF-8.
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
    try:
      text = path.read_text(encoding='utf-8')
    except UnicodeDecodeError:
      yield None
      continue
    yield SourceFile(
        text=text,
        language='python',
        licence='PSF-2.0',
        origin=relative.parts[0].removesuffix('.py'),
        path=relative.as_posix(),
    )
