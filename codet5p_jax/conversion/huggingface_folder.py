"""A folder in Hugging Face's layout, checked before a tensor is used."""

import dataclasses
import functools
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from codet5p_jax.conversion.families import family_of
from codet5p_jax.conversion.tables import (
    Family,
    Row,
    Shapes,
    find_tensors,
    require_agreement,
    their_shapes,
)
from codet5p_jax.conversion.tensor_files import TensorFiles, read_json_object
from codet5p_jax.errors import UserError
from codet5p_jax.models.computation import Computation
from codet5p_jax.planning.parameters import parameter_shapes
from codet5p_jax.training.checkpoints.layout import unstack_leaves


@dataclasses.dataclass(frozen=True)
class HuggingFaceFolder:
  """An opened folder.

  Attributes:
    path: the folder.
    config: its config.json.
    family: of the model.
    model: our configuration of it.
    tensors: what its files hold.
    rows: the table.
    names: {name in the table: name in the files}.
    shapes: shape, and dtype on disk, of our leaves by path.
  """

  path: Path
  config: Mapping[str, Any]
  family: Family
  model: Any
  tensors: TensorFiles
  rows: tuple[Row, ...]
  names: Mapping[str, str]
  shapes: Shapes

  def read_theirs(self, name: str) -> np.ndarray:
    """Returns a tensor by its name in the table, with its dtype on disk."""
    return self.tensors.read(self.names[name])

  def read(self, path: str) -> np.ndarray:
    """Returns one of our leaves, with the dtype on disk.

    Quickest in the order of `shapes`: the leaves of one tensor come together.
    """
    row = self._row_of[path]
    return self._leaves(row)[row.paths.index(path)]

  @functools.cached_property
  def _row_of(self) -> dict[str, Row]:
    return {path: row for row in self.rows for path in row.paths}

  @functools.cached_property
  def _leaves(self):
    @functools.lru_cache(maxsize=1)
    def leaves(row: Row) -> tuple[np.ndarray, ...]:
      return row.layout.to_ours(
          self.read_theirs(row.theirs),
          [self.shapes[path].shape for path in row.paths],
      )

    return leaves


def open_huggingface_folder(path: Path) -> HuggingFaceFolder:
  """Opens a folder and compares config.json, table and tensors.

  Raises:
    UserError: it is of no family we know, a file is damaged or missing, the
      configuration contradicts the tensors, or those are not the table's.
  """
  config = read_json_object(path / 'config.json')
  family = family_of(config.get('model_type'), f'{path / "config.json"}')
  tensors = TensorFiles(path)
  found = tensors.shapes
  require_agreement(
      config,
      family.measure({name: tensor.shape for name, tensor in found.items()}),
  )
  model = family.read_config(config)
  rows = family.rows(model)
  shapes = our_shapes(model)
  names = find_tensors(
      family, their_shapes(rows, shapes), found, f'{path}'
  )
  _require_equal_aliases(family, tensors)
  dtypes = {
      leaf: found[names[row.theirs]].dtype
      for row in rows
      for leaf in row.paths
  }
  return HuggingFaceFolder(
      path,
      config,
      family,
      model,
      tensors,
      rows,
      names,
      {
          leaf: jax.ShapeDtypeStruct(shapes[leaf].shape, dtype)
          for leaf, dtype in dtypes.items()
      },
  )


@functools.lru_cache(maxsize=8)
def our_shapes(model: Any) -> Shapes:
  """Returns the logical shape of each of our leaves, one per layer.

  Args:
    model: our configuration; nothing is allocated.
  """
  scanned = parameter_shapes(model.make_model(Computation()))
  leaves = unstack_leaves({
      path: jax.ShapeDtypeStruct(shape, np.float32)
      for path, shape in scanned.items()
  })
  return types.MappingProxyType(leaves)  # It is kept, and so not to change.


def _require_equal_aliases(family: Family, tensors: TensorFiles) -> None:
  """Refuses a table whose names hold different numbers: it is not tied."""
  for name, aliases in family.aliases.items():
    present = [x for x in (name, *aliases) if x in tensors.shapes]
    for other in present[1:]:
      first, second = tensors.read(present[0]), tensors.read(other)
      # By bits: NaN is told of elsewhere.
      if first.dtype != second.dtype or not np.array_equal(
          _as_bytes(first), _as_bytes(second)
      ):
        raise UserError(
            f'expected {present[0]} and {other} in {tensors.folder} to be the '
            f'same table, found different numbers; this family has one table '
            f'for both, so the model cannot be converted'
        )


def _as_bytes(tensor: np.ndarray) -> np.ndarray:
  # A copy only of what lies in another order, as views in a .bin may.
  return np.ascontiguousarray(tensor).view(np.uint8)
