"""Sampling, and greedy decoding as sampling at temperature 0."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer, Key

from codet5p_jax.array_typing import PRNGKey, Tree
from codet5p_jax.decoding.prefill import (
    Continuations,
    make_rows,
    next_logits,
    read_prompts,
)
from codet5p_jax.decoding.sampling import (
    Sampling,
    choose_tokens,
    log_probabilities,
)
from codet5p_jax.sharding import DECODING_RULES, sharding_activations


@flax.struct.dataclass
class Samples:
  """Rows that grow, all by one token at a time.

  Attributes:
    continuations: what they grow from.
    keys: [rows] of each row's random numbers.
    tokens: [rows, max_new_tokens] generated so far; -1 where there is none.
    log_probabilities: [rows, max_new_tokens] of each token, in the model's own
      distribution; 0 where there is none.
    limits: [rows] tokens after which a row ends, whatever they are.
    is_done: [rows] whether a row has ended.
    step: tokens generated so far, in rows that have not ended before.
  """

  continuations: Continuations
  keys: Any
  tokens: Any
  log_probabilities: Any
  limits: Any
  is_done: Any
  step: Any


class Sampler:
  """The programs of sampling, compiled once for every shape of batch.

  `read` reads prompts, once however many rows will be made of them, `begin`
  makes rows and draws the first token of each, `go_on` draws the others.

  Args:
    model: with layers of their own.
    sampling: how tokens are drawn.
    eos_id: the token that ends a row.
    mesh: of the parameters; None for one device.
  """

  def __init__(
      self,
      model: nn.Module,
      sampling: Sampling,
      eos_id: int,
      mesh: Mesh | None = None,
  ):
    self._model, self._sampling, self._eos_id = model, sampling, eos_id
    within = functools.partial(sharding_activations, mesh, DECODING_RULES)
    self.read = jax.jit(within(functools.partial(read_prompts, model)))
    self.begin = jax.jit(
        within(self._begin), static_argnames=('max_new_tokens',)
    )
    self.go_on = jax.jit(within(self._go_on), donate_argnames=('samples',))

  def _begin(
      self,
      continuations: Continuations,
      logits: Float[Array, 'prompts vocab'],
      keys: Key[Array, 'rows'],
      limits: Int[Array, 'prompts'],
      max_new_tokens: int,
  ) -> Samples:
    """Makes rows of prompts that were read; draws the first token of each.

    Args:
      continuations: of `read`.
      logits: likewise.
      keys: of each row, as many of each prompt, one after the other; see
        `row_keys`.
      limits: tokens that each prompt's rows may have, at least one.
      max_new_tokens: places to make for them.
    """
    rows = keys.shape[0]
    rows_per_prompt = rows // limits.shape[0]
    continuations, logits = make_rows(
        continuations, logits, rows_per_prompt, max_new_tokens
    )
    samples = Samples(
        continuations=continuations,
        keys=keys,
        tokens=jnp.full((rows, max_new_tokens), -1, jnp.int32),
        log_probabilities=jnp.zeros((rows, max_new_tokens), jnp.float32),
        limits=jnp.repeat(limits, rows_per_prompt),
        is_done=jnp.zeros(rows, bool),
        step=jnp.zeros((), jnp.int32),
    )
    return self._append(samples, logits)

  def _go_on(
      self, params: Tree, samples: Samples, until: Int[Array, '']
  ) -> Samples:
    """Draws until rows have `until` tokens, or all have ended.

    Args:
      params: those that the prompts were read with.
      samples: as they are; given up.
      until: at most `max_new_tokens`.
    """

    def is_unfinished(samples: Samples) -> Any:
      return (samples.step < until) & ~jnp.all(samples.is_done)

    def extend(samples: Samples) -> Samples:
      last = samples.step - 1
      continuations, logits = next_logits(
          self._model,
          params,
          samples.continuations,
          # What an ended row goes on with is thrown away.
          jnp.maximum(samples.tokens[:, last], 0),
          last,
          samples.tokens.shape[1],
      )
      return self._append(
          samples.replace(continuations=continuations), logits
      )

    return jax.lax.while_loop(is_unfinished, extend, samples)

  def _append(
      self, samples: Samples, logits: Float[Array, 'rows vocab']
  ) -> Samples:
    keys = jax.vmap(jax.random.fold_in, (0, None))(samples.keys, samples.step)
    token = choose_tokens(logits, keys, self._sampling)
    log_probability = log_probabilities(logits, token)
    is_done, step = samples.is_done, samples.step
    return samples.replace(
        tokens=samples.tokens.at[:, step].set(jnp.where(is_done, -1, token)),
        log_probabilities=samples.log_probabilities.at[:, step].set(
            jnp.where(is_done, 0.0, log_probability)
        ),
        is_done=(
            is_done
            | (token == self._eos_id)
            | (step + 1 >= samples.limits)
        ),
        step=step + 1,
    )


def row_keys(
    key: PRNGKey,
    prompt_numbers: Integer[Array, 'prompts'],
    first_sample: int,
    samples_per_prompt: int,
) -> Key[Array, 'rows']:
  """A key for each sample of each prompt, whatever else is in its batch.

  Args:
    key: of the run.
    prompt_numbers: a number that tells a prompt from others.
    first_sample: number of the first sample of each prompt here.
    samples_per_prompt: how many of each.
  """
  samples = first_sample + jnp.arange(samples_per_prompt)
  of_prompts = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_numbers)
  of_samples = jax.vmap(
      jax.vmap(jax.random.fold_in, (None, 0)), (0, None)
  )(of_prompts, samples)
  return of_samples.reshape(-1)
