import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.training.optimizers import AdamW


def numpy_adamw(config, params, gradients):
  """The textbook: clip, moments, bias correction, decoupled decay."""
  m = {k: np.zeros_like(v) for k, v in params.items()}
  v = {k: np.zeros_like(x) for k, x in params.items()}
  for t, grads in enumerate(gradients, 1):
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    scale = min(1.0, config.max_grad_norm / norm)
    if t <= config.warmup_steps:
      rate = config.peak_learning_rate * t / config.warmup_steps
    else:
      left = config.decay_steps - (t - 1)
      rate = config.peak_learning_rate * left / (
          config.decay_steps - config.warmup_steps
      )
    for k in params:
      g = grads[k] * scale
      m[k] = config.beta1 * m[k] + (1 - config.beta1) * g
      v[k] = config.beta2 * v[k] + (1 - config.beta2) * g**2
      update = (m[k] / (1 - config.beta1**t)) / (
          np.sqrt(v[k] / (1 - config.beta2**t)) + config.epsilon
      )
      if k == 'kernel':
        update = update + config.weight_decay * params[k]
      params[k] = params[k] - rate * update
  return params


def test_updates_equal_the_textbook():
  config = AdamW(0.01, warmup_steps=3, decay_steps=9, weight_decay=0.1)
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(3, 5)), 'scale': rng.normal(size=7)}
  gradients = [
      {k: rng.normal(size=p.shape) * scale for k, p in params.items()}
      for scale in (0.01, 10.0, 1.0, 0.3, 2.0, 1.0)
  ]
  optimizer = config.make()
  ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  state = optimizer.init(ours)
  for grads in gradients:
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
    updates, state = optimizer.update(grads, state, ours)
    ours = jax.tree.map(jnp.add, ours, updates)
  expected = numpy_adamw(config, params, gradients)
  for k in expected:
    np.testing.assert_allclose(ours[k], expected[k], rtol=2e-5)


def test_schedule_rises_to_its_peak_and_ends_at_zero():
  schedule = AdamW(2.0, 4, 12, 0.0).schedule()
  rates = [float(schedule(step)) for step in range(13)]
  np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
  np.testing.assert_allclose(rates[4:], np.linspace(2.0, 0.0, 9), atol=1e-6)


def test_a_warm_up_longer_than_the_run_is_refused():
  with pytest.raises(UserError, match='found 10 and 10; lower WARMUP_STEPS'):
    AdamW(1.0, 10, 10, 0.0)


def test_norms_biases_and_the_temperature_are_not_decayed():
  params = {
      name: jnp.ones(3) for name in ('kernel', 'scale', 'bias', 'value')
  }
  optimizer = AdamW(0.5, 0, 100, weight_decay=0.1).make()
  gradients = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  moved = {name for name, update in updates.items() if np.any(update)}
  assert moved == {'kernel'}
