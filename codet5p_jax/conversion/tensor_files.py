"""Tensors of a folder in Hugging Face's layout, one at a time.

Reads safetensors, and PyTorch's .bin through `weights_only` and `mmap`: no
code of a pickle runs, and a tensor costs memory only while it is looked at.
One file or shards, with an index or without.
"""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codet5p_jax.errors import UserError

_SAFETENSORS, _BIN = 'safetensors', 'bin'
# transformers prefers them in this order.
_STEMS = {_SAFETENSORS: 'model', _BIN: 'pytorch_model'}


class TensorFiles:
  """The tensors of a folder.

  Attributes:
    folder: where the files lie.
    shapes: shape and dtype as on disk of each tensor, by name.
  """

  def __init__(self, folder: Path):
    """Opens a folder's files and reads what they hold, but no tensor.

    Raises:
      UserError: there are none, one is missing, damaged or holds more than
        tensors, or they do not hold what the index says.
    """
    self.folder = folder
    self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
    self._readers: dict[str, Callable[[str], np.ndarray]] = {}
    files, index = _find_files(folder)
    for path in files:
      opened = _open_safetensors if path.suffix == '.safetensors' else _open_bin
      shapes, read = opened(path)
      for name in shapes:
        if name in self.shapes:
          raise UserError(
              f'expected each tensor once in {folder}, found {name} in '
              f'{path.name} and in another shard; remove files that do not '
              f'belong to the model'
          )
        if index is not None and index.get(name) != path.name:
          raise UserError(
              f'expected in {path} what the index of the shards says, found '
              f'{name}, which is not there by the index; copy the folder again'
          )
      self.shapes |= shapes
      self._readers |= dict.fromkeys(shapes, read)
    missing = [name for name in index or () if name not in self.shapes]
    if missing:
      raise UserError(
          f'expected in {folder} the tensors of its index, found no '
          f'{missing[0]} in {index[missing[0]]}; copy the folder again'
      )

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor with the dtype of the file; perhaps a view of it.

    Raises:
      UserError: the file cannot be read any more.
    """
    return self._readers[name](name)


def has_tensors(folder: Path) -> bool:
  """Whether a folder has weights in Hugging Face's layout."""
  return any(
      path.suffix[1:] in _STEMS or path.name.endswith('.index.json')
      for stem in _STEMS.values()
      for path in folder.glob(f'{stem}*')
  )


def _find_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
  """Returns the files, and {tensor: file} where there is an index."""
  for kind, stem in _STEMS.items():
    whole = folder / f'{stem}.{kind}'
    index = folder / f'{stem}.{kind}.index.json'
    if whole.exists():
      return [whole], None
    if index.exists():
      return _from_index(index)
    if shards := _shards_without_index(folder, kind, stem):
      return shards, None
  raise UserError(
      f'expected model.safetensors or pytorch_model.bin in {folder}, or their '
      f'shards, found none; give a folder of a model'
  )


def _from_index(index: Path) -> tuple[list[Path], dict[str, str]]:
  content = read_json_object(index)
  names = content.get('weight_map')
  if not isinstance(names, dict) or not all(
      # No path that leaves the folder.
      isinstance(file, str) and Path(file).name == file
      for file in names.values()
  ):
    raise UserError(
        f'expected in {index} a weight_map from tensors to files, found none; '
        f'copy the file again'
    )
  files = [index.parent / file for file in sorted(set(names.values()))]
  for path in files:
    if not path.exists():
      raise UserError(
          f'expected the shard {path}, which the index names, found none; copy '
          f'it beside the others'
      )
  return files, names


def _shards_without_index(folder: Path, kind: str, stem: str) -> list[Path]:
  """Returns all shards, named `stem-00001-of-00005.kind`, or none at all."""
  pattern = re.compile(rf'{stem}-(\d+)-of-(\d+)\.{kind}')
  found = {}
  for path in folder.iterdir():
    if match := pattern.fullmatch(path.name):
      found[int(match[1]), int(match[2])] = path
  if not found:
    return []
  counts = {count for _, count in found}
  (count, *others) = counts
  missing = sorted({(i, count) for i in range(1, count + 1)} - found.keys())
  if others or missing:
    raise UserError(
        f'expected all shards of one model in {folder}, found '
        f'{len(found)} of {max(counts)}'
        + (f', without number {missing[0][0]}' if missing else '')
        + '; copy the others beside them'
    )
  return [found[key] for key in sorted(found)]


def _open_safetensors(
    path: Path,
) -> tuple[dict[str, jax.ShapeDtypeStruct], Callable[[str], np.ndarray]]:
  from safetensors import SafetensorError, safe_open

  dtypes = {
      'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16',
      'I64': 'int64', 'I32': 'int32', 'I16': 'int16', 'I8': 'int8',
      'U8': 'uint8', 'BOOL': 'bool',
  }  # fmt: skip
  try:
    file = safe_open(path, framework='np')
    shapes = {}
    for name in file.keys():  # noqa: SIM118. It is no mapping.
      tensor = file.get_slice(name)
      kind = tensor.get_dtype()
      if kind not in dtypes:
        raise UserError(
            f'expected numbers of an ordinary type in {path}, found {kind} in '
            f'{name}; give the weights as float16, bfloat16 or float32'
        )
      shapes[name] = _shape(tensor.get_shape(), dtypes[kind])
  except (SafetensorError, OSError) as error:
    raise _damaged(path, error) from error
  return shapes, file.get_tensor


def _open_bin(
    path: Path,
) -> tuple[dict[str, jax.ShapeDtypeStruct], Callable[[str], np.ndarray]]:
  try:
    import torch
  except ImportError as error:
    raise UserError(
        f'expected PyTorch, which reading {path} needs, found none; `pip '
        f'install codet5p_jax[torch]`, or give the model as safetensors'
    ) from error
  _check_archive(path)
  try:
    content = torch.load(
        path, map_location='cpu', weights_only=True, mmap=True
    )
  except Exception as error:  # Its classes do not tell the two cases apart.
    if 'Weights only load failed' in str(error):
      raise UserError(
          f'expected tensors alone in {path}, found a pickle that runs code or '
          f'holds other objects; nothing of it was run: give the model as '
          f'safetensors'
      ) from error
    raise _damaged(path, error) from error
  if not isinstance(content, dict) or not all(
      isinstance(name, str) and isinstance(tensor, torch.Tensor)
      for name, tensor in content.items()
  ):
    raise UserError(
        f'expected in {path} tensors by name, found other values; give the '
        f'file that `save_pretrained` wrote'
    )
  shapes = {
      name: _shape(tensor.shape, str(tensor.dtype).removeprefix('torch.'))
      for name, tensor in content.items()
  }

  def read(name: str) -> np.ndarray:
    tensor = content[name].detach()
    if tensor.dtype == torch.bfloat16:  # numpy's own types lack it.
      return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()

  return shapes, read


def _check_archive(path: Path) -> None:
  """Reads a .bin once through and compares its checksums; mmap does not."""
  with open(path, 'rb') as file:
    if file.read(2) == b'\x80\x02':
      raise UserError(
          f'expected in {path} the format of PyTorch 1.6 and later, found the '
          f'one before; load and save it once with `torch.load` and '
          f'`torch.save`'
      )
  try:
    with zipfile.ZipFile(path) as archive:
      damaged = archive.testzip()
  except (zipfile.BadZipFile, OSError, EOFError) as error:
    raise _damaged(path, error) from error
  if damaged is not None:
    raise _damaged(path, f'checksum of {damaged}')


def _shape(shape: Any, dtype: str) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))


def _damaged(path: Path, error: Any) -> UserError:
  words = ' '.join(str(error).split())
  return UserError(
      f'expected whole tensors in {path}, found that it is cut short or '
      f'damaged ({words[:200]}); copy it again'
  )


def read_json_object(path: Path) -> dict[str, Any]:
  """Returns the object of a JSON file that is not ours.

  Raises:
    UserError: it is missing, unreadable, or no object.
  """
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    words = ' '.join(str(error).split())
    raise UserError(
        f'expected JSON in {path}, found something unreadable ({words}); copy '
        f'the file again'
    ) from error
  if not isinstance(content, dict):
    raise UserError(
        f'expected a JSON object in {path}, found a {type(content).__name__}; '
        f'copy the file again'
    )
  return content
