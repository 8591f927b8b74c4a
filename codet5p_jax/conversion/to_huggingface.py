"""Our weights to a folder in Hugging Face's layout.

    config.json, generation_config.json
    model.safetensors, or shards of at most 1 GB and their index
    vocab.json, merges.txt, ... as the released repositories have them
    modeling_*.py, configuration_*.py, where transformers has no such class
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codet5p_jax.conversion.families import family_of_config
from codet5p_jax.conversion.gate import compare_modules
from codet5p_jax.conversion.huggingface_folder import open_huggingface_folder
from codet5p_jax.conversion.remote_code import find_remote_code
from codet5p_jax.conversion.sources import WeightSource
from codet5p_jax.conversion.tables import Family, Row
from codet5p_jax.conversion.target_folder import whole_or_nothing
from codet5p_jax.conversion.to_ours import (
    Advance,
    reading_what_was_written,
    require_vocabulary,
)
from codet5p_jax.conversion.tokenizer_files import write_tokenizer
from codet5p_jax.errors import UserError
from codet5p_jax.training.checkpoints.fingerprint import digest_array

DTYPES = ('float16', 'bfloat16', 'float32')

_SHARD_BYTES = 10**9


def without_layout(weights: WeightSource) -> tuple[WeightSource, list[str]]:
  """Leaves out what Hugging Face's layout has no place for.

  Returns:
    The weights that it has a place for, and the paths of the others: only
    training needs them.

  Raises:
    UserError: it has no such family of models.
  """
  rows = family_of_config(weights.model).rows(weights.model)
  placed = {path for row in rows for path in row.paths}
  shapes = {p: leaf for p, leaf in weights.shapes.items() if p in placed}
  left_out = [path for path in weights.shapes if path not in placed]
  return dataclasses.replace(weights, shapes=shapes), left_out


def convert_to_huggingface(
    weights: WeightSource, target: Path, dtype: str | None, advance: Advance
) -> float:
  """Writes weights in Hugging Face's layout.

  Args:
    weights: of a family that has such a layout; see `without_layout`.
    target: must not exist.
    dtype: of `DTYPES`; None for those of the source.
    advance: called for each tensor twice, when written and when compared.

  Returns:
    The largest difference of a module's outputs.

  Raises:
    UserError: the source is damaged, the layout has no words for its sizes, a
      weight does not fit the dtype, or the target cannot be written. Nothing
      is left of it then.
  """
  family = family_of_config(weights.model)
  vocabulary = weights.load_vocabulary()
  require_vocabulary(weights, vocabulary)
  if dtype is not None:
    weights = _cast(weights, jnp.dtype(dtype))
  code = find_remote_code(family.model_type)
  config = {
      'architectures': [code.architecture],
      # Refuses what the layout cannot say, before gigabytes are written.
      **family.write_config(weights.model),
      'torch_dtype': _common_dtype(weights),
  }
  if code.auto_map:
    config['auto_map'] = code.auto_map
  with whole_or_nothing(target) as partial:
    digests = _write_shards(family, weights, partial, advance)
    _write_json(partial / 'config.json', config)
    _write_json(
        partial / 'generation_config.json', family.token_ids(weights.model)
    )
    for file in code.files:
      shutil.copy(file, partial)
    if vocabulary is not None:
      write_tokenizer(vocabulary, partial)
    written = open_huggingface_folder(partial)
    worst = compare_modules(
        written,
        reading_what_was_written(
            written.read_theirs, digests, target, advance
        ),
        weights.read,
    )
  return worst


def _cast(weights: WeightSource, dtype: np.dtype) -> WeightSource:
  """Returns the weights rounded to a dtype when they are read."""

  def read(path: str) -> np.ndarray:
    leaf = weights.read(path)
    with np.errstate(over='ignore'):
      rounded = leaf.astype(dtype)
    if not np.isfinite(rounded.astype(np.float32)).all():
      raise UserError(
          f'expected weights that {dtype} can hold in {weights.name}, found '
          f'larger ones, or NaN, in {path}; convert with another --dtype'
      )
    return rounded

  return dataclasses.replace(
      weights,
      read=read,
      shapes={
          path: jax.ShapeDtypeStruct(leaf.shape, dtype)
          for path, leaf in weights.shapes.items()
      },
  )


def _common_dtype(weights: WeightSource) -> str:
  """Returns the one dtype of all leaves, float32 if there are several."""
  dtypes = {str(leaf.dtype) for leaf in weights.shapes.values()}
  return dtypes.pop() if len(dtypes) == 1 else 'float32'


def _write_shards(
    family: Family, weights: WeightSource, folder: Path, advance: Advance
) -> dict[str, str]:
  """Writes all tensors; returns the digest of each weight, by name."""
  from safetensors.numpy import save_file

  rows = {row.theirs: row for row in family.rows(weights.model)}
  buffers = family.buffers(weights.model)
  sizes = {
      name: sum(_nbytes(weights.shapes[path]) for path in row.paths)
      for name, row in rows.items()
  } | {name: math.prod(shape) for name, shape in buffers.items()}
  shards = list(_shards(sizes))
  digests: dict[str, str] = {}
  places: dict[str, str] = {}
  for number, names in enumerate(shards, start=1):
    file = 'model.safetensors'
    if len(shards) > 1:
      file = f'model-{number:05}-of-{len(shards):05}.safetensors'
    tensors = {}
    for name in names:
      if name in rows:
        tensors[name] = _make_tensor(rows[name], weights)
        digests[name] = digest_array(name, tensors[name])
        advance(tensors[name].nbytes)
      else:
        tensors[name] = _triangle(buffers[name])
      places[name] = file
    # The key by which transformers knows the framework.
    save_file(tensors, folder / file, metadata={'format': 'pt'})
  if len(shards) > 1:
    index = {
        'metadata': {'total_size': sum(sizes.values())},
        'weight_map': places,
    }
    _write_json(folder / 'model.safetensors.index.json', index)
  return digests


def _make_tensor(row: Row, weights: WeightSource) -> np.ndarray:
  leaves = [weights.read(path) for path in row.paths]
  for path, leaf in zip(row.paths, leaves, strict=True):
    weights.require_finite(path, leaf)
  return np.ascontiguousarray(row.layout.to_theirs(leaves))


def _triangle(shape: tuple[int, ...]) -> np.ndarray:
  """Returns the mask of a causal attention, as a buffer of bytes."""
  return np.tril(np.ones(shape, np.uint8))


def _shards(sizes: Mapping[str, int]) -> Iterator[list[str]]:
  """Yields the names of each shard: up to `_SHARD_BYTES`, or one tensor."""
  names: list[str] = []
  total = 0
  for name, size in sizes.items():
    if names and total + size > _SHARD_BYTES:
      yield names
      names, total = [], 0
    names.append(name)
    total += size
  yield names


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
  return math.prod(leaf.shape) * leaf.dtype.itemsize


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')
