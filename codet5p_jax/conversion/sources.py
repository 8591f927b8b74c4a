"""Weights of a folder, whatever its layout, one leaf at a time."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codet5p_jax.conversion.families import FAMILIES
from codet5p_jax.conversion.huggingface_folder import (
    HuggingFaceFolder,
    open_huggingface_folder,
    our_shapes,
)
from codet5p_jax.conversion.init_from import (
    plan_initialisation,
    with_all_tokens,
)
from codet5p_jax.conversion.tables import fold_names
from codet5p_jax.conversion.tensor_files import has_tensors, read_json_object
from codet5p_jax.conversion.tokenizer_files import (
    has_tokenizer,
    read_tokenizer,
)
from codet5p_jax.data.vocabularies import Vocabulary, load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.storage import local_path
from codet5p_jax.training.checkpoints.fingerprint import digest_array
from codet5p_jax.training.checkpoints.weights import SavedWeights
from codet5p_jax.training.run_folder import RunFolder, read_config, rebuild


@dataclasses.dataclass(frozen=True)
class WeightSource:
  """Weights that can be read.

  Attributes:
    name: the folder, for messages.
    model: our configuration of the model whose weights they are.
    vocabulary: folder of the vocabulary's files, of ours or Hugging Face's;
      None where there are none. `load_vocabulary` reads it.
    shapes: {path: shape, and dtype on disk} of our leaves, one per layer and
      without padding.
    read: (path) -> that leaf, read now, with the dtype on disk.
    load_vocabulary: () -> the vocabulary, None where there is none.
  """

  name: str
  model: Any
  vocabulary: Path | None
  shapes: Mapping[str, jax.ShapeDtypeStruct]
  read: Callable[[str], np.ndarray]
  load_vocabulary: Callable[[], Vocabulary | None]

  def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, leaf) of all, each read when its turn comes.

    Raises:
      UserError: a leaf has numbers that are none.
    """
    for path in self.shapes:
      leaf = np.ascontiguousarray(self.read(path))
      self.require_finite(path, leaf)
      yield path, leaf

  def require_finite(self, path: str, leaf: np.ndarray) -> None:
    """Refuses a leaf with NaN or infinity in it.

    Raises:
      UserError: it has.
    """
    if not _is_finite(leaf):
      raise UserError(
          f'expected finite weights in {self.name}, found NaN or infinity in '
          f'{path}; give weights of a run that did not diverge'
      )


def open_source(
    folder: str | os.PathLike, init_from: Sequence[Any] | None = None
) -> WeightSource:
  """Opens a folder of Hugging Face, a run folder or a converted folder.

  Reads configuration and shapes, and compares them; ours and .bin files are
  also compared with their checksums.

  Args:
    folder: its path.
    init_from: where the frozen weights of a run lie, if they were moved; see
      init_from.py.

  Raises:
    UserError: the folder is none of these, is damaged, or contradicts itself.
  """
  path = local_path(folder)
  if is_ours(path):
    return _open_ours(path, init_from)
  return from_huggingface(open_huggingface_folder(path))


def is_ours(path: Path) -> bool:
  """Whether a folder is a run's or a converted one, and not Hugging Face's.

  Raises:
    UserError: it is neither.
  """
  if not path.is_dir():
    raise UserError(
        f'expected a folder, found none at {path}; check the path, or set '
        f'INIT_FROM to where the weights lie now that a run started from'
    )
  config = path / 'config.json'
  content = read_json_object(config) if config.exists() else {}
  if 'format_version' in content:
    return True
  if 'model_type' in content or (content and has_tensors(path)):
    return False
  raise UserError(
      f'expected in {path} the config.json of a run, of a converted model or '
      f'of Hugging Face, found none; give the folder of a model'
  )


def from_huggingface(folder: HuggingFaceFolder) -> WeightSource:
  """Returns the weights of an opened folder in Hugging Face's layout."""
  kind = folder.family.vocabulary_kind
  vocabulary = folder.path if has_tokenizer(folder.path) else None
  return WeightSource(
      name=str(folder.path),
      model=folder.model,
      vocabulary=vocabulary,
      shapes=folder.shapes,
      read=folder.read,
      load_vocabulary=lambda: vocabulary and read_tokenizer(vocabulary, kind),
  )


def _open_ours(
    path: Path, init_from: Sequence[Any] | None
) -> WeightSource:
  folder = RunFolder(path)
  config = rebuild(read_config(path))
  model = config.get('model')
  if type(model) not in [f.config_class for f in FAMILIES.values()]:
    raise UserError(
        f'expected a model in {folder.config}, found '
        f'{type(model).__name__}; give the folder of a run or of a converted '
        f'model'
    )
  if not folder.model.is_dir():
    raise UserError(
        f'expected the weights of a finished run in {folder.model}, found '
        f'none; let the run finish'
    )
  saved = SavedWeights(folder.model)
  shapes, read = _with_frozen(saved, init_from, model)
  _require_leaves(saved, shapes, our_shapes(model))
  vocabulary = folder.vocabulary if folder.vocabulary.is_dir() else None
  return WeightSource(
      name=str(path),
      model=model,
      vocabulary=vocabulary,
      shapes=shapes,
      read=read,
      load_vocabulary=lambda: vocabulary and load_vocabulary(vocabulary),
  )


def _with_frozen(
    saved: SavedWeights, init_from: Sequence[Any] | None, model: Any
) -> tuple[dict[str, jax.ShapeDtypeStruct], Callable[[str], np.ndarray]]:
  """Shapes of a run's weights, and how to read them.

  What a run left frozen is not in its folder, but where it came from.
  """
  digests = saved.metadata.get('frozen_digests')
  if any(path.endswith('/kernel_scale') for path in saved.shapes):
    raise UserError(
        f'expected weights in {saved.folder}, found frozen ones that were '
        f'drawn and kept in int8; train again with FROZEN_DTYPE=float32'
    )
  if not digests:
    return dict(saved.shapes), saved.read
  if init_from is None:
    init_from = saved.metadata['init_from']
  initialisation = plan_initialisation(
      init_from, model, open_source, needed=digests
  )
  initialisation.require_known(digests)
  origins = {path: initialisation.origins[path] for path in digests}

  def read(path):
    if path not in origins:
      return saved.read(path)
    array = origins[path].read()
    initialisation.require_digests(
        {path: digests[path]}, {path: digest_array(path, array)}
    )
    return with_all_tokens(array, initialisation.shapes[path])

  shapes = dict(saved.shapes)
  for path, origin in origins.items():
    dtype = origin.source.shapes[origin.path].dtype
    shapes[path] = jax.ShapeDtypeStruct(initialisation.shapes[path], dtype)
  return shapes, read


def _require_leaves(
    saved: SavedWeights,
    found: Mapping[str, jax.ShapeDtypeStruct],
    expected: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
  """Refuses weights that are not those of the model beside them."""
  both = [path for path in expected if path in found]
  faults = {
      'missing': [path for path in expected if path not in found],
      'unexpected': [path for path in found if path not in expected],
      'misshapen': [p for p in both if found[p].shape != expected[p].shape],
  }
  words = [
      f'{len(paths)} {kind} ({", ".join(fold_names(paths))})'
      for kind, paths in faults.items()
      if paths
  ]
  if words:
    raise UserError(
        f'expected in {saved.folder} the weights of the model in config.json, '
        f'found {"; ".join(words)}; give a folder that is whole'
    )


def _is_finite(leaf: np.ndarray) -> bool:
  if leaf.dtype.itemsize != 2:
    return bool(np.isfinite(leaf).all())
  # All bits of the exponent say so; three times as fast as asking NumPy.
  exponent = 0x7F80 if leaf.dtype == jnp.bfloat16 else 0x7C00
  return not ((leaf.view(np.uint16) & exponent) == exponent).any()
