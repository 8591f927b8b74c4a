"""Trainable and frozen parameters, told apart by path patterns."""

import re
from collections.abc import Sequence

import flax.traverse_util

from codet5p_jax.array_typing import Tree
from codet5p_jax.errors import UserError


def partition_params(
    params: Tree, trainable: Sequence[str]
) -> tuple[Tree, Tree]:
  """Splits parameters into trainable and frozen ones.

  Args:
    params: nested dictionaries.
    trainable: regular expressions; a parameter is trainable when one of them
      matches its whole path, such as `encoder/layers/mlp/wi/kernel`.

  Returns:
    Two nested dictionaries that share no leaf.

  Raises:
    UserError: a pattern is no regular expression or matches no parameter, or
      nothing is trainable.
  """
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  selected = set()
  for pattern in trainable:
    try:
      matches = {path for path in flat if re.fullmatch(pattern, path)}
    except re.error as error:
      raise UserError(
          f'trainable pattern {pattern!r} is no regular expression: {error}; '
          f'mend TRAINABLE'
      ) from error
    if not matches:
      raise UserError(
          f'trainable pattern {pattern!r} matches no parameter; a path looks '
          f'like {min(flat)!r}; mend TRAINABLE'
      )
    selected |= matches
  if not selected:
    raise UserError(
        "expected at least one trainable parameter, found none; set "
        "TRAINABLE, for instance ('.*',)"
    )

  def part(keep):
    return flax.traverse_util.unflatten_dict(
        {path: leaf for path, leaf in flat.items() if keep(path)}, sep='/'
    )

  return part(lambda p: p in selected), part(lambda p: p not in selected)


def merge_params(trainable: Tree, frozen: Tree) -> Tree:
  """The inverse of `partition_params`."""
  return flax.traverse_util.unflatten_dict(
      flax.traverse_util.flatten_dict(trainable)
      | flax.traverse_util.flatten_dict(frozen)
  )
