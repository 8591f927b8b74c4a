"""One number for a tree of parameters, whatever its layout in memory."""

import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from codet5p_jax.array_typing import Tree
from codet5p_jax.training.checkpoints.layout import iterate_layers

# Part of what is hashed: another recipe must never give an equal fingerprint.
_RECIPE = 'codet5p_jax fingerprint 1'


def fingerprint_tree(tree: Tree) -> str:
  """Returns the SHA-256 of a tree's paths, shapes, dtypes and bytes.

  Scanned and unrolled layers give the same fingerprint, and so do arrays of
  any sharding and numpy's. At most one layer of one leaf is on the host at a
  time. Where parts of it are on other processes, all of them call it.

  Args:
    tree: a pytree of arrays.

  Returns:
    64 hexadecimal digits.
  """
  return join_digests(
      (path, digest_array(path, _whole(array)))
      for path, array in iterate_layers(tree)
  )


def digest_array(path: str, array: Any) -> str:
  """Returns dtype, shape and SHA-256 of an array's bytes, in words.

  Raises:
    ValueError: it has parts on the devices of other processes.
  """
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    raise ValueError(
        f'{path} has parts on other processes: take the fingerprint of the '
        f'source where one process holds it whole'
    )
  array = np.asarray(array)
  # Bytes in the order of C, without a copy where that is the order already.
  content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  digest = hashlib.sha256(content).hexdigest()
  return f'{array.dtype} {list(array.shape)} {digest}'


def join_digests(digests: Iterable[tuple[str, str]]) -> str:
  """Returns the fingerprint of (path, `digest_array`) of all leaves."""
  # Sorted, so that the order of leaves in memory plays no part.
  lines = sorted(f'{path} {digest}' for path, digest in digests)
  return hashlib.sha256('\n'.join([_RECIPE, *lines]).encode()).hexdigest()


def _whole(array: Any) -> Any:
  """The array, with what other processes have of it."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    # On CPUs, the gathering may wait for ever for what is still being computed.
    jax.block_until_ready(array)
    return multihost_utils.process_allgather(array, tiled=True)
  return array
