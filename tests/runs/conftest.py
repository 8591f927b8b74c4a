"""Whole runs, several of them of one configuration."""

import functools

import pytest


@pytest.fixture(scope='session', autouse=True)
def _compile_once():
  """Runs of one configuration share their compiled step.

  Compiling is most of what a small run takes. That another process compiles the
  same program is for the runs from the command line to show.
  """
  from codet5p_jax import trained_model
  from codet5p_jax.runs import replay, train

  cached = functools.cache(train.make_train_step)
  with pytest.MonkeyPatch.context() as patch:
    for module in (train, trained_model, replay):
      patch.setattr(module, 'make_train_step', cached)
    yield
