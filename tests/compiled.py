"""Steps of one configuration are compiled once.

Compiling is what most tests of training spend their time on.
"""

import contextlib
import dataclasses
import functools

import pytest

from codet5p_jax.training.train_step import make_train_step

cached_train_step = functools.cache(make_train_step)


def _make_once(config, mesh, is_trained=True):
  # How many bad steps end a run is no part of what is compiled.
  rule = dataclasses.replace(config.bad_steps, max_in_a_row=1)
  config_of_kept = dataclasses.replace(config, bad_steps=rule)
  train_step = cached_train_step(config_of_kept, mesh, is_trained)
  return dataclasses.replace(train_step, config=config)


@contextlib.contextmanager
def compiling_once(*modules):
  """Patches modules that make train steps, so that whole runs share theirs.

  That another process compiles the same program is for the runs from the
  command line to show.
  """
  with pytest.MonkeyPatch.context() as patch:
    for module in modules:
      patch.setattr(module, 'make_train_step', _make_once)
    yield
