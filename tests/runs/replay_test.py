import contextlib
import dataclasses
import os
import pathlib
import platform
import re
import shutil
import socket
import subprocess
import sys
import weakref

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax import main
from codet5p_jax.corpus.build import CorpusSettings, build_corpus
from codet5p_jax.corpus.executors import Processes
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.models.computation import Computation
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.seq2seq_causal_lm import Seq2SeqCausalLM
from codet5p_jax.runs import replay as module
from codet5p_jax.runs.replay import replay
from codet5p_jax.runs.train import train
from codet5p_jax.trained_model import load_trained_model
from codet5p_jax.training.batches import TrainBatches
from codet5p_jax.training.checkpoints.layout import flatten, nest
from codet5p_jax.training.checkpoints.weights import save_weights
from codet5p_jax.training.files import write_json
from codet5p_jax.training.optimizers import AdamW
from codet5p_jax.training.run_folder import read_metrics
from codet5p_jax.training.shard_digests import Difference
from codet5p_jax.training.step_health import BadSteps
from codet5p_jax.training.train_step import StepConfig
from tests.faults_test import TRAIN

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 6
BAD = 5
HOST = re.escape(platform.node())


@pytest.fixture(scope='module')
def config(make_model):
  return StepConfig(
      model=make_model(num_decoder_layers=1),
      objectives=(CausalLM(target_length=16, loss_tile_length=8),),
      optimizer=AdamW(1e-2, 2, STEPS, 0.1),
      batch_size=8,
      computation=Computation(dtype='float32', dropout_rate=0.1),
      # Not the default: replay must find it in the folder.
      bad_steps=BadSteps(spike_deviations=7.0),
  )


def run(config, run_dir, corpus, init_from=()):
  train(
      config,
      str(run_dir),
      str(corpus),
      train_steps=STEPS,
      init_from=init_from,
      log_every=1,
      evaluation_batch_count=1,
      checkpoint_every=2,
  )


@pytest.fixture(scope='module')
def poison():
  """Patches the data of step BAD so that it holds a NaN."""

  def apply(patch):
    at = TrainBatches.at

    def poisoned(self, number):
      batches = at(self, number)
      if number == BAD - 1:
        weights = batches['causal_lm']['decoder_loss_weights']
        spoiled = np.array(weights)
        spoiled[0, 3, 2] = np.nan
        batches['causal_lm']['decoder_loss_weights'] = jax.device_put(
            spoiled, weights.sharding
        )
      return batches

    patch.setattr(TrainBatches, 'at', poisoned)

  return apply


@pytest.fixture(scope='module')
def run_dir(config, small_corpus, poison, tmp_path_factory):
  """A complete run whose fifth step was left out; not to be changed."""
  folder = tmp_path_factory.mktemp('runs') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    poison(patch)
    run(config, folder, small_corpus)
  return folder


@pytest.fixture
def replayed(capsys):
  """Replays a step; returns what was printed, line by line."""

  def printed(run_dir, step, **options):
    capsys.readouterr()
    replay(str(run_dir), step, **options)
    return capsys.readouterr().out.splitlines()

  return printed


def logged(run_dir, step):
  [row] = [
      row
      for row in read_metrics(run_dir / 'metrics.jsonl')
      if (row['step'], row['kind']) == (step, 'train')
  ]
  return row


def shown(line, name):
  return float(re.search(rf'{name} ([^ ,]+)', line)[1])


def test_bad_data_is_bad_again_and_named(
    config, small_corpus, run_dir, poison, monkeypatch, tmp_path, capsys
):
  folder = shutil.copytree(run_dir, tmp_path / 'run')
  poison(monkeypatch)
  arguments = [f'--run_dir={folder}', f'--step={BAD}', '--times=3']
  assert main.main(['replay', *arguments]) == 0
  now, then, finite, _, found = capsys.readouterr().out.splitlines()
  assert now == 'Step 5 now: causal_lm/loss nan, grad_norm nan'
  assert then == 'In the run: causal_lm/loss nan, grad_norm nan'
  assert re.match(r'Not finite: gradients in (\d+) of \1 leaves, ', finite)
  assert finite.endswith(', ...') and finite.count('/') >= 5
  words = re.fullmatch(
      f'The same 3 times on host {HOST}: look at the data '
      r'\(examples 32 to 39 of causal_lm, made of rows ([0-9, ]+); the batch '
      rf'is in {folder}/bad_steps/5.npz\), for loss of causal_lm is nan',
      found,
  )
  with np.load(folder / 'bad_steps/5.npz') as batch:
    weights = batch['causal_lm/decoder_loss_weights']
    [targets] = batch['causal_lm/decoder_target_tokens']
  assert np.argwhere(np.isnan(weights)).tolist() == [[0, 3, 2]]
  # Those rows are in it, in their order.
  [objective] = config.objectives
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  rows = objective.rows(str(small_corpus), 'train', vocabulary)
  for target, number in zip(targets, words[1].split(', '), strict=True):
    example = objective.example(
        rows[int(number)], np.random.default_rng(0), vocabulary
    )
    np.testing.assert_array_equal(target, example['decoder_target_tokens'])


def with_high_loss(batches):
  """Rows of a token that never came before, instead of one that each has."""
  features = dict(batches['causal_lm'])
  targets = np.array(features['decoder_target_tokens'])
  weights = np.array(features['decoder_loss_weights'])
  targets[..., :4], targets[..., 4:] = 599, 1
  # Taking away what is likelier leaves a high sum, and little to divide it by.
  weights[..., 4:] *= -0.75
  for name, array in (
      ('decoder_target_tokens', targets), ('decoder_loss_weights', weights)
  ):  # fmt: skip
    features[name] = jax.device_put(array, features[name].sharding)
  return {'causal_lm': features}


def test_a_spike_is_named_and_replay_knows_the_rule_of_every_session(
    small_corpus, monkeypatch, tmp_path, capsys
):
  at = TrainBatches.at
  monkeypatch.setattr(
      TrainBatches,
      'at',
      lambda self, number: with_high_loss(at(self, number))
      if number == BAD - 1
      else at(self, number),
  )
  folder = tmp_path / 'run'
  command = [
      *TRAIN, f'DATA_DIR={small_corpus}', f'RUN_DIR={folder}',
      f'TRAIN_STEPS={STEPS}', 'LEARNING_RATE=1e-2', 'CHECKPOINT_EVERY=2',
      'MAX_BAD_STEPS=1', '--gin.BadSteps.spike_after=2',
  ]  # fmt: skip

  def replay_step(step):
    capsys.readouterr()
    assert main.main(['replay', f'--run_dir={folder}', f'--step={step}']) == 0
    now, then, _, digest, found = capsys.readouterr().out.splitlines()
    for name in ('causal_lm/loss', 'grad_norm'):
      np.testing.assert_allclose(
          shown(now, name), shown(then, name), rtol=1e-5
      )
    return digest, found

  assert main.main([*command, 'SPIKE_DEVIATIONS=2.0']) == 2
  line = capsys.readouterr().err.splitlines()[-1]
  spike = (
      r'loss of causal_lm is [0-9.]+, [0-9.]+ standard deviations above the '
      r'mean \(2 are allowed\)'
  )
  assert re.search(
      rf'1 up to step 5, where {spike}; .*go on with a larger SPIKE_DEV', line
  )
  _, found = replay_step(BAD)
  assert 'look at the data (examples 32 to 39 of causal_lm' in found
  assert re.search(rf'{folder}/bad_steps/5.npz\), for {spike}$', found)

  # The next session takes it.
  assert main.main([*command, 'SPIKE_DEVIATIONS=None']) == 0
  assert [logged(folder, step)['bad_steps'] for step in (4, BAD)] == [0, 0]
  _, found = replay_step(BAD)
  assert 'nothing wrong' in found
  digest, _ = replay_step(6)
  # Also where the steps before it are of both.
  shutil.rmtree(folder / 'checkpoints/4')
  assert replay_step(6)[0] == digest


def test_a_step_that_is_sound_now_accuses_the_hardware_of_then(
    run_dir, replayed
):
  now, then, finite, _, found = replayed(run_dir, BAD)
  assert 2 < shown(now, 'loss') < 9
  assert then.endswith('causal_lm/loss nan, grad_norm nan')
  assert finite == 'All gradients are finite.'
  assert re.match(
      f'The same 2 times on host {HOST}, and nothing wrong: if .* hardware',
      found,
  )
  assert not (run_dir / 'bad_steps').exists()


def test_the_state_before_a_step_is_that_of_the_run(
    run_dir, replayed, poison, monkeypatch, tmp_path
):
  """Also after a step that was left out, and from the very beginning."""
  poison(monkeypatch)
  digests = {}
  for step in (4, 6):
    now, then, _, digests[step], _ = replayed(run_dir, step)
    row = logged(run_dir, step)
    for name in ('causal_lm/loss', 'grad_norm'):
      np.testing.assert_allclose(shown(now, name), row[name], rtol=1e-5)
      np.testing.assert_allclose(shown(then, name), row[name], rtol=1e-7)
  folder = shutil.copytree(run_dir, tmp_path / 'run')
  shutil.rmtree(folder / 'checkpoints')
  for step in (4, 6):
    _, _, _, digest, _ = replayed(folder, step)
    assert digest == digests[step]
  assert digests[4] != digests[6]


def test_an_unfinished_run_serves_by_its_newest_checkpoint(run_dir, tmp_path):
  folder = shutil.copytree(run_dir, tmp_path / 'run')
  shutil.rmtree(folder / 'model')
  finished, unfinished = (load_trained_model(str(x)) for x in (run_dir, folder))
  assert unfinished.step == STEPS
  # Of rows that only pad the table, weights hold nothing.
  size = finished.vocabulary.vocab_size
  jax.tree.map(
      lambda x, y: np.testing.assert_array_equal(x[:size], y[:size]),
      unfinished.params,
      finished.params,
  )


def delete_half(step_dir):
  """As a process leaves it that is killed while it deletes."""
  for name in ('checksums.json', 'metadata', 'optimizer'):
    path = step_dir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_where_checkpoints_are_damaged_the_one_before_serves(
    run_dir, replayed, poison, monkeypatch, tmp_path, caplog
):
  poison(monkeypatch)
  _, _, _, digest, _ = replayed(run_dir, 6)
  folder = shutil.copytree(run_dir, tmp_path / 'run')
  checkpoints = folder / 'checkpoints'
  delete_half(checkpoints / '6')  # The newest tells where the weights were.
  record = checkpoints / '4/trainable/_METADATA'
  record.write_bytes(record.read_bytes()[:-1])
  with caplog.at_level('INFO', 'codet5p_jax'):
    assert replayed(folder, 6)[3] == digest
  told = [record.getMessage() for record in caplog.records]
  [line] = [line for line in told if 'damaged' in line]
  assert re.fullmatch(
      rf'Checkpoint {checkpoints}/4 is damaged: trainable/_METADATA has .*; '
      r'going further back\.',
      line,
  )
  assert 'At step 2; 3 more to the one asked for.' in told
  delete_half(checkpoints / '2')
  with caplog.at_level('INFO', 'codet5p_jax'):
    assert replayed(folder, 6)[3] == digest
  assert 'At step 0; 5 more to the one asked for.' in caplog.text
  # Nothing was moved: the run that owns the folder may be using it.
  assert {path.name for path in checkpoints.iterdir()} == {'2', '4', '6'}


def test_other_data_are_refused(
    run_dir, small_corpus, source_files, write_rows, tmp_path
):
  rows = write_rows(tmp_path / 'rows.jsonl', source_files[:30])
  build_corpus(
      CorpusSettings(sources=(str(rows),), vocab_size=600),
      tmp_path / 'other',
      load_vocabulary(small_corpus / 'vocabulary'),
      Processes(1),
  )
  with pytest.raises(UserError) as error:
    replay(str(run_dir), 3, data_dir=str(tmp_path / 'other'))
  assert re.fullmatch(
      rf'expected in {tmp_path}/other the data of causal_lm that the run was '
      r'trained with \(\d+ rows, [0-9a-f]{16}\), found others \(\d+ rows, '
      r'[0-9a-f]{16}\); put them back, or give --data_dir',
      str(error.value),
  )
  # The same data elsewhere are as good.
  moved = shutil.copytree(small_corpus, tmp_path / 'moved')
  replay(str(run_dir), 3, data_dir=str(moved))


@pytest.fixture
def patch_gradients(monkeypatch):
  """Lets a function change the gradients of a computation by its number."""

  def patch(change):
    make = module.make_train_step

    def make_changed(*arguments):
      train_step = make(*arguments)
      made = []

      def gradients(state, batch):
        grads, metrics = train_step.gradients(state, batch)
        made.append(None)
        return change(len(made), grads), metrics

      return dataclasses.replace(train_step, gradients=gradients)

    monkeypatch.setattr(module, 'make_train_step', make_changed)

  return patch


def with_bit_flipped(grads, path, device=None):
  """Flips a bit of a leaf, on all its devices or on one."""
  flat = flax.traverse_util.flatten_dict(grads, sep='/')
  leaf = flat[path]
  parts = []
  for shard in leaf.addressable_shards:
    part = np.array(shard.data)
    if device in (None, shard.device):
      part.reshape(-1).view(np.uint32)[0] ^= 1
    parts.append(jax.device_put(part, shard.device))
  flat[path] = jax.make_array_from_single_device_arrays(
      leaf.shape, leaf.sharding, parts
  )
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def test_gradients_of_two_times_are_never_held_at_once(
    run_dir, replayed, patch_gradients
):
  before = []

  def change(time, grads):
    assert not any(leaf() is not None for leaf in before)
    before.extend(map(weakref.ref, jax.tree.leaves(grads)))
    return grads

  patch_gradients(change)
  replayed(run_dir, 3, times=3)
  assert len(before) > 30


def test_a_host_that_computes_otherwise_is_named_with_the_leaf(
    run_dir, replayed, patch_gradients
):
  path = 'encoder/layers/mlp/wo/kernel'
  patch_gradients(
      lambda time, grads: with_bit_flipped(grads, path) if time == 2 else grads
  )
  *_, found = replayed(run_dir, 3, times=3)
  assert re.fullmatch(
      rf'host {HOST} \(process 0\) computed other gradients the second time '
      rf'\(first in leaf {path}\): look at its hardware',
      found,
  )


def test_a_device_with_another_copy_is_named(
    run_dir, replayed, patch_gradients
):
  path = 'decoder/final_layer_norm/scale'  # Each device has it whole.
  patch_gradients(
      lambda time, grads: with_bit_flipped(grads, path, jax.devices()[3])
  )
  *_, found = replayed(run_dir, 3)
  assert re.fullmatch(
      rf'host {HOST} \(process 0\): copies of the gradients differed from '
      rf'those on other devices the first time \(first in leaf {path}, on '
      r'device 3\): look at its hardware',
      found,
  )


def test_hosts_that_differ_together_are_to_be_tried_alone():
  devices = [type('Device', (), {'id': n, 'process_index': n // 2})
             for n in range(6)]  # fmt: skip
  found = module._describe_difference(
      Difference(3, 1, (1, 4, 5), is_copy=False), ['a', 'b'], devices,
      ['north', 'east', 'south'],
  )  # fmt: skip
  assert found.startswith(
      'host north (process 0) and host south (process 2) computed other '
      'gradients the 4th time (first in leaf b): replay on each host alone'
  )
  assert module._counted(['north', 'east', 'south']) == 'all 3 hosts'


def test_weights_that_were_loaded_and_frozen_are_found_again(
    config, small_corpus, run_dir, replayed, tmp_path
):
  """With all that a state may hold: int8, objectives, micro-batches."""
  folder = tmp_path / 'run'
  shutil.copytree(run_dir / 'model', tmp_path / 'first/model')
  for name in ('config.json', 'vocabulary'):
    copy = shutil.copytree if (run_dir / name).is_dir() else shutil.copy
    copy(run_dir / name, tmp_path / 'first' / name)
  init_from = [(str(tmp_path / 'first'), '.*', None)]
  others = Seq2SeqCausalLM(
      row_length=19, source_length=20, target_length=21, loss_tile_length=8
  )
  frozen = dataclasses.replace(
      config,
      objectives=(*config.objectives, others),
      batch_size=16,
      num_microbatches=2,
      trainable=('encoder/.*', '.*/wo/.*'),
      frozen_dtype='int8',
  )
  run(frozen, folder, small_corpus, init_from)

  def replay_step_3(**options):
    now, then, _, digest, found = replayed(folder, 3, **options)
    for name in (': causal_lm/loss', 'seq2seq_causal_lm/loss', 'grad_norm'):
      np.testing.assert_allclose(
          shown(now, name), shown(then, name), rtol=1e-5
      )
    assert 'nothing wrong' in found
    return digest

  digest = replay_step_3()
  # A later checkpoint knows where the weights were; without one, the user.
  shutil.rmtree(folder / 'checkpoints' / '2')
  assert replay_step_3() == digest
  # And what the frozen ones were.
  other = copy_with_other_weights(tmp_path / 'first', tmp_path / 'other')
  with pytest.raises(UserError, match='expected the frozen .* give --init_f'):
    replay(str(folder), 3, init_from=[(str(other), '.*', None)])
  shutil.rmtree(folder / 'checkpoints')
  with pytest.raises(UserError, match='found neither; give --init_from') as e:
    replay(str(folder), 3)
  assert str(tmp_path / 'first') in str(e.value)
  (tmp_path / 'first').rename(tmp_path / 'moved')
  moved = [(str(tmp_path / 'moved'), '.*', None)]
  assert replay_step_3(init_from=moved) == digest


def copy_with_other_weights(folder, copy):
  shutil.copytree(folder, copy)
  model = load_trained_model(str(folder))
  params = flatten(model.all_params)
  params['decoder/final_layer_norm/scale'] *= 2
  shutil.rmtree(copy / 'model')
  save_weights(
      copy / 'model', nest(params), {'step': 0}, model.vocabulary.vocab_size
  )
  return copy


@pytest.mark.parametrize(
    ('step', 'options', 'message'),
    [
        (0, {}, 'step to be at least 1, found 0'),
        (7, {}, 'which has 6, found step 7'),
        (3, {'times': 1}, 'times to be 2 or more, .* found 1'),
        (3, {'data_dir': '/nowhere'}, 'no metadata.json in /nowhere'),
    ],
)
def test_what_cannot_be_made_again_is_one_line(
    run_dir, step, options, message
):
  with pytest.raises(UserError, match=message) as error:
    replay(str(run_dir), step, **options)
  assert '\n' not in str(error.value)


def test_a_converted_model_has_no_steps(tmp_path):
  write_json(tmp_path / 'config.json', {'model': None})
  with pytest.raises(UserError, match='found a converted model in'):
    replay(str(tmp_path), 1)


def test_leaves_that_are_not_finite_are_counted_and_some_named(
    run_dir, replayed, patch_gradients
):
  def change(time, grads):
    flat = flax.traverse_util.flatten_dict(grads, sep='/')
    for stack in ('encoder', 'decoder'):
      path = f'{stack}/final_layer_norm/scale'
      flat[path] = flat[path].at[4].set(jnp.inf)
    return flax.traverse_util.unflatten_dict(flat, sep='/')

  patch_gradients(change)
  _, _, finite, *_ = replayed(run_dir, 3)
  assert re.fullmatch(
      r'Not finite: gradients in 2 of \d+ leaves, '
      'decoder/final_layer_norm/scale, encoder/final_layer_norm/scale',
      finite,
  )


# Two processes, each a host of its own; one of them computes otherwise.


def test_of_two_processes_the_one_that_computes_otherwise_is_named(
    run_dir, cpu_flags
):
  with socket.create_server(('', 0)) as server:
    address = f'localhost:{server.getsockname()[1]}'
  environment = os.environ | {
      'XLA_FLAGS': cpu_flags.replace('count=8', 'count=4'),
      'PYTHONPATH': str(ROOT),
  }
  with contextlib.ExitStack() as stack:
    processes = [
        stack.enter_context(
            subprocess.Popen(
                [sys.executable, '-m', 'tests.runs.replay_of_two', address,
                 str(n), str(run_dir)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment,
            )
        )
        for n in range(2)
    ]  # fmt: skip
    for process in processes:
      stack.callback(process.kill)
    printed = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [2, 2], printed
  lines, silence = (out.splitlines() for out, _ in printed)
  assert not silence
  quiet, planted, summed = lines[:5], lines[5:10], lines[10:]
  for line, row in zip(quiet[:2], [logged(run_dir, 3)] * 2):
    for name in ('causal_lm/loss', 'grad_norm'):
      np.testing.assert_allclose(shown(line, name), row[name], rtol=1e-5)
  assert quiet[4] == (
      'The same 2 times on all 2 hosts, and nothing wrong: if the run left '
      'this step out, look at the hardware it had then'
  )
  path = 'encoder/layers/mlp/wo/kernel'
  assert planted[4] == (
      f'host south (process 1) computed other gradients the second time (first '
      f'in leaf {path}): look at its hardware'
  )
  # What is wrong before the sum is so everywhere after it.
  assert re.fullmatch(
      r'host north \(process 0\) and host south \(process 1\) computed other '
      r'gradients the second time \(first in leaf .*\): replay on each host '
      r'alone, as their gradients are summed, .*',
      summed[4],
  )
  # Both have the digests of all: twice the same, then others.
  tables = [re.findall('^table (.*)$', err, re.M) for _, err in printed]
  assert tables[0] == tables[1]
  first, again, third, changed, fifth, other = tables[0]
  assert first == again == third == fifth
  assert len({first, changed, other}) == 3
  for _, err in printed:
    assert 'found another step to make again in process 1' in err
