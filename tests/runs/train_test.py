import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import Preempted, UserError
from codet5p_jax.generation import Generator
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.bimodal import BimodalConfig, EmbeddingConfig
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.seq2seq_causal_lm import Seq2SeqCausalLM
from codet5p_jax.objectives.span_denoising import SpanDenoising
from codet5p_jax.runs.evaluate import evaluate
from codet5p_jax.runs.generate import generate
from codet5p_jax.runs import train as train_run
from codet5p_jax.runs.train import train
from codet5p_jax.training.logging import RunLog
from codet5p_jax.training.optimizers import AdamW
from codet5p_jax.training.run_lock import RunLock
from codet5p_jax.training.step_health import BadSteps
from codet5p_jax.training.timeline import BUCKETS, goodput, read_timeline
from codet5p_jax.training.train_step import StepConfig
from codet5p_jax.trained_model import load_trained_model

STEPS = 7
# What a resumed run must repeat exactly; the rest of a row is about time.
REPEATED = ('step', 'kind', 'grad_norm', 'learning_rate')


@pytest.fixture(scope='module')
def config(make_model):
  return StepConfig(
      model=make_model(num_decoder_layers=3),
      # Stage 1: one objective a step, two of them from step 2 on.
      objectives=(
          SpanDenoising(source_length=32, target_length=13, batch_scale=2),
          Seq2SeqCausalLM(
              row_length=10, source_length=11, target_length=12, first_step=2
          ),
          CausalLM(target_length=16, loss_tile_length=8, first_step=2),
      ),
      optimizer=AdamW(1e-2, 2, STEPS, 0.1),
      batch_size=8,
      # The decoder's own layers are frozen, as in the composite model.
      trainable=(
          'token_embedder/.*',
          'encoder/.*',
          '.*/cross_attention/.*',
          '.*/mlp/.*',
      ),
      computation=Computation(dtype='float32', dropout_rate=0.1),
  )


def run(config, run_dir, corpus, **changes):
  settings = {
      'train_steps': STEPS,
      'init_from': [('fresh', '.*', None)],
      'log_every': 1,
      'evaluate_every': 3,
      'evaluation_batch_count': 1,
      'checkpoint_every': 2,
      **changes,
  }
  train(config, str(run_dir), str(corpus), **settings)


def rows(run_dir):
  lines = (run_dir / 'metrics.jsonl').read_text().splitlines()
  return [
      {k: v for k, v in json.loads(line).items() if k in REPEATED or '/' in k}
      for line in lines
  ]


@pytest.fixture(scope='module')
def undisturbed(config, small_corpus, tmp_path_factory):
  run_dir = tmp_path_factory.mktemp('runs') / 'undisturbed'
  run(config, run_dir, small_corpus)
  return run_dir


def test_a_run_stopped_twice_and_resumed_is_bit_identical(
    config, small_corpus, undisturbed, tmp_path, monkeypatch
):
  run_dir = tmp_path / 'stopped'
  log_train = RunLog.train
  for stop in np.sort(np.random.default_rng().choice(range(1, STEPS + 1), 2)):

    def stop_there(self, step, *arguments, stop=stop, **more):
      if step >= stop:
        raise KeyboardInterrupt
      log_train(self, step, *arguments, **more)

    monkeypatch.setattr(RunLog, 'train', stop_there)
    with pytest.raises(KeyboardInterrupt):
      run(config, run_dir, small_corpus)
  monkeypatch.setattr(RunLog, 'train', log_train)
  run(config, run_dir, small_corpus)

  sessions = read_timeline(run_dir / 'timeline.jsonl')
  stopped = 'KeyboardInterrupt'
  assert [s.status for s in sessions] == [stopped, stopped, 'done']
  assert rows(run_dir) == rows(undisturbed)
  expected = load_trained_model(str(undisturbed))
  resumed = load_trained_model(str(run_dir))
  jax.tree.map(
      np.testing.assert_array_equal, resumed.all_params, expected.all_params
  )
  last = f'checkpoints/{STEPS}'
  assert checkpoint_arrays(run_dir / last) == checkpoint_arrays(
      undisturbed / last
  )


@pytest.mark.parametrize('amid', ['steps', 'an evaluation'])
def test_a_run_told_to_end_saves_what_it_has_and_goes_on(
    config, small_corpus, undisturbed, tmp_path, monkeypatch, amid
):
  run_dir = tmp_path / 'told'
  if amid == 'steps':
    target, name, stop = RunLog, 'advance', np.random.default_rng().choice(5)
  else:
    target, name, stop = train_run, 'evaluate_objectives', 0
  calls = itertools.count()
  original = getattr(target, name)

  def be_told(*arguments, **more):
    if next(calls) == stop:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments, **more)

  monkeypatch.setattr(target, name, be_told)
  with pytest.raises(Preempted, match='is saved') as raised:
    run(config, run_dir, small_corpus, checkpoint_every=STEPS)
  monkeypatch.undo()
  step = int(re.search(r'step (\d+) of 7', str(raised.value))[1])
  assert os.listdir(run_dir / 'checkpoints') == [str(step)]
  assert [row['step'] for row in rows(run_dir) if row['kind'] == 'train'] == (
      list(range(1, step + 1))
  )
  assert not (run_dir / 'lock.json').exists()
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

  run(config, run_dir, small_corpus)
  assert rows(run_dir) == rows(undisturbed)
  last = f'checkpoints/{STEPS}'
  assert checkpoint_arrays(run_dir / last) == checkpoint_arrays(
      undisturbed / last
  )


def test_a_folder_in_use_is_left_alone(config, small_corpus, tmp_path):
  run_dir = tmp_path / 'used'
  run_dir.mkdir()
  with RunLock(run_dir / 'lock.json'):
    before = (run_dir / 'lock.json').read_text()
    with pytest.raises(UserError, match=f'no other run in {run_dir}, found p'):
      run(config, run_dir, small_corpus)
    assert os.listdir(run_dir) == ['lock.json']
    assert (run_dir / 'lock.json').read_text() == before


def test_other_data_in_the_same_place_is_told_from_it(
    config, small_corpus, undisturbed, source_files, make_small_corpus, tmp_path
):
  corpus, run_dir = tmp_path / 'corpus', tmp_path / 'run'
  make_small_corpus(source_files[:-3], corpus)
  shutil.rmtree(corpus / 'vocabulary')
  shutil.copytree(undisturbed, run_dir)
  written = json.loads((run_dir / 'config.json').read_text())
  written['data_dir'] = str(corpus)
  (run_dir / 'config.json').write_text(json.dumps(written))
  with pytest.raises(UserError, match='data'):
    run(
        config, run_dir, corpus, vocabulary_dir=str(small_corpus / 'vocabulary')
    )


def checkpoint_arrays(folder):
  return json.loads((folder / 'metadata' / 'metadata').read_text())['arrays']


def test_only_steps_that_needed_no_compiling_have_a_speed(undisturbed):
  lines = (undisturbed / 'metrics.jsonl').read_text().splitlines()
  train_rows = [r for r in map(json.loads, lines) if r['kind'] == 'train']
  seen = set()
  for row in train_rows:
    [objective] = [key for key in row if key.endswith('/loss')]
    if objective in seen:
      assert row['mfu'] == 'n/a' and row['steps_per_second'] > 0
    else:  # The step of another objective is another program.
      assert 'mfu' not in row and row['train_seconds'] == 0
    seen.add(objective)
  assert len(seen) == 3


def test_every_second_of_a_run_is_in_a_bucket(undisturbed):
  # Another test may have called the finished run again.
  [session] = read_timeline(undisturbed / 'timeline.jsonl')
  assert (session.first_step, session.status) == (0, 'done')
  assert session.rows[-1]['step'] == STEPS
  assert len(session.events('evaluation')) == 3
  spent = goodput([session])
  assert sum(spent.values()) == pytest.approx(session.seconds)
  assert all(spent[bucket] > 0 for bucket in BUCKETS)
  lines = (undisturbed / 'metrics.jsonl').read_text().splitlines()
  told = {
      key: sum(json.loads(line).get(key, 0) for line in lines)
      for key in ('train_seconds', 'input_wait_seconds')
  }
  # Of the timeline's row beside the last one of the metrics; these round.
  spent = [row for row in session.rows if row['kind'] == 'progress'][-1]
  spent = spent['buckets']
  assert told['input_wait_seconds'] == pytest.approx(spent['input'], abs=0.01)
  assert 0 < told['train_seconds'] <= spent['step'] + spent['input'] + 0.01


def test_a_finished_run_is_left_as_it_is(config, small_corpus, undisturbed):
  before = {
      path: path.stat().st_mtime_ns
      for path in (undisturbed / 'checkpoints').rglob('*')
  }
  run(config, undisturbed, small_corpus)
  after = {
      path: path.stat().st_mtime_ns
      for path in (undisturbed / 'checkpoints').rglob('*')
  }
  assert after == before


def test_the_run_folder_is_enough_to_evaluate_and_to_generate(
    undisturbed, capsys
):
  values = evaluate(str(undisturbed), batch_count=1)
  logged = [row for row in rows(undisturbed) if row['kind'] == 'evaluation']
  assert values['causal_lm/loss'] == pytest.approx(
      logged[-1]['causal_lm/loss'], rel=1e-6
  )
  written = undisturbed / 'evaluation' / 'validation' / 'metrics.json'
  assert json.loads(written.read_text())['step'] == STEPS
  capsys.readouterr()
  [made] = generate(['def f():'], str(undisturbed), max_new_tokens=5)
  assert capsys.readouterr().out.startswith('def f():' + made.text)


def test_generating_that_was_stopped_ends_with_the_same_samples(
    undisturbed, tmp_path, monkeypatch
):
  prompts = tmp_path / 'prompts.jsonl'
  texts = ('def f():', 'x', 'class A:', 'import os\n', 'y = 1')
  prompts.write_text(json.dumps([{'prompt': text} for text in 2 * texts]))
  complete = Generator.complete

  def run(name, batches):
    def stop(generator, batch, tell):
      nonlocal batches
      if not batches:
        raise KeyboardInterrupt
      batches -= 1
      return complete(generator, batch, tell)

    monkeypatch.setattr(Generator, 'complete', stop)
    path = tmp_path / name
    with contextlib.suppress(KeyboardInterrupt):
      generate(
          [], str(undisturbed), str(prompts), output=str(path), num_samples=2,
          temperature=1.0, max_new_tokens=6, batch_size=2, mesh_shape=(1, 4, 2)
      )  # fmt: skip
    return path.read_bytes()

  whole = run('whole.jsonl', 9)
  assert whole.count(b'\n') == 20
  # The mesh takes four prompts at a time, or more.
  assert run('parts.jsonl', 1).count(b'\n') == 8
  parts = run('parts.jsonl', 1)
  assert parts == b''.join(whole.splitlines(keepends=True)[:16])
  (tmp_path / 'parts.jsonl').write_bytes(parts[:-7])
  assert run('parts.jsonl', 9) == whole


def test_losses_that_are_no_numbers_stop_the_run(
    config, small_corpus, tmp_path
):
  config = dataclasses.replace(
      config,
      optimizer=AdamW(1e30, 1, STEPS, 0.0),
      trainable=('.*',),
      objectives=(CausalLM(target_length=16),),
      bad_steps=BadSteps(max_in_a_row=2),
  )
  with pytest.raises(UserError, match=r'found 2 up to step 3, where .* is '):
    run(config, tmp_path / 'run', small_corpus)
  assert not (tmp_path / 'run' / 'model').exists()


def test_a_run_of_a_version_without_bad_steps_goes_on(
    config, small_corpus, undisturbed, tmp_path
):
  run_dir = shutil.copytree(undisturbed, tmp_path / 'run')
  description = json.loads((run_dir / 'config.json').read_text())
  rule = description.pop('bad_steps')
  assert rule['fields'] == dataclasses.asdict(BadSteps())
  (run_dir / 'config.json').write_text(json.dumps(description))
  run(config, run_dir, small_corpus)  # It is complete.


def test_another_model_in_the_same_folder_is_refused(
    config, small_corpus, undisturbed
):
  other = dataclasses.replace(
      config, model=dataclasses.replace(config.model, mlp_dim=19)
  )
  with pytest.raises(UserError, match='mlp_dim'):
    run(other, undisturbed, small_corpus)


class ForReleasedVocabularies(T5Config):
  vocabulary_kinds = ('codet5', 'codet5_bimodal')


@pytest.mark.parametrize(
    ('kind', 'changes', 'message'),
    [
        (T5Config, {'vocab_size': 77}, 'vocabulary of 77 tokens'),
        (T5Config, {'pad_id': 5}, 'tokens 5 for padding and 2 .*found 0 and 2'),
        (T5Config, {'eos_id': 1}, 'tokens 0 for padding and 1 for the end'),
        (
            ForReleasedVocabularies,
            {},
            'kind codet5 or codet5_bimodal, .* found sentencepiece',
        ),
        (
            BimodalConfig,
            {'match_id': 5, 'code_decoder_id': 6},
            r'tokens \(5, 32101, 6\) to match, .* found \(5, 6, 7\) in the',
        ),
    ],
)
def test_a_vocabulary_that_does_not_suit_the_model_is_refused(
    config, small_corpus, tmp_path, kind, changes, message
):
  fields = {**dataclasses.asdict(config.model), **changes}
  other = dataclasses.replace(config, model=kind(**fields))
  with pytest.raises(UserError, match=message) as error:
    run(other, tmp_path / 'run', small_corpus)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_an_encoder_alone_needs_no_task_tokens(config, small_corpus):
  fields = dataclasses.asdict(config.model) | {'vocab_size': 600}
  del fields['num_decoder_layers']
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  for model in (EmbeddingConfig(**fields), config.model):
    train_run._check_vocabulary(
        vocabulary, dataclasses.replace(config, objectives=(), model=model)
    )


@pytest.mark.parametrize('mesh_shape', [(1, 4, 2), (1, 1, 1)])
def test_a_run_goes_on_on_another_mesh(
    config, small_corpus, undisturbed, tmp_path, mesh_shape, monkeypatch
):
  run_dir = tmp_path / 'run'
  shutil.copytree(undisturbed, run_dir)
  for step in (6, 7):
    shutil.rmtree(run_dir / 'checkpoints' / str(step))
  shutil.rmtree(run_dir / 'model')
  other = dataclasses.replace(config, mesh_shape=mesh_shape)
  if mesh_shape == (1, 1, 1):
    monkeypatch.setattr(jax, 'devices', lambda: jax.local_devices()[:1])
  run(other, run_dir, small_corpus)
  for ours, theirs in zip(rows(run_dir), rows(undisturbed), strict=True):
    losses = {k: v for k, v in theirs.items() if k.endswith('/loss')}
    assert losses
    assert {name: ours[name] for name in losses} == pytest.approx(
        losses, rel=1e-5
    )


def test_prompts_and_modes_are_checked(undisturbed):
  with pytest.raises(UserError, match='expected a prompt, found none'):
    generate([], str(undisturbed))
  with pytest.raises(UserError, match=re.escape("found 'both'; set MODE")):
    generate(['x'], str(undisturbed), mode='both')
  with pytest.raises(UserError, match='max_new_tokens to be at least 1'):
    generate(['x'], str(undisturbed), max_new_tokens=0)


def test_source_files_are_data_as_good_as_a_corpus(
    config, source_files, write_rows, tmp_path
):
  path = write_rows(tmp_path / 'rows.jsonl', source_files)
  data = f'jsonl://{path}?field=text'
  for _ in range(2):  # The second time the corpus is there.
    run(config, tmp_path / 'run', data, train_steps=1)
    assert (tmp_path / 'run.corpus' / 'metadata.json').is_file()
    assert rows(tmp_path / 'run')[-1]['step'] == 1
  assert load_trained_model(str(tmp_path / 'run')).vocabulary.vocab_size == 600
