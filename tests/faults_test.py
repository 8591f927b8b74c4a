"""Faults of users and of disks, as the command line answers them.

Each is one clear line and status 2, and leaves what was there as it was.
"""

import errno
import hashlib
import os
import pathlib
import shutil

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codet5p_jax import main
from codet5p_jax.runs import train as train_run
from codet5p_jax import trained_model
from codet5p_jax.training import files, run_folder
from codet5p_jax.training.batches import TrainBatches
from codet5p_jax.training.checkpoints import save, weights
from tests.compiled import compiling_once

SIZES = {
    'vocab_size': 600,
    'emb_dim': 16,
    'num_heads': 8,
    'head_dim': 2,
    'mlp_dim': 16,
    'num_encoder_layers': 1,
    'num_decoder_layers': 1,
}
TRAIN = (
    'train',
    '--gin_file=models/tiny.gin',
    '--gin_file=objectives/causal_lm.gin',
    '--gin_file=runs/pretrain.gin',
    *(f'--gin.T5Config.{name}={size}' for name, size in SIZES.items()),
    '--gin.train.evaluation_batch_count=1',
    'TARGET_LENGTH=8',
    'TRAIN_STEPS=3',
    'BATCH_SIZE=8',
    'WARMUP_STEPS=1',
    'DTYPE=float32',
    'REMAT_POLICY=none',
    'LOG_EVERY=1',
    'CHECKPOINT_EVERY=1',
)
EVALUATE = ('evaluate', '--gin_file=runs/evaluate.gin')
GENERATE = (
    'generate', 'def f(', '--gin_file=runs/generate.gin', 'MAX_NEW_TOKENS=2'
)


@pytest.fixture(autouse=True, scope='module')
def _compile_once():
  with compiling_once(train_run, trained_model):
    yield
  gin.clear_config()


@pytest.fixture(scope='module')
def corpus(small_corpus):
  return f'DATA_DIR={small_corpus}'


@pytest.fixture(scope='module')
def trained(corpus, tmp_path_factory):
  """A run of three steps, each with its checkpoint; not to be changed."""
  folder = tmp_path_factory.mktemp('runs') / 'trained'
  assert main.main([*TRAIN, corpus, f'RUN_DIR={folder}']) == 0
  return folder


@pytest.fixture
def run_dir(trained, tmp_path):
  """A copy of that run, to be damaged."""
  return pathlib.Path(shutil.copytree(trained, tmp_path / 'run'))


@pytest.fixture
def refusal(capsys):
  """Runs the command line; returns the one line that it answers with."""

  def run(*argv: object) -> str:
    capsys.readouterr()
    assert main.main([str(argument) for argument in argv]) == 2
    printed = capsys.readouterr()
    # Progress comes before it; a carriage return begins its lines anew.
    *before, last = printed.err.removesuffix('\n').split('\n')
    assert last.startswith('codet5p: ')
    assert not any('codet5p: ' in line for line in before)
    assert 'Traceback' not in printed.err
    assert not printed.out
    return last.removeprefix('codet5p: ')

  return run


def content(folder: pathlib.Path) -> dict[str, str | None]:
  """Hashes of all files of a folder, by path; None for folders."""
  return {
      path.relative_to(folder).as_posix(): (
          hashlib.sha256(path.read_bytes()).hexdigest()
          if path.is_file() else None
      )
      for path in folder.rglob('*')
  }


def flip_a_byte(folder: pathlib.Path) -> str:
  """Damages the largest file; returns its name in the folder."""
  candidates = [path for path in folder.rglob('*') if path.is_file()]
  path = max(candidates, key=lambda path: (path.stat().st_size, str(path)))
  damaged = bytearray(path.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  path.write_bytes(damaged)
  return path.relative_to(folder).as_posix()


def forget_steps_after(run_dir: pathlib.Path, step: int) -> None:
  """Makes a finished run one that was stopped after a step."""
  shutil.rmtree(run_dir / 'model')
  for folder in (run_dir / 'checkpoints').iterdir():
    if int(folder.name) > step:
      shutil.rmtree(folder)


# Found before anything is written.


@pytest.mark.parametrize(
    ('typed', 'expected'),
    [
        # Slips of the hand: the nearest name.
        (['BATCHSIZE=8'], ['macro BATCHSIZE; did you mean BATCH_SIZE?']),
        (
            ['--gin.T5Config.num_head=8'],
            ['no parameter num_head; did you mean num_heads?'],
        ),
        (
            ['--gin.T5Confg.num_heads=8'],
            ['imports T5Confg; did you mean T5Config?'],
        ),
        (
            ['--gin_file=runs/pretrian.gin'],
            ['runs/pretrian.gin', 'did you mean runs/pretrain.gin?'],
        ),
        (['TRAIN_STEPS=many'], ["expects a whole number, found 'many'"]),
        (['DTYPE=float64'], ["float32 or bfloat16, found 'float64'"]),
        # What the mesh of eight devices cannot divide.
        (
            ['BATCH_SIZE=12'],
            ['batch size 12', 'by the 8 shards', 'set BATCH_SIZE=8'],
        ),
        (['BATCH_SIZE=24', 'NUM_MICROBATCHES=2'], ['set BATCH_SIZE=16']),
        (['NUM_MICROBATCHES=3'], ['found 8 and 3', 'mend BATCH_SIZE or']),
        (
            ['MESH_SHAPE=(1,2,4)', '--gin.T5Config.num_heads=6'],
            ['model axis of 4', '6 heads', 'set MESH_SHAPE'],
        ),
        (
            ['MESH_SHAPE=(1,2,4)', '--gin.T5Config.mlp_dim=18'],
            ['mlp', '4 shards of an axis of 18', 'set MESH_SHAPE'],
        ),
        (
            ['--gin.T5Config.emb_dim=20'],
            ['8 shards of an axis of 20', 'set MESH_SHAPE'],
        ),
        (['MESH_SHAPE=(1,3,1)'], ['needs 3 devices', 'there are 8']),
        # Data and vocabulary.
        (
            ['--gin.T5Config.vocab_size=700'],
            ['vocabulary of 700 tokens', 'found one of 600', 'choose'],
        ),
        (['DATA_DIR=/nowhere'], ["found '/nowhere'", 'check the path']),
        (['TARGET_LENGTH=1000000'], ['row of 999998 tokens', 'shorten']),
        (['WARMUP_STEPS=3'], ['found 3 and 3', 'lower WARMUP_STEPS']),
    ],
    ids=lambda value: ' '.join(value) if '=' in value[0] else '',
)
def test_a_mistake_is_found_before_a_folder_is_made(
    corpus, refusal, tmp_path, typed, expected
):
  line = refusal(*TRAIN, corpus, f'RUN_DIR={tmp_path}/run', *typed)
  assert all(words in line for words in expected), line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'typed',
    [
        'BATCH_SIZE=0',
        'BATCH_SIZE=-8',
        'NUM_MICROBATCHES=0',
        'TRAIN_STEPS=0',
        'LOG_EVERY=0',
        'EVALUATE_EVERY=0',
        'CHECKPOINT_EVERY=0',
        'CHECKPOINTS_TO_KEEP=0',
        'CHECKPOINT_KEEP_EVERY=0',
        'HANG_SECONDS=0.0',
        'TARGET_LENGTH=2',  # <s> and </s> alone.
        'TARGET_LENGTH=0',
        '--gin.T5Config.num_heads=0',
        '--gin.train.evaluation_batch_count=0',
        '--gin.CausalLM.loss_tile_length=0',
    ],
)
def test_no_size_is_nothing_or_less(corpus, refusal, tmp_path, typed):
  line = refusal(*TRAIN, corpus, f'RUN_DIR={tmp_path}/run', typed)
  assert 'expected' in line and 'found' in line
  assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(corpus, refusal, tmp_path):
  (tmp_path / 'file').write_text('in the way')
  line = refusal(*TRAIN, corpus, f'RUN_DIR={tmp_path}/file/run')
  assert f'cannot write run folder {tmp_path}/file/run: ' in line
  assert 'choose another folder' in line
  assert (tmp_path / 'file').read_text() == 'in the way'


def test_a_topology_nobody_knows_is_named(refusal):
  precompile = (
      'precompile', '--gin_file=models/tiny.gin', '--gin_file=runs/finetune.gin'
  )
  for topology in ('v99:4x4', 'nonsense'):
    line = refusal(*precompile, f'TOPOLOGY={topology}')
    assert repr(topology) in line and 'set TOPOLOGY' in line


# In a folder that holds a run.


def test_a_folder_of_another_model_is_left_alone(corpus, refusal, run_dir):
  before = content(run_dir)
  deeper = '--gin.T5Config.num_decoder_layers=2'
  line = refusal(*TRAIN, corpus, f'RUN_DIR={run_dir}', deeper)
  assert 'model.num_decoder_layers: expected 2, found 1' in line
  assert 'another folder' in line
  assert content(run_dir) == before


def test_a_checkpoint_of_another_model_is_refused(corpus, refusal, run_dir):
  forget_steps_after(run_dir, 2)
  config = run_dir / 'config.json'
  text = config.read_text()
  assert text.count('"mlp_dim": 16') == 1
  config.write_text(text.replace('"mlp_dim": 16', '"mlp_dim": 24'))
  before = content(run_dir / 'checkpoints')
  line = refusal(
      *TRAIN, corpus, f'RUN_DIR={run_dir}', '--gin.T5Config.mlp_dim=24'
  )
  assert f'{run_dir}/checkpoints/2' in line
  assert 'expected [16, 24], found [16, 16]' in line
  assert content(run_dir / 'checkpoints') == before


def test_another_vocabulary_of_the_same_size_is_refused(
    refusal, run_dir, small_corpus, source_files, make_small_corpus, tmp_path
):
  other = tmp_path / 'other'
  make_small_corpus(source_files[:30], other)
  before = content(run_dir)
  line = refusal(*TRAIN, f'DATA_DIR={other}', f'RUN_DIR={run_dir}')
  assert 'vocabulary_fingerprint: expected "' in line
  # The corpus is tokenised with it too, but the run knows its own.
  mine = shutil.copytree(small_corpus, tmp_path / 'mine')
  line = refusal(
      *TRAIN, f'DATA_DIR={mine}', f'RUN_DIR={run_dir}',
      f'VOCABULARY_DIR={other}/vocabulary',
  )
  assert 'vocabulary_fingerprint: expected "' in line
  assert content(run_dir) == before


@pytest.mark.parametrize('command', [EVALUATE, GENERATE], ids=lambda x: x[0])
def test_a_run_whose_vocabulary_was_exchanged_is_refused(
    refusal, run_dir, source_files, make_small_corpus, tmp_path, command
):
  make_small_corpus(source_files[:30], tmp_path / 'other')
  shutil.rmtree(run_dir / 'vocabulary')
  shutil.copytree(tmp_path / 'other' / 'vocabulary', run_dir / 'vocabulary')
  line = refusal(*command, f'RUN_DIR={run_dir}')
  assert 'expected' in line and 'vocabulary' in line and 'found' in line


def flip_a_byte_of_weights(folder: pathlib.Path) -> str:
  return f'trainable/{flip_a_byte(folder / "trainable")}'


def lose_checksums(folder: pathlib.Path) -> str:
  (folder / 'checksums.json').unlink()
  return 'checksums.json'


def lose_a_mark(folder: pathlib.Path) -> str:
  (folder / 'trainable' / 'commit_success.txt').unlink()
  return 'trainable/commit_success.txt'


DAMAGES = [flip_a_byte_of_weights, lose_checksums, lose_a_mark]


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    corpus, run_dir, trained, caplog, damage
):
  forget_steps_after(run_dir, 2)
  checkpoints = run_dir / 'checkpoints'
  name = damage(checkpoints / '2')
  before = content(checkpoints / '2')
  assert main.main([*TRAIN, corpus, f'RUN_DIR={run_dir}']) == 0
  [line] = warnings_of(caplog)
  assert f'{checkpoints}/2 is damaged: {name} ' in line
  assert f'put into {checkpoints}/damaged/2, and step 1 is used' in line
  assert content(checkpoints / 'damaged' / '2') == before
  names = {path.name for path in checkpoints.iterdir()}
  assert names == {'1', '2', '3', 'damaged'}
  # Sums over all bits: the run is the one that was never damaged.
  metadata = '3/metadata/metadata'
  assert (checkpoints / metadata).read_text() == (
      trained / 'checkpoints' / metadata
  ).read_text()


def warnings_of(caplog) -> list[str]:
  return [
      record.message for record in caplog.records
      if record.name.startswith('codet5p_jax') and record.levelname == 'WARNING'
  ]


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_anew(
    corpus, refusal, run_dir
):
  forget_steps_after(run_dir, 2)
  for step in ('1', '2'):
    lose_checksums(run_dir / 'checkpoints' / step)
  before = content(run_dir / 'checkpoints')
  for _ in range(2):
    line = refusal(*TRAIN, corpus, f'RUN_DIR={run_dir}')
    assert f'a whole checkpoint in {run_dir}/checkpoints, found damage' in line
    assert 'step 2: checksums.json is missing' in line
    assert content(run_dir / 'checkpoints') == before
  # And if somebody moves them where damaged ones lie, it does not either.
  (run_dir / 'checkpoints' / 'damaged').mkdir()
  for step in ('1', '2'):
    shutil.move(
        run_dir / 'checkpoints' / step, run_dir / 'checkpoints' / 'damaged'
    )
  line = refusal(*TRAIN, corpus, f'RUN_DIR={run_dir}')
  assert 'found damaged ones alone' in line and 'to start anew' in line


@pytest.mark.parametrize('command', [EVALUATE, GENERATE], ids=lambda x: x[0])
@pytest.mark.parametrize('damage', DAMAGES)
def test_who_only_reads_moves_no_damaged_checkpoint(
    refusal, run_dir, command, damage
):
  forget_steps_after(run_dir, 2)
  name = damage(run_dir / 'checkpoints' / '2')
  before = content(run_dir)
  line = refusal(*command, f'RUN_DIR={run_dir}')
  assert f'{run_dir}/checkpoints/2 is damaged: {name} ' in line
  assert 'step 1 before it is whole' in line
  assert content(run_dir) == before


def test_a_half_written_checkpoint_is_passed_over(corpus, run_dir):
  forget_steps_after(run_dir, 2)
  # As Orbax leaves a save that was killed before its commit.
  checkpoints = run_dir / 'checkpoints'
  (checkpoints / '2').rename(checkpoints / '2.orbax-checkpoint-tmp-7')
  assert main.main([*TRAIN, corpus, f'RUN_DIR={run_dir}']) == 0
  assert content(run_dir / 'model')['metadata.json']
  assert {path.name for path in checkpoints.iterdir()} == {'1', '2', '3'}


def test_damaged_weights_of_a_finished_run_are_written_again(
    corpus, run_dir, trained, caplog
):
  name = flip_a_byte(run_dir / 'model' / 'arrays')
  before = content(run_dir / 'checkpoints')
  metrics = (run_dir / 'metrics.jsonl').read_bytes()
  assert main.main([*TRAIN, corpus, f'RUN_DIR={run_dir}']) == 0
  [line] = warnings_of(caplog)
  assert f'weights in {run_dir}/model are damaged: arrays/{name} ' in line
  assert line.endswith('; they are written again.')
  expected, found = (
      trained_model.load_trained_model(str(folder))
      for folder in (trained, run_dir)
  )
  jax.tree.map(
      np.testing.assert_array_equal, found.all_params, expected.all_params
  )
  assert content(run_dir / 'checkpoints') == before
  assert (run_dir / 'metrics.jsonl').read_bytes() == metrics


def test_checkpoints_of_certain_steps_are_kept_for_good(corpus, run_dir):
  forget_steps_after(run_dir, 1)
  assert main.main([
      *TRAIN, corpus, f'RUN_DIR={run_dir}', 'CHECKPOINTS_TO_KEEP=1',
      'CHECKPOINT_KEEP_EVERY=2',
  ]) == 0  # fmt: skip
  assert {path.name for path in (run_dir / 'checkpoints').iterdir()} == {
      '2', '3'
  }


# Of trained models.


@pytest.mark.parametrize('command', [EVALUATE, GENERATE], ids=lambda x: x[0])
def test_what_is_no_run_is_not_used(refusal, run_dir, tmp_path, command):
  line = refusal(*command, f'RUN_DIR={tmp_path}/nowhere')
  assert f'{tmp_path}/nowhere/config.json, found none; check the folder' in line
  (run_dir / 'config.json').write_text('{"format_version": 1')
  line = refusal(*command, f'RUN_DIR={run_dir}')
  assert 'expected JSON in' in line and 'restore the file' in line


@pytest.mark.parametrize('command', [EVALUATE, GENERATE], ids=lambda x: x[0])
def test_damaged_weights_are_not_used(refusal, run_dir, command):
  name = flip_a_byte(run_dir / 'model' / 'arrays')
  before = content(run_dir)
  line = refusal(*command, f'RUN_DIR={run_dir}')
  assert f'checkpoint {run_dir}/model is damaged: arrays/{name} ' in line
  assert content(run_dir) == before


def test_a_run_without_weights_is_refused(refusal, run_dir):
  forget_steps_after(run_dir, 0)
  line = refusal(*EVALUATE, f'RUN_DIR={run_dir}')
  assert f'expected a checkpoint in {run_dir}/checkpoints, found none' in line


def test_a_split_nobody_has_is_named(refusal, run_dir):
  line = refusal(*EVALUATE, f'RUN_DIR={run_dir}', 'SPLIT=tset')
  assert "'tset'" in line and 'SPLIT' in line


# Disks and numbers.


def full_disk(*unused_arguments, **unused_options):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_full_at_a_checkpoint_leaves_the_one_before(
    corpus, refusal, tmp_path, monkeypatch
):
  run_dir = tmp_path / 'run'
  write_checksums = save.write_checksums

  def write(folder, **options):
    if folder.name.startswith('2'):
      full_disk()
    write_checksums(folder, **options)

  monkeypatch.setattr(save, 'write_checksums', write)
  line = refusal(*TRAIN, corpus, f'RUN_DIR={run_dir}')
  assert f'cannot write checkpoint {run_dir}/checkpoints/2: No space' in line
  assert 'go on from step 1' in line
  assert not (run_dir / 'model').exists()
  # Once there is space it goes on.
  monkeypatch.undo()
  assert main.main([*TRAIN, corpus, f'RUN_DIR={run_dir}']) == 0


@pytest.mark.parametrize('name', ['config.json', 'operative_config.gin'])
def test_a_disk_full_at_the_start_is_one_line(
    corpus, refusal, tmp_path, monkeypatch, name
):
  replace = os.replace

  def refuse(source, target):
    if pathlib.Path(target).name == name:
      full_disk()
    replace(source, target)

  monkeypatch.setattr(files.os, 'replace', refuse)
  line = refusal(*TRAIN, corpus, f'RUN_DIR={tmp_path}/run')
  assert 'No space left' in line and str(tmp_path / 'run') in line
  assert not [path for path in content(tmp_path) if name in path]


def test_a_disk_full_at_the_metrics_is_one_line(
    corpus, refusal, run_dir, monkeypatch
):
  forget_steps_after(run_dir, 1)
  before = content(run_dir / 'checkpoints' / '1')

  def refuse(path, mode='r', **options):
    if 'a' in mode and str(path).endswith('metrics.jsonl'):
      full_disk()
    return open(path, mode, **options)

  monkeypatch.setattr(run_folder, 'open', refuse, raising=False)
  line = refusal(*TRAIN, corpus, f'RUN_DIR={run_dir}')
  assert f'cannot write {run_dir}/metrics.jsonl: No space left' in line
  assert content(run_dir / 'checkpoints' / '1') == before
  assert not (run_dir / 'model').exists()


def test_a_disk_full_at_the_weights_is_one_line(
    corpus, refusal, run_dir, monkeypatch
):
  shutil.rmtree(run_dir / 'model')
  monkeypatch.setattr(weights, 'write_checksums', full_disk)
  line = refusal(*TRAIN, corpus, f'RUN_DIR={run_dir}')
  assert f'cannot write weights {run_dir}/model: No space left' in line
  assert not list(run_dir.glob('model*'))


@pytest.mark.parametrize('command', [EVALUATE, GENERATE], ids=lambda x: x[0])
def test_a_disk_full_at_a_result_is_one_line(
    capsys, run_dir, monkeypatch, command
):
  monkeypatch.setattr(files.os, 'replace', full_disk)
  assert main.main([*command, f'RUN_DIR={run_dir}']) == 2
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith(f'codet5p: cannot write {run_dir}/')
  assert 'No space left' in line


@pytest.fixture
def poison(monkeypatch):
  """Puts a number among the loss weights of the second update, always."""
  at = TrainBatches.at

  def set_value(value):
    def poisoned(self, step):
      batches = at(self, step)
      weights = batches['causal_lm']['decoder_loss_weights']
      if step == 1:
        weights = jax.device_put(
            jnp.full_like(weights, value), weights.sharding
        )
      batches['causal_lm']['decoder_loss_weights'] = weights
      return batches

    monkeypatch.setattr(TrainBatches, 'at', poisoned)

  return set_value


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_bad_steps_in_a_row_stop_with_step_and_objective(
    corpus, refusal, tmp_path, poison, value
):
  run_dir = tmp_path / 'run'
  poison(value)
  line = refusal(*TRAIN, corpus, f'RUN_DIR={run_dir}', 'MAX_BAD_STEPS=1')
  assert 'found 1 up to step 2, where loss of causal_lm is nan; ' in line
  assert f'`codet5p replay --run_dir={run_dir} --step=2`' in line
  assert 'lower LEARNING_RATE' in line
  # Its batch was saved, its state was not.
  with np.load(run_dir / 'bad_steps' / '2.npz') as batch:
    weights = batch['causal_lm/decoder_loss_weights']
  np.testing.assert_array_equal(weights, np.full((1, 8, 8), value))
  assert [x.name for x in (run_dir / 'checkpoints').iterdir()] == ['1']
  assert not (run_dir / 'model').exists()
  metrics = run_folder.read_metrics(run_dir / 'metrics.jsonl')
  assert [row['step'] for row in metrics] == [1, 2]
  assert metrics[1]['causal_lm/loss'] == 'nan'


def test_a_single_bad_step_is_left_out_and_told(
    corpus, tmp_path, poison, capsys
):
  run_dir = tmp_path / 'run'
  poison(float('nan'))
  assert main.main([*TRAIN, corpus, f'RUN_DIR={run_dir}']) == 0
  told = capsys.readouterr().err
  assert told.count('is left out') == 1
  assert 'Step 2 is left out: loss of causal_lm is nan.' in told
  metrics = run_folder.read_metrics(run_dir / 'metrics.jsonl')
  assert [
      (row['step'], row['bad_steps'])
      for row in metrics
      if row['kind'] == 'train'
  ] == [(1, 0), (2, 1), (3, 0)]
  assert np.isfinite(metrics[-1]['causal_lm/loss'])
  assert not (run_dir / 'bad_steps').exists()
