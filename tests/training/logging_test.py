import contextlib
import json
import logging
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax.training import logging as run_logging
from codet5p_jax.training import timeline as timelines
from codet5p_jax.training.logging import RunLog, means
from codet5p_jax.training.run_folder import RunFolder
from codet5p_jax.training.timeline import Timeline, read_timeline

# What `means` makes of the metrics of a step of two objectives.
VALUES = {
    'causal_lm/loss': 2.5,
    'causal_lm/perplexity': 12.2,
    'causal_lm/tokens': 100.0,
    'causal_lm/accuracy': 0.25,
    'causal_lm/loss_deviations': -0.75,
    'pairs/loss': 1.5,
    'pairs/perplexity': 4.5,
    'pairs/tokens': 20.0,
    'pairs/accuracy': 0.5,
    'pairs/loss_deviations': 1.25,
    'grad_norm': 3.0,
    'bad_steps': 0.0,
    'bad_in_a_row': 0.0,
}
MICROBATCHES = {'causal_lm': 3, 'pairs': 1}
FLOPS = {'causal_lm': 7_000_000, 'pairs': 4_000_000}  # 25 million a step.
EVALUATED = {
    **{
        name: value
        for name, value in VALUES.items()
        if '/' in name and not name.endswith('/loss_deviations')
    },
    'causal_lm/unigram_entropy': 5.5,
    'pairs/unigram_entropy': 4.5,
}


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still unless it is moved."""
  clock = types.SimpleNamespace(now=100.0)
  clock.monotonic_ns = lambda: round(clock.now * 1e9)
  clock.time = lambda: clock.now
  monkeypatch.setattr(timelines, 'time', clock)
  monkeypatch.setattr(timelines, 'process_age', lambda: 0.0)
  return clock


@pytest.fixture
def timeline(tmp_path, clock):
  """A run's, which is in training."""
  with (
      Timeline(tmp_path / 'timeline.jsonl', is_writer=True) as timeline,
      timeline.training(4),
  ):
    yield timeline


@pytest.fixture
def open_log(tmp_path, timeline):
  """Opens a log; by default of devices whose peak is known."""
  with contextlib.ExitStack() as opened:

    def open_log(flops=FLOPS, peak=1e8):
      log = RunLog(RunFolder(tmp_path), 4, 9, flops, peak, timeline)
      opened.callback(log.close)
      return log

    yield open_log


@pytest.fixture
def log(open_log):
  return open_log()


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


def test_rows_have_the_keys_that_are_documented(
    log, tmp_path, clock, timeline
):
  with timeline.within('input'):
    clock.now += 0.25
  clock.now += 1.75
  log.advance(VALUES, MICROBATCHES)
  log.train(5, VALUES, learning_rate=0.5)
  log.evaluation(5, EVALUATED)
  train, evaluation = rows(tmp_path)
  assert train.keys() == {
      key for key in documented_keys() if not key.endswith('/unigram_entropy')
  }
  assert train == {
      'step': 5,
      'kind': 'train',
      **VALUES,
      'learning_rate': 0.5,
      'input_wait_seconds': 0.25,
      'train_seconds': 2.0,
      'steps_per_second': 0.5,
      'target_tokens_per_second': 60.0,
      'mfu': 0.125,
  }
  assert evaluation == {'step': 5, 'kind': 'evaluation', **EVALUATED}
  assert evaluation.keys() < documented_keys()


def test_rates_count_all_steps_since_the_row_before(log, tmp_path, clock):
  for step, advances, seconds in ((5, 1, 2.0), (8, 3, 4.0), (9, 1, 1.0)):
    for _ in range(advances):
      clock.now += seconds / advances
      log.advance(VALUES, MICROBATCHES)
    log.train(step, VALUES)
  found = [
      (row['target_tokens_per_second'], row['steps_per_second'], row['mfu'])
      for row in rows(tmp_path)
  ]
  assert found == [(60, 0.5, 0.125), (90, 0.75, 0.1875), (120, 1, 0.25)]


def test_model_flops_are_those_of_the_micro_batches_of_each_step(
    log, tmp_path, clock
):
  for microbatches in ({'causal_lm': 4}, {'pairs': 3}):
    clock.now += 1
    log.advance(VALUES, microbatches)
  log.train(6, VALUES)
  # 28 + 12 million FLOPs in 2 seconds of 100 million a second.
  assert rows(tmp_path)[0]['mfu'] == 0.2


@pytest.mark.parametrize('pauses', [(0,), (1000,), (7, 300)])
def test_the_time_of_pauses_is_none_of_the_trainings(
    log, tmp_path, clock, timeline, pauses
):
  for step in (5, 6):
    clock.now += 1
    for bucket, seconds in zip(('evaluation', 'checkpoint'), pauses):
      with timeline.within(bucket):
        clock.now += seconds
    clock.now += 1
    log.advance(VALUES, MICROBATCHES)
    log.train(step, VALUES)
  train = rows(tmp_path)
  assert [row['train_seconds'] for row in train] == [2.0, 2.0]
  assert [row['target_tokens_per_second'] for row in train] == [60.0, 60.0]


def test_a_compiled_step_has_no_part_in_the_rates(log, tmp_path, clock):
  clock.now += 500
  log.advance(VALUES, MICROBATCHES, compiled=True)
  log.train(5, VALUES)
  clock.now += 2
  log.advance(VALUES, MICROBATCHES)
  clock.now += 300
  log.advance(VALUES, MICROBATCHES, compiled=True)
  log.train(7, VALUES)
  first, second = rows(tmp_path)
  assert first['train_seconds'] == 0
  assert not {'steps_per_second', 'target_tokens_per_second', 'mfu'} & set(
      first
  )
  assert (second['train_seconds'], second['steps_per_second']) == (2.0, 0.5)


def test_a_row_counts_the_bad_steps_since_the_row_before(log, tmp_path, clock):
  bad = {'bad_steps': 1.0, 'bad_in_a_row': 1.0}
  for step, changes in ((5, bad), (6, {}), (7, bad), (8, {}), (9, {})):
    clock.now += 1
    log.advance(VALUES | changes, MICROBATCHES, compiled=step == 5)
    if step >= 8:
      log.train(step, VALUES | changes)
  assert [row['bad_steps'] for row in rows(tmp_path)] == [2, 0]


def test_losses_that_are_not_finite_are_logged_as_json(log, tmp_path, clock):
  bad = {
      'pairs/loss': math.nan, 'pairs/tokens': math.nan, 'grad_norm': math.inf
  }  # fmt: skip
  clock.now += 2
  log.advance(VALUES | bad, MICROBATCHES)
  log.train(5, VALUES | bad)
  text = (tmp_path / 'metrics.jsonl').read_text()
  row = json.loads(text, parse_constant=lambda name: pytest.fail(name))
  assert (row['pairs/loss'], row['grad_norm']) == ('nan', 'inf')
  # A damaged batch spoils its own loss and no speed: the 100 tokens count.
  assert row['target_tokens_per_second'] == 50.0


def test_waits_for_input_are_those_since_the_row_before(
    open_log, tmp_path, clock, timeline
):
  with timeline.within('input'):
    clock.now += 9
  log = open_log()
  for step, waited in ((5, 1.5), (6, 0.0), (7, 2.5)):
    with timeline.within('input'):
      clock.now += waited
    log.train(step, VALUES)
  waits = [row['input_wait_seconds'] for row in rows(tmp_path)]
  assert waits == [1.5, 0.0, 2.5]


def test_without_a_peak_there_is_no_mfu(open_log, tmp_path, clock, capsys):
  log = open_log(peak=None)
  clock.now += 2
  log.advance(VALUES, MICROBATCHES)
  log.train(5, VALUES)
  log.close()
  assert rows(tmp_path)[0]['mfu'] == 'n/a'
  assert 'MFU n/a' in capsys.readouterr().err
  [events] = (tmp_path / 'events').iterdir()
  assert b'train/steps_per_second' in events.read_bytes()
  assert b'train/mfu' not in events.read_bytes()


def test_an_evaluation_is_told_in_one_line(log, caplog):
  with caplog.at_level(logging.INFO):
    log.evaluation(5, {'pairs/loss': 1.23456, 'pairs/tokens': 20.0})
  [message] = [record.getMessage() for record in caplog.records]
  assert message == 'Step 5, validation: pairs/loss 1.235, pairs/tokens 20'


def test_every_number_of_a_row_goes_to_tensorboard(log, tmp_path, clock):
  clock.now += 2
  log.advance(VALUES, MICROBATCHES)
  log.train(5, VALUES, learning_rate=0.5)
  log.evaluation(5, EVALUATED)
  log.close()
  [events] = (tmp_path / 'events').iterdir()
  content = events.read_bytes()
  names = [f'train/{name}' for name in [*VALUES, 'learning_rate', 'mfu']]
  names += [f'evaluation/{name}' for name in EVALUATED]
  for name in names:
    assert name.encode() in content, name


def test_every_row_moves_the_timeline(log, tmp_path, clock):
  for step in (5, 6):
    clock.now += 2
    log.advance(VALUES, MICROBATCHES)
    log.train(step, VALUES)
  log.evaluation(6, EVALUATED)
  [session] = read_timeline(tmp_path / 'timeline.jsonl')
  assert [
      (row['kind'], row['step'], row['buckets']['step'])
      for row in session.rows[2:]
  ] == [('progress', 5, 2.0), ('progress', 6, 4.0), ('event', 6, 4.0)]
  assert session.events('evaluation') == [{}]
  log.close()
  [events] = (tmp_path / 'events').iterdir()
  for bucket in timelines.BUCKETS:
    assert f'goodput/{bucket}'.encode() in events.read_bytes()


def last_bar(capsys):
  return capsys.readouterr().err.strip().rsplit('\r', 1)[-1]


def test_the_bar_begins_where_the_run_goes_on(open_log, clock, capsys):
  log = open_log()
  clock.now += 2
  log.advance(VALUES, MICROBATCHES)
  log.train(5, VALUES)
  log.close()
  bar = last_bar(capsys)
  assert '5/9' in bar
  assert 'loss causal 2.500 pairs 1.500, 60 tokens/s, MFU 12.5 %' in bar


def test_the_bar_names_a_single_objective_not_at_all(open_log, capsys):
  log = open_log(flops={'pairs': 4_000_000})
  log.train(5, {'pairs/loss': 1.5})
  log.close()
  assert 'loss 1.500]' in last_bar(capsys)


def test_the_bar_tells_no_target_tokens_where_there_are_none(
    open_log, clock, capsys
):
  log = open_log()
  values = VALUES | {'causal_lm/tokens': 0.0, 'pairs/tokens': 0.0}
  clock.now += 2
  log.advance(values, MICROBATCHES)
  log.train(5, values)
  log.close()
  assert 'pairs 1.500, MFU 12.5 %' in last_bar(capsys)


def test_the_bar_keeps_the_losses_that_a_step_does_not_have(
    open_log, capsys
):
  log = open_log()
  log.train(5, {'causal_lm/loss': 2.5})
  log.train(6, {'pairs/loss': 1.5})
  log.close()
  assert 'loss causal 2.500 pairs 1.500' in last_bar(capsys)


def test_short_names_tell_all_objectives_apart():
  names = ['span_denoising', 'seq2seq_causal_lm', 'causal_lm', 'sequence_lm']
  assert list(run_logging.short_names(names).values()) == [
      'span',
      'seq2seq',
      'causal',
      'sequence',
  ]
  names = ['causal', 'causal_lm', 'causal_lm_long']
  assert list(run_logging.short_names(names).values()) == names


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  path = tmp_path / 'timeline.jsonl'
  with Timeline(path, is_writer=False) as timeline, timeline.training(0):
    log = RunLog(RunFolder(tmp_path), 0, 9, FLOPS, None, timeline)
    log.advance(VALUES, MICROBATCHES)
    log.train(1, VALUES)
    log.evaluation(1, EVALUATED)
    log.close()
  assert not list(tmp_path.iterdir())
  assert capsys.readouterr().err == ''


def test_means_divide_sums_by_weights_and_count_tokens():
  metrics = {
      'pairs/loss': (jnp.float32(30.0), jnp.float32(20.0)),
      'pairs/tokens': (jnp.float32(20.0), jnp.float32(0.0)),
      'pairs/accuracy': (jnp.float32(5.0), jnp.float32(20.0)),
      'grad_norm': (jnp.float32(3.0), jnp.float32(1.0)),
  }
  values = means(metrics)
  assert values == {
      'pairs/loss': 1.5,
      'pairs/perplexity': math.exp(1.5),
      'pairs/tokens': 20.0,
      'pairs/accuracy': 0.25,
      'grad_norm': 3.0,
  }
  assert all(type(value) is float for value in values.values())


def test_metrics_of_one_objective_have_no_prefix():
  metrics = {
      'loss': (jnp.float32(30.0), jnp.float32(20.0)),
      'tokens': (jnp.float32(20.0), jnp.float32(0.0)),
  }
  assert means(metrics) == {
      'loss': 1.5,
      'perplexity': math.exp(1.5),
      'tokens': 20.0,
  }


def test_a_loss_of_other_things_than_tokens_has_no_perplexity():
  metrics = {
      'pairs/loss': (jnp.float32(30.0), jnp.float32(20.0)),
      'pairs/tokens': (jnp.float32(21.0), jnp.float32(0.0)),
  }
  assert means(metrics) == {'pairs/loss': 1.5, 'pairs/tokens': 21.0}


def test_a_perplexity_is_finite_however_large_the_loss():
  metrics = {
      'pairs/loss': (jnp.float32(1e30), jnp.float32(2.0)),
      'pairs/tokens': (jnp.float32(2.0), jnp.float32(0.0)),
  }
  perplexity = means(metrics)['pairs/perplexity']
  assert np.isfinite(np.float32(perplexity)) and perplexity > 1e30


def test_the_mean_of_nothing_is_0():
  nothing = (jnp.float32(0.0), jnp.float32(0.0))
  metrics = {'pairs/loss': nothing, 'pairs/tokens': nothing}
  assert means(metrics) == {
      'pairs/loss': 0.0,
      'pairs/perplexity': 1.0,
      'pairs/tokens': 0.0,
  }
