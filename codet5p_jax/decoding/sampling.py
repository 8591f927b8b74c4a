"""The choice of the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from codet5p_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn: temperature, then top-k, then top-p.

  The order is that of transformers' `generate`, which the released system was
  evaluated with.

  Attributes:
    temperature: logits are divided by it; 0 takes the likeliest token, whatever
      the rest says.
    top_k: only as many of the likeliest tokens are kept; 0 keeps all. 50 where
      the released system was evaluated: it did not say so, its library did.
    top_p: of those, the likeliest are kept until they have this much of the
      probability together, the one that completes it included; 1 keeps all.

  Raises:
    UserError: a value is outside its range.
  """

  temperature: float = 1.0
  top_k: int = 50
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise UserError(
          f'expected a temperature of 0 (the likeliest token) or more, found '
          f'{self.temperature}; set TEMPERATURE'
      )
    if self.top_k < 0:
      raise UserError(
          f'expected top_k of 0 (all tokens) or more, found {self.top_k}; set '
          f'TOP_K'
      )
    if not 0 < self.top_p <= 1:
      raise UserError(
          f'expected 0 < top_p <= 1 (all tokens), found {self.top_p}; set TOP_P'
      )


def choose_tokens(
    logits: Float[Array, 'batch vocab'],
    keys: Key[Array, 'batch'],
    sampling: Sampling,
) -> Int[Array, 'batch']:
  """Draws a token for each row, by the row's own key.

  Args:
    logits: float32, -inf for what is never drawn.
    keys: of random numbers.
    sampling: how.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  vocab = logits.shape[-1]
  is_cut = 0 < sampling.top_k < vocab
  if not is_cut and sampling.top_p == 1:
    return _draw(logits, keys)
  best, tokens = jax.lax.top_k(logits, sampling.top_k if is_cut else vocab)
  probabilities = jax.nn.softmax(best, axis=-1)
  likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
  best = jnp.where(likelier < sampling.top_p, best, -jnp.inf)
  drawn = _draw(best, keys)
  return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]


def _draw(
    logits: Float[Array, 'batch choices'], keys: Key[Array, 'batch']
) -> Int[Array, 'batch']:
  # A key for each row, so that its draws do not depend on the rows beside it.
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def log_probabilities(
    logits: Float[Array, 'batch vocab'], tokens: Int[Array, 'batch']
) -> Float[Array, 'batch']:
  """The model's own log-probability of each row's token, natural logarithm."""
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  return jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]
