import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.decoding.sampling import (
    Sampling,
    choose_tokens,
    log_probabilities,
)
from codet5p_jax.errors import UserError

VOCABULARY, DRAWS = 23, 40_000
LOGITS = np.random.default_rng(4).normal(0, 2, VOCABULARY).astype(np.float32)
LOGITS[[2, 19]] = -np.inf  # Padding of a table, at other places than its end.


def expected_probabilities(logits, temperature, top_k, top_p):
  """Temperature, then top-k, then top-p, one token at a time."""
  weights = np.exp(logits.astype(np.float64) / temperature)
  order = sorted(range(len(weights)), key=lambda token: -weights[token])
  if top_k:
    for token in order[top_k:]:
      weights[token] = 0
  weights /= weights.sum()
  mass, kept = 0.0, []
  for token in order:
    if mass >= top_p:
      break
    kept.append(token)
    mass += weights[token]
  result = np.zeros(len(weights))
  result[kept] = weights[kept] / weights[kept].sum()
  return result


@pytest.mark.parametrize(
    ('temperature', 'top_k', 'top_p'),
    [
        (1.0, 0, 1.0),
        (0.6, 0, 1.0),
        (1.0, 7, 1.0),
        (1.3, 0, 0.8),
        # Top-p sees what top-k left: the other order would keep more tokens.
        (1.7, 6, 0.75),
        (0.8, 50, 0.95),  # More than there are.
    ],
)
def test_draws_have_the_probabilities_of_a_plain_reference(
    temperature, top_k, top_p
):
  sampling = Sampling(temperature, top_k, top_p)
  keys = jax.random.split(jax.random.key(3), DRAWS)
  drawn = choose_tokens(
      jnp.broadcast_to(LOGITS, (DRAWS, VOCABULARY)), keys, sampling
  )
  counts = np.bincount(np.asarray(drawn), minlength=VOCABULARY)
  expected = DRAWS * expected_probabilities(LOGITS, temperature, top_k, top_p)
  assert not counts[expected == 0].any()
  likely = expected > 5
  rest = expected[~likely].sum()
  found = [*counts[likely], counts[~likely].sum()] if rest else counts[likely]
  wanted = [*expected[likely], rest] if rest else expected[likely]
  chi_square = np.sum((np.array(found) - wanted) ** 2 / wanted)
  freedom = len(wanted) - 1
  # Of chance, less than once in 10,000: four deviations above the mean.
  assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 2


def test_the_reference_tells_the_two_orders_apart():
  """Else the test above could not."""
  together = expected_probabilities(LOGITS, 1.7, 6, 0.75)
  alone = expected_probabilities(LOGITS, 1.7, 0, 0.75)
  assert np.count_nonzero(together) < np.count_nonzero(alone[:]) <= 20
  assert np.count_nonzero(together) < 6


def test_temperature_zero_takes_the_likeliest():
  rows = jnp.stack([LOGITS, LOGITS[::-1]])
  keys = jax.random.split(jax.random.key(0), 2)
  found = choose_tokens(rows, keys, Sampling(0.0, top_k=5, top_p=0.3))
  best = int(np.argmax(LOGITS))
  assert found.tolist() == [best, VOCABULARY - 1 - best]


@pytest.mark.parametrize('sampling', [Sampling(1.0, 0), Sampling(1.0, 9, 0.9)])
def test_a_row_draws_by_its_own_key_alone(sampling):
  keys = jax.random.split(jax.random.key(1), 11)
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(11, VOCABULARY)))
  together = choose_tokens(rows, keys, sampling)
  alone = choose_tokens(rows[6:7], keys[6:7], sampling)
  assert alone[0] == together[6]


def test_log_probabilities_are_those_of_all_tokens():
  found = log_probabilities(jnp.asarray([LOGITS, LOGITS]), jnp.array([5, 0]))
  finite = LOGITS[np.isfinite(LOGITS)].astype(np.float64)
  total = np.log(np.exp(finite).sum())
  np.testing.assert_allclose(found, LOGITS[[5, 0]] - total, rtol=1e-5)


@pytest.mark.parametrize(
    ('values', 'told'),
    [
        ({'temperature': -0.1}, 'a temperature of 0'),
        ({'temperature': float('nan')}, 'a temperature of 0'),
        ({'top_k': -1}, 'top_k of 0'),
        ({'top_p': 0.0}, '0 < top_p <= 1'),
        ({'top_p': 1.5}, '0 < top_p <= 1'),
    ],
)
def test_values_outside_their_range_are_told(values, told):
  with pytest.raises(UserError, match=told):
    Sampling(**values)
