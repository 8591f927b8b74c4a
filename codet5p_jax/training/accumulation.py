"""Sums of losses and gradients over the micro-batches of a step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from codet5p_jax.array_typing import Scalar, Tree


def accumulate(
    loss_sum: Callable,
    state: Any,
    batches: Mapping[str, Mapping[str, jax.Array]],
    objectives: Mapping[str, Any],
    config: Any,
) -> tuple[Tree, Scalar, dict[str, tuple[Scalar, Scalar]], dict[str, Tree]]:
  """Sums losses and gradients over all micro-batches, in float32.

  Args:
    loss_sum: (params, frozen, objective, its state, batch, key) -> (loss,
      ObjectiveOutput), differentiable in the first.
    state: a TrainState.
    batches: a step's batch.
    objectives: by name; those without a batch are passed over.
    config: of the step.

  Returns:
    (sums of gradients, sum of weights, metrics, new objective state).
  """
  value_and_grad = jax.value_and_grad(loss_sum, has_aux=True)
  step_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
  objective_state = dict(state.objective_state)
  grads, total = None, jnp.zeros(())
  metrics = {}
  for index, (name, objective) in enumerate(objectives.items()):
    if name not in batches:
      continue
    batch = batches[name]
    objective_key = jax.random.fold_in(step_key, index)

    def one(objective_state, microbatch, number):
      key = jax.random.fold_in(objective_key, number)
      (loss, output), grads = value_and_grad(
          state.params,
          state.frozen_params,
          objective,
          objective_state,
          microbatch,
          key,
      )
      return output.state, (grads, output.weight, output.with_loss(loss))

    count = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:
      new_state, sums = one(
          objective_state[name], jax.tree.map(lambda x: x[0], batch), 0
      )
    else:
      new_state, sums = _scan_microbatches(
          one, objective_state[name], batch, count
      )
    objective_state[name] = new_state
    these, weight, objective_metrics = sums
    grads = these if grads is None else jax.tree.map(jnp.add, grads, these)
    total += weight
    for key, value in objective_metrics.items():
      metrics[f'{name}/{key}'] = value
  return grads, total, metrics, objective_state


def _scan_microbatches(one, objective_state, batch, count):
  first = jax.tree.map(lambda x: x[0], batch)
  _, sums = jax.eval_shape(one, objective_state, first, 0)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)

  def body(carry, xs):
    state, sums = carry
    microbatch, number = xs
    state, new = one(state, microbatch, number)
    return (state, jax.tree.map(jnp.add, sums, new)), None

  (state, sums), _ = jax.lax.scan(
      body, (objective_state, zeros), (batch, jnp.arange(count))
  )
  return state, sums
