"""Beam search, as transformers' `generate` does it.

Of the continuations of all beams of a prompt, the likeliest `2 * num_beams` are
looked at in each step: so many that `num_beams` go on even if all others end.
Those among the first `num_beams` that end compete with what ended before, by

    log-probability / length ** length_penalty

with the length in tokens, the end token included. Rows of a batch do not
depend on one another.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from codet5p_jax.array_typing import Tree
from codet5p_jax.decoding.prefill import (
    Continuations,
    Prompts,
    make_rows,
    next_logits,
    read_prompts,
    select_rows,
)
from codet5p_jax.errors import UserError
from codet5p_jax.sharding import DECODING_RULES, sharding_activations

# Worse than any log-probability, and finite as that of the reference: sums of
# it keep their order.
_NEVER = -1.0e9


@dataclasses.dataclass(frozen=True)
class BeamSearch:
  """How wide to search, and what to prefer.

  Attributes:
    num_beams: continuations of a prompt that are followed at once.
    length_penalty: 0 compares log-probabilities, 1 their means a token; longer
      ones gain by larger values.
    early_stopping: end a prompt's search once `num_beams` continuations have
      ended, rather than when none of those under way could be better.

  Raises:
    UserError: there is no beam, or the penalty is not finite.
  """

  num_beams: int = 5
  length_penalty: float | int = 1.0
  early_stopping: bool = False

  def __post_init__(self):
    # gin gives a whole number as an integer, whose powers would overflow.
    object.__setattr__(self, 'length_penalty', float(self.length_penalty))
    if not math.isfinite(self.length_penalty):
      raise UserError(
          f'expected a finite length penalty, found {self.length_penalty}; set '
          f'LENGTH_PENALTY'
      )
    if self.num_beams < 1:
      raise UserError(
          f'expected one beam or more, found {self.num_beams}; set NUM_BEAMS'
      )


@flax.struct.dataclass
class Beams:
  """A search under way.

  Attributes:
    continuations: of the beams that go on.
    tokens: [prompts, beams, max_new_tokens] of these; -1 where there is none.
    log_probabilities: [prompts, beams] of these, all tokens together.
    ended_tokens: [prompts, beams, max_new_tokens] of those that ended; -1 where
      there is none.
    scores: [prompts, beams] of those that ended, best first.
    is_ended: [prompts, beams] whether there is one in each place of these.
    is_open: [prompts] whether the result can still change.
    step: tokens of the beams that go on.
  """

  continuations: Continuations
  tokens: Any
  log_probabilities: Any
  ended_tokens: Any
  scores: Any
  is_ended: Any
  is_open: Any
  step: Any


class BeamSearcher:
  """Beam search, compiled once for every shape of batch.

  Args:
    model: with layers of their own.
    search: how.
    eos_id: the token that ends a continuation.
    mesh: of the parameters; None for one device.
  """

  def __init__(
      self,
      model: nn.Module,
      search: BeamSearch,
      eos_id: int,
      mesh: Mesh | None = None,
  ):
    self._model, self._search, self._eos_id = model, search, eos_id
    self.find = jax.jit(
        sharding_activations(mesh, DECODING_RULES, self._find),
        static_argnames=('max_new_tokens',),
    )

  def _find(
      self,
      params: Tree,
      prompts: Prompts,
      limits: Int[Array, 'prompts'],
      max_new_tokens: int,
  ) -> tuple[
      Int[Array, 'prompts beams max_new_tokens'],
      Float[Array, 'prompts beams'],
  ]:
    """Searches the best continuations of each prompt.

    Args:
      params: see `decoding_params`.
      prompts: a batch.
      limits: tokens that each prompt's continuations may have, at least one.
      max_new_tokens: places to make for them.

    Returns:
      Their tokens, the end token included and then -1, and their scores; best
      first.
    """
    num_prompts = prompts.lengths.shape[0]
    num_beams = self._search.num_beams
    continuations, logits = make_rows(
        *read_prompts(self._model, params, prompts), num_beams, max_new_tokens
    )
    shape = (num_prompts, num_beams)
    nothing = jnp.full((*shape, max_new_tokens), -1, jnp.int32)
    is_first = jnp.arange(num_beams) == 0
    beams = Beams(
        continuations=continuations,
        tokens=nothing,
        # All beams begin alike: but for one they would find the same.
        log_probabilities=jnp.broadcast_to(
            jnp.where(is_first, 0.0, _NEVER), shape
        ),
        ended_tokens=nothing,
        scores=jnp.full(shape, _NEVER),
        is_ended=jnp.zeros(shape, bool),
        is_open=jnp.ones(num_prompts, bool),
        step=jnp.zeros((), jnp.int32),
    )
    limits = limits[:, None]
    beams = self._advance(beams, logits, limits)

    def is_unfinished(beams: Beams) -> Any:
      return (beams.step < max_new_tokens) & jnp.any(beams.is_open)

    def extend(beams: Beams) -> Beams:
      last = beams.step - 1
      tokens = beams.tokens.reshape(-1, max_new_tokens)
      continuations, logits = next_logits(
          self._model,
          params,
          beams.continuations,
          tokens[:, last],
          last,
          max_new_tokens,
      )
      beams = beams.replace(continuations=continuations)
      return self._advance(beams, logits, limits)

    beams = jax.lax.while_loop(is_unfinished, extend, beams)
    return beams.ended_tokens, beams.scores

  def _advance(
      self,
      beams: Beams,
      logits: Float[Array, 'rows vocab'],
      limits: Int[Array, 'prompts 1'],
  ) -> Beams:
    """Takes one token further, given its logits for each beam."""
    num_prompts, num_beams, _ = beams.tokens.shape
    vocab = logits.shape[-1]
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    log_probs = log_probs.reshape(num_prompts, num_beams, vocab)
    log_probs = log_probs + beams.log_probabilities[..., None]
    log_probs, index = jax.lax.top_k(
        log_probs.reshape(num_prompts, -1), 2 * num_beams
    )
    origin, token = index // vocab, index % vocab
    tokens = _take(beams.tokens, origin).at[:, :, beams.step].set(token)
    length = beams.step + 1
    ends = (token == self._eos_id) | (length >= limits)

    going, best = jax.lax.top_k(
        jnp.where(ends, log_probs + _NEVER, log_probs), num_beams
    )
    first = num_beams * jnp.arange(num_prompts)[:, None]
    rows = (first + _take(origin, best)).reshape(-1)
    continuations = beams.continuations.replace(
        cache=select_rows(beams.continuations.cache, rows)
    )

    penalty = self._search.length_penalty
    has_ended = ends & (jnp.arange(2 * num_beams) < num_beams)
    counts = has_ended & beams.is_open[:, None]
    scores = jnp.where(counts, log_probs / length**penalty, 2 * _NEVER)
    scores, kept = jax.lax.top_k(
        jnp.concatenate([beams.scores, scores], axis=1), num_beams
    )
    ended_tokens = jnp.concatenate([beams.ended_tokens, tokens], axis=1)
    is_ended = jnp.concatenate([beams.is_ended, counts], axis=1)
    beams = beams.replace(
        continuations=continuations,
        tokens=_take(tokens, best),
        log_probabilities=going,
        ended_tokens=_take(ended_tokens, kept),
        scores=scores,
        is_ended=_take(is_ended, kept),
        step=length,
    )
    is_open = self._can_improve(beams) & (length < limits[:, 0])
    return beams.replace(is_open=beams.is_open & is_open)

  def _can_improve(self, beams: Beams) -> Bool[Array, 'prompts']:
    if self._search.early_stopping:
      return ~jnp.all(beams.is_ended, axis=1)
    # As in the reference: the best beam, were it to end here.
    best = beams.log_probabilities[:, 0]
    best = best / beams.step**self._search.length_penalty
    worst = jnp.where(beams.is_ended, beams.scores[:, -1:], _NEVER)
    return jnp.any(best[:, None] > worst, axis=1)


def _take(array: Any, index: Int[Array, 'prompts chosen']) -> Any:
  """Of each prompt's second axis, those of the index."""
  index = index.reshape(*index.shape, *[1] * (array.ndim - 2))
  return jnp.take_along_axis(array, index, axis=1)
