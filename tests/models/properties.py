"""What tests of networks look at: what sees what, what is computed."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VOCAB_SIZE = 131  # Of the models under test.


def draw_tokens(*shape, seed=0):
  """Returns random tokens, none of them 0."""
  numbers = np.random.default_rng(seed)
  return numbers.integers(1, VOCAB_SIZE, shape).astype(np.int32)


def change_one_token_per_row(tokens):
  """Repeats tokens [length]; row i has another token at position i."""
  changed = np.tile(tokens, (len(tokens) + 1, 1))
  last = VOCAB_SIZE - 1
  np.fill_diagonal(changed, changed.diagonal() % last + 1)
  return changed


def changed_states(states):
  """Returns [row, position]: does a state differ from the last row's?"""
  return np.abs(states - states[-1]).max(axis=-1)[:-1] > 1e-6


def unroll(params):
  """Cuts stacked layers, wherever they are, in one tree per layer."""
  if not isinstance(params, dict):
    return params
  result = {}
  for name, branch in params.items():
    if name != 'layers':
      result[name] = unroll(branch)
      continue
    for i in range(jax.tree.leaves(branch)[0].shape[0]):
      result[f'layers_{i}'] = jax.tree.map(lambda x, i=i: x[i], branch)
  return result


def equations(program) -> Iterator[Any]:
  """Yields all equations of a jaxpr, those within its loops once."""
  for equation in program.eqns:
    yield equation
    for value in jax.tree.leaves(list(equation.params.values())):
      value = getattr(value, 'jaxpr', value)
      if hasattr(value, 'eqns'):
        yield from equations(value)


def count_products(program):
  """Counts matrix products of a jaxpr, the bodies of its loops once."""
  return sum(x.primitive.name == 'dot_general' for x in equations(program))


def cross_entropy(model, params, source, target, rngs=None):
  """Mean loss of the target's tokens but the first, those of id 0 left out."""
  variables = {'params': params}
  states = model.apply(
      variables, source, target[:, :-1], deterministic=rngs is None, rngs=rngs
  )
  logits = model.apply(variables, method='output_head').logits(states)
  wanted = target[:, 1:]
  chosen = jnp.take_along_axis(
      jax.nn.log_softmax(logits), wanted[..., None], axis=-1
  )[..., 0]
  return -jnp.mean(chosen, where=wanted > 0)
