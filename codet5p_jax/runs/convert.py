"""Released checkpoints in, and models of ours out."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from codet5p_jax.conversion.huggingface_folder import (
    open_huggingface_folder,
)
from codet5p_jax.conversion.sources import (
    WeightSource,
    from_huggingface,
    is_ours,
    open_source,
)
from codet5p_jax.conversion.target_folder import require_free
from codet5p_jax.conversion.to_huggingface import (
    DTYPES,
    convert_to_huggingface,
    without_layout,
)
from codet5p_jax.conversion.to_ours import convert_to_ours
from codet5p_jax.errors import UserError
from codet5p_jax.planning.parameters import count
from codet5p_jax.storage import local_path

_logger = logging.getLogger(__name__)

# What belongs to a model; a repository may hold it in other formats as well.
_DOWNLOADED = ('*.json', 'merges.txt', 'vocabulary/*', '*.safetensors')
# Where there are no safetensors: many repositories hold the weights twice.
_DOWNLOADED_ELSE = ('pytorch_model*.bin',)


def convert(
    source: str,
    target: str,
    dtype: str | None = None,
    from_hub: bool = False,
    init_from: Sequence[Any] | None = None,
) -> None:
  """Converts a model from Hugging Face's layout to ours, or from ours to it.

  Which way follows from the source. Names, shapes and checksums are compared
  before anything is written, and all modules afterwards: their outputs must
  agree to 1e-4. Neither model is ever whole in memory.

  Args:
    source: a folder in Hugging Face's layout, of T5 (codet5p-220m, -770m),
      codet5p_bimodal, codet5p_embedding, codegen or codet5p (2B, 6B, 16B);
      or the folder of a run, or one that this command made.
    target: the folder to create.
    dtype: of the weights in Hugging Face's layout, float16, bfloat16 or
      float32; by default those of the source.
    from_hub: download the source, a name such as Salesforce/codet5p-220m.
    init_from: of a run that left weights frozen: where those lie now, if they
      were moved; see conversion/init_from.py.

  Raises:
    UserError: the source is none of these or is damaged, the target exists or
      cannot be written, or a module computes something else afterwards. The
      target is not there then.
  """
  destination = local_path(target)
  if dtype is not None and dtype not in DTYPES:
    raise UserError(
        f'expected dtype among {", ".join(DTYPES)}, found {dtype!r}; give one '
        f'of those'
    )
  require_free(destination)  # Before gigabytes are read.
  folder = _download(source) if from_hub else _require_folder(source)
  if not is_ours(folder):
    if dtype is not None:
      raise UserError(
          f'expected --dtype only on the way to the layout of Hugging Face, '
          f'found it with {source}, which has that layout; leave it away: '
          f'what loads the weights casts them'
      )
    theirs = open_huggingface_folder(folder)
    weights = from_huggingface(theirs)
    with _progress(weights) as bar:
      worst = convert_to_ours(theirs, destination, bar.update)
  else:
    weights, left_out = without_layout(open_source(folder, init_from))
    if left_out:
      _logger.info(
          'The layout of Hugging Face has no place for %s, which only training '
          'needs: left out.', ', '.join(left_out)
      )  # fmt: skip
    with _progress(weights) as bar:
      worst = convert_to_huggingface(weights, destination, dtype, bar.update)
    if (destination / 'vocabulary').exists():
      _logger.info(
          'transformers has no class for its SentencePiece vocabulary, which '
          'lies as this program has it in %s.', destination / 'vocabulary'
      )  # fmt: skip
  _report(weights, destination, worst)


def _require_folder(source: str) -> Path:
  folder = local_path(source)
  if not folder.is_dir() and source.count('/') == 1:
    raise UserError(
        f'expected a folder, found none at {source}; if it is the name of a '
        f'model on the Hugging Face hub, add --from_hub'
    )
  return folder


def _download(name: str) -> Path:
  """Returns the folder of a model of the hub, downloaded once."""
  import huggingface_hub

  def download(patterns: Sequence[str]) -> Path:
    return Path(
        huggingface_hub.snapshot_download(name, allow_patterns=list(patterns))
    )

  try:
    # Not by a list of the repository: what was downloaded serves offline too.
    folder = download(_DOWNLOADED)
    if not any(folder.glob('model*.safetensors')):
      folder = download(_DOWNLOADED_ELSE)
    return folder
  except Exception as error:  # Many classes, of several libraries.
    words = ' '.join(str(error).split())
    raise UserError(
        f'expected the model {name} on the Hugging Face hub, could not '
        f'download it ({type(error).__name__}: {words[:200]}); check the name '
        f'and the network, or give a folder'
    ) from error


def _progress(weights: WeightSource) -> tqdm:
  leaves = weights.shapes.values()
  return tqdm(
      desc=f'Converting {Path(weights.name).name}',
      # Once written, once compared.
      total=2 * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
      unit='B',
      unit_scale=True,
      disable=None,  # Where nobody watches.
  )


def _report(weights: WeightSource, target: Path, worst: float) -> None:
  parameters = count({p: leaf.shape for p, leaf in weights.shapes.items()})
  _logger.info(
      'Converted %s to %s: %s parameters. Largest difference of a module: '
      '%.1e.', weights.name, target, f'{parameters:,}', worst,
  )  # fmt: skip
  if weights.vocabulary is None:
    _logger.info('%s has no tokenizer files, so %s has none.',
                 weights.name, target)  # fmt: skip
