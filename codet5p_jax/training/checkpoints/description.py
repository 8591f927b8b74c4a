"""What a checkpoint holds, in words that can be compared before reading it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from codet5p_jax.errors import UserError

# {path: {'shape': [...], 'dtype': 'float32'}}, as it stands in metadata.
Description = dict[str, dict[str, Any]]

# Paths listed of each kind of difference.
_NAMED = 5


def describe_leaves(leaves: Mapping[str, Any]) -> Description:
  """Returns shape and dtype of each leaf of {path: leaf}."""
  return {
      path: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)}
      for path, leaf in leaves.items()
  }


def require_same_leaves(
    saved: Description, expected: Description, where: str
) -> None:
  """Compares what was saved with what the run has, before arrays are read.

  Args:
    saved: from the metadata of a checkpoint.
    expected: of the target of the restore, per layer.
    where: the checkpoint's folder, for the message.

  Raises:
    UserError: they differ; at most five paths of each kind are named.
  """
  both = [path for path in expected if path in saved]
  differences = [
      _listed('missing', [path for path in expected if path not in saved]),
      _listed('unexpected', [path for path in saved if path not in expected]),
  ]
  for key in ('shape', 'dtype'):
    differences.append(
        _listed(
            f'of another {key}',
            [
                f'{path}: expected {expected[path][key]}, found '
                f'{saved[path][key]}'
                for path in both
                if saved[path][key] != expected[path][key]
            ],
        )
    )
  differences = [difference for difference in differences if difference]
  if differences:
    raise UserError(
        f'expected in {where} the arrays of this model and optimizer, found '
        f'{"; ".join(differences)}; use the configuration that wrote it, or '
        f'another checkpoint'
    )


def require_shared(path: str, leaf: Any) -> None:
  """Refuses what Orbax saves from process 0 alone, without a word.

  Raises:
    ValueError: it is no array, or one of this process alone.
  """
  if not isinstance(leaf, jax.Array | np.ndarray):
    raise ValueError(f'expected an array at {path}, found {type(leaf)}')
  if jax.process_count() > 1 and (
      not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
  ):
    raise ValueError(
        f'expected an array over all processes at {path}, found one of this '
        f'process alone'
    )


def _listed(kind: str, entries: list[str]) -> str:
  """Returns "7 missing (a, b, c, d, e, ...)", or "" of nothing."""
  if not entries:
    return ''
  more = ', ...' if len(entries) > _NAMED else ''
  return f'{len(entries)} {kind} ({", ".join(entries[:_NAMED])}{more})'
