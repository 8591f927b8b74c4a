"""The files of a vocabulary: reading, checking and writing them.

Files are passed as bytes by name. Those of a byte-level BPE are rewritten in
one form, so that two spellings of the same vocabulary (escaped or not, with or
without the sentinels) have one fingerprint.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from codet5p_jax import errors

_MERGES_HEADER = '#version: 0.2'


def require_description(path: pathlib.Path, theirs: pathlib.Path) -> None:
  """Checks that a folder is one that `Vocabulary.save` wrote.

  Args:
    path: of its description.
    theirs: a file that Hugging Face's folders have.

  Raises:
    UserError: There is no description; says where one comes from.
  """
  if path.exists():
    return
  if theirs.exists():
    raise errors.UserError(
        f'expected a vocabulary folder of this program, found in {path.parent} '
        f'the files of Hugging Face; run `codet5p convert` on the model they '
        f'belong to, and give the folder vocabulary/ of its target'
    )
  raise errors.UserError(
      f'expected a vocabulary in {path.parent}, found no {path.name} there; '
      f'give a folder named vocabulary/ of a corpus, a run or a converted '
      f'model, or put a copy of one there'
  )


def read(path: str | os.PathLike[str]) -> bytes:
  """Returns a file's content.

  Raises:
    UserError: There is no such file, or it cannot be read.
  """
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as error:
    raise errors.UserError(
        f'expected the vocabulary file {path}, but cannot read it: '
        f'{error.strerror}; check the path'
    ) from error


def fingerprint(kind: str, files: Mapping[str, bytes]) -> str:
  """Returns the hex SHA-256 of a kind and of named contents, in any order."""
  digest = hashlib.sha256(kind.encode())
  for name, content in sorted(files.items()):
    # Lengths keep the borders between contents in the hash.
    digest.update(f'\n{name} {len(content)}\n'.encode())
    digest.update(content)
  return digest.hexdigest()


def parse_json_object(
    content: bytes, path: str | os.PathLike[str]
) -> dict[str, Any]:
  """Parses a JSON object; `path` names it in errors.

  Raises:
    UserError: It is something else.
  """
  try:
    parsed = json.loads(content)
  except ValueError as error:
    raise errors.UserError(
        f'{path} should be JSON, but is not ({one_line(error)}); the file is '
        'damaged or another'
    ) from error
  if not isinstance(parsed, dict):
    raise errors.UserError(
        f'{path} should be a JSON object, but is a {type(parsed).__name__}; '
        'the file is damaged or another'
    )
  return parsed


def parse_pieces(content: bytes, path: str | os.PathLike[str]) -> list[str]:
  """Returns the pieces of a `vocab.json` in the order of their ids.

  Raises:
    UserError: It is no `vocab.json`, or its ids are not 0, 1, 2, ...
  """
  ids = parse_json_object(content, path)
  try:
    pieces = sorted(ids, key=ids.__getitem__)
  except TypeError:
    pieces = []
  if not pieces or [ids[piece] for piece in pieces] != list(range(len(ids))):
    raise errors.UserError(
        f'{path} should give pieces the ids 0 to {len(ids) - 1}, but does not; '
        'the file is damaged or no vocab.json'
    )
  return pieces


def format_pieces(pieces: Sequence[str]) -> bytes:
  """Returns a `vocab.json` with the pieces in the order of their ids."""
  ids = {piece: index for index, piece in enumerate(pieces)}
  return json.dumps(ids, ensure_ascii=False).encode()


def parse_merges(
    content: bytes, path: str | os.PathLike[str]
) -> list[tuple[str, str]]:
  """Returns the pairs of a `merges.txt`, earliest first.

  Raises:
    UserError: It is no `merges.txt`.
  """
  try:
    # Not splitlines, which would also split at characters within pieces.
    lines = content.decode().replace('\r\n', '\n').split('\n')
  except UnicodeDecodeError as error:
    raise errors.UserError(
        f'{path} should be UTF-8, but is not; the file is damaged or another '
        '(compressed ones must be unpacked)'
    ) from error
  # Only the first line can be a header: `#` begins merges too.
  if lines[0].startswith('#version'):
    lines = lines[1:]
  merges = []
  for line in lines:
    if not line:
      continue
    pair = tuple(line.split(' '))
    if len(pair) != 2 or not all(pair):
      raise errors.UserError(
          f'{path} should hold two pieces a line, but one line is '
          f'{line[:40]!r}; the file is damaged or no merges.txt'
      )
    merges.append(pair)
  return merges


def format_merges(merges: Sequence[tuple[str, str]]) -> bytes:
  """Returns a `merges.txt`."""
  lines = [_MERGES_HEADER, *(f'{left} {right}' for left, right in merges)]
  return ('\n'.join(lines) + '\n').encode()


def piece_bytes(pieces: Sequence[str]) -> list[bytes]:
  """Returns the bytes that byte-level pieces spell.

  GPT-2's way of writing bytes: those that print stand for themselves in
  Latin-1, and the others are U+0100 and the following, in order.

  Raises:
    UserError: A piece is not written so, or one of the 256 bytes has no piece
      of its own, so that some text could not be encoded.
  """
  printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = [byte for byte in range(256) if byte not in printing]
  written = {byte: byte for byte in printing}
  written |= {0x100 + index: byte for index, byte in enumerate(others)}
  try:
    spelled = [piece.translate(written).encode('latin-1') for piece in pieces]
  except UnicodeEncodeError as error:
    raise errors.UserError(
        'vocab.json should hold byte-level pieces, but one holds '
        f'{error.object[error.start]!r}; give the file of a byte-level BPE'
    ) from error
  missing = 256 - len({piece for piece in spelled if len(piece) == 1})
  if missing:
    raise errors.UserError(
        f'vocab.json should hold a piece for each of the 256 bytes, but '
        f'{missing} have none; give the file of a byte-level BPE'
    )
  return spelled


def one_line(error: Exception) -> str:
  """Returns the message of a library's error on one line."""
  return ' '.join(str(error).split())
