import json
import logging
import math
import re
import types

import jax
import jax.numpy as jnp
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.training import logging as run_logging
from codet5p_jax.training.logging import RunLog, check_finite, means
from codet5p_jax.training.run_folder import RunFolder

# What `means` makes of the metrics of a step of two objectives.
VALUES = {
    'causal_lm/loss': 2.5,
    'causal_lm/tokens': 100.0,
    'causal_lm/accuracy': 0.25,
    'pairs/loss': 1.5,
    'pairs/tokens': 20.0,
    'pairs/accuracy': 0.5,
    'grad_norm': 3.0,
}
EVALUATED = {name: v for name, v in VALUES.items() if '/' in name}


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still unless it is moved."""
  clock = types.SimpleNamespace(now=100.0)
  clock.monotonic = lambda: clock.now
  monkeypatch.setattr(run_logging, 'time', clock)
  return clock


@pytest.fixture
def log(tmp_path, clock):
  log = RunLog(RunFolder(tmp_path), first_step=4, last_step=9)
  yield log
  log.close()


def rows(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def documented_keys():
  """The names that the schema in the docstring gives, of both objectives."""
  names = re.findall(r'^    (\S+) {2,}\S', RunLog.__doc__, re.MULTILINE)
  return {
      name.replace('<objective>', objective)
      for name in names
      for objective in ('causal_lm', 'pairs')
  }


def test_rows_have_the_keys_that_are_documented(log, tmp_path):
  log.advance(VALUES)
  log.train(5, VALUES, learning_rate=0.5, input_wait_seconds=0.25)
  log.evaluation(5, EVALUATED)
  train, evaluation = rows(tmp_path)
  assert train.keys() == documented_keys()
  assert train == {
      'step': 5,
      'kind': 'train',
      **VALUES,
      'learning_rate': 0.5,
      'input_wait_seconds': 0.25,
      'target_tokens_per_second': train['target_tokens_per_second'],
  }
  assert evaluation == {'step': 5, 'kind': 'evaluation', **EVALUATED}
  assert evaluation.keys() < documented_keys()


def test_tokens_per_second_count_all_steps_since_the_row_before(
    log, tmp_path, clock
):
  for step, advances, seconds in ((5, 1, 2.0), (8, 3, 4.0), (9, 1, 1.0)):
    for _ in range(advances):
      log.advance(VALUES)
    clock.now += seconds
    log.train(step, VALUES)
  rates = [row['target_tokens_per_second'] for row in rows(tmp_path)]
  assert rates == [60.0, 90.0, 120.0]


def test_the_time_of_an_evaluation_is_none_of_the_trainings(
    log, tmp_path, clock
):
  log.advance(VALUES)
  clock.now += 2
  log.train(5, VALUES)
  clock.now += 1000
  log.evaluation(5, EVALUATED)
  log.advance(VALUES)
  clock.now += 2
  log.train(6, VALUES)
  train = [row for row in rows(tmp_path) if row['kind'] == 'train']
  assert [row['target_tokens_per_second'] for row in train] == [60.0, 60.0]


def test_an_evaluation_is_told_in_one_line(log, caplog):
  with caplog.at_level(logging.INFO):
    log.evaluation(5, {'pairs/loss': 1.23456, 'pairs/tokens': 20.0})
  [message] = [record.getMessage() for record in caplog.records]
  assert message == 'Step 5, validation: pairs/loss 1.235, pairs/tokens 20'


def test_every_number_of_a_row_goes_to_tensorboard(log, tmp_path):
  log.train(5, VALUES, learning_rate=0.5)
  log.evaluation(5, EVALUATED)
  log.close()
  [events] = (tmp_path / 'events').iterdir()
  content = events.read_bytes()
  names = [f'train/{name}' for name in [*VALUES, 'learning_rate']]
  names += [f'evaluation/{name}' for name in EVALUATED]
  for name in names:
    assert name.encode() in content, name


def test_the_bar_begins_where_the_run_goes_on(tmp_path, capsys):
  log = RunLog(RunFolder(tmp_path), first_step=4, last_step=9)
  log.advance(VALUES)
  log.train(5, VALUES)
  log.close()
  bar = capsys.readouterr().err.strip().rsplit('\r', 1)[-1]
  assert '5/9' in bar
  assert 'loss 2.500 1.500' in bar


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  log = RunLog(RunFolder(tmp_path), 0, 9)
  log.advance(VALUES)
  log.train(1, VALUES)
  log.evaluation(1, EVALUATED)
  log.close()
  assert not list(tmp_path.iterdir())
  assert capsys.readouterr().err == ''


def test_means_divide_sums_by_weights_and_count_tokens():
  metrics = {
      'pairs/loss': (jnp.float32(30.0), jnp.float32(20.0)),
      'pairs/accuracy': (jnp.float32(5.0), jnp.float32(20.0)),
      'grad_norm': (jnp.float32(3.0), jnp.float32(1.0)),
  }
  values = means(metrics)
  assert values == {
      'pairs/loss': 1.5,
      'pairs/tokens': 20.0,
      'pairs/accuracy': 0.25,
      'grad_norm': 3.0,
  }
  assert all(type(value) is float for value in values.values())


def test_metrics_of_one_objective_have_no_prefix():
  metrics = {'loss': (jnp.float32(30.0), jnp.float32(20.0))}
  assert means(metrics) == {'loss': 1.5, 'tokens': 20.0}


def test_the_mean_of_nothing_is_0():
  metrics = {'pairs/loss': (jnp.float32(0.0), jnp.float32(0.0))}
  assert means(metrics) == {'pairs/loss': 0.0, 'pairs/tokens': 0.0}


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('pairs/loss', 'step 17, found that loss of pairs is '),
        ('grad_norm', 'step 17, found that grad_norm of all objectives is '),
    ],
)
def test_what_is_not_finite_is_named_with_its_step(name, words, value):
  with pytest.raises(UserError, match=f'{words}{value}; lower') as error:
    check_finite(17, VALUES | {name: value})
  assert '\n' not in str(error.value)


def test_finite_numbers_pass_however_large():
  assert check_finite(17, VALUES | {'grad_norm': 1e38}) is None
