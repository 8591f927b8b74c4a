"""A composite made of two CodeGen checkpoints, from the command line on."""

import gzip
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from codet5p_jax import main
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.trained_model import load_trained_model
from codet5p_jax.training.checkpoints.layout import flatten, unstack_layers
from codet5p_jax.training.checkpoints.weights import save_weights
from codet5p_jax.training.files import write_json
from codet5p_jax.training.run_folder import RunFolder, describe, read_metrics

DATA = os.environ.get('CODET5P_TEST_DATA')
STEPS = 40
SIZES = {
    'emb_dim': (8, 24),
    'num_layers': (2, 3),
    'num_heads': (4, 4),
    'head_dim': (2, 6),
    'rotary_dim': (2, 4),
    'mlp_dim': (20, 28),
}
SPECIAL = {'pad_id': 0, 'eos_id': 2, 'decoder_start_id': 0}


def codet5p(*arguments) -> int:
  return main.main([str(argument) for argument in arguments])


@pytest.fixture(scope='module')
def pairs(tmp_path_factory, source_files):
  """Instructions and answers where the real ones are at hand."""
  folder = tmp_path_factory.mktemp('pairs')
  if DATA:
    path = pathlib.Path(DATA) / 'codealpaca' / 'code_alpaca_2k.json.gz'
    rows = [
        {
            'source': f'{row["instruction"]}\n{row["input"]}',
            'target': row['output'],
        }
        for row in json.loads(gzip.decompress(path.read_bytes()))
        if row['output']
    ]
  else:
    rows = [
        {'source': function[:30], 'target': function[30:]}
        for file in source_files
        for function in file.text.split('\n\n\n')
        if len(function) > 40
    ]
  rows = rows[:160]
  for split, part in (('train', rows[:-24]), ('validation', rows[-24:])):
    text = ''.join(json.dumps(row) + '\n' for row in part)
    (folder / f'{split}.jsonl').write_text(text)
  return folder


@pytest.fixture(scope='module')
def vocab_size(small_corpus):
  return json.loads((small_corpus / 'vocabulary/vocabulary.json').read_text())[
      'vocab_size'
  ]


@pytest.fixture(scope='module')
def checkpoints(
    small_corpus, vocab_size, random_parameters, tmp_path_factory
):
  """Two CodeGen models: one in our layout, one in Hugging Face's."""
  folder = tmp_path_factory.mktemp('codegen')
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  for index, name in enumerate(('350m', '2b')):
    config = CodeGenConfig(
        vocab_size=vocab_size,
        **{field: sizes[index] for field, sizes in SIZES.items()},
        **SPECIAL,
    )
    target = RunFolder(folder / name)
    model = config.make_model(Computation(scan_layers=False))
    params = jax.tree_util.tree_map_with_path(
        # Kernels of usual size, but a head that tells tokens well apart.
        lambda path, x: x
        if 'output_head' in str(path) or path[-1].key == 'scale'
        else x / 5,
        random_parameters(model, seed=index),
    )
    save_weights(target.model, params, {'step': 0}, vocab_size)
    vocabulary.save(target.vocabulary)
    description = {
        'model': config,
        'vocabulary_fingerprint': vocabulary.fingerprint,
    }
    write_json(target.config, describe(description))
  exported = folder / '2b_huggingface'
  assert codet5p('convert', folder / '2b', exported, '--dtype=float16') == 0
  return folder / '350m', exported


@pytest.fixture(scope='module')
def arguments(pairs, small_corpus, checkpoints, vocab_size):
  encoder, decoder = checkpoints
  stacks = [
      f'--gin.{stack}/codegen.CodeGenConfig.{field}={sizes[index]}'
      for index, stack in enumerate(('encoder', 'decoder'))
      for field, sizes in SIZES.items()
  ]
  composite = 'shallow_encoder_deep_decoder.ShallowEncoderDeepDecoderConfig'
  return [
      '--gin_file=models/deep_tiny.gin',
      '--gin_file=runs/finetune.gin',
      '--gin_file=initial_weights/codegen.gin',
      f'ENCODER_FROM={encoder}',
      f'DECODER_FROM={decoder}',
      "MODEL_DECODER_MAP=(('decoder/layers_2/(.*)', "
      "'decoder/last_layer/\\\\1'),)",
      f'DATA_DIR={pairs}',
      f'VOCABULARY_DIR={small_corpus}/vocabulary',
      f'TRAIN_STEPS={STEPS}',
      'BATCH_SIZE=8',
      'SOURCE_LENGTH=40',
      'TARGET_LENGTH=80',
      'LEARNING_RATE=3e-2',
      'WARMUP_STEPS=2',
      'EVALUATE_EVERY=4',
      f'CHECKPOINT_EVERY={STEPS // 2}',
      'DTYPE=float32',
      'FROZEN_DTYPE=int8',
      *stacks,
      f'--gin.codegen.CodeGenConfig.vocab_size={vocab_size}',
      *(f'--gin.{composite}.{k}={v}' for k, v in SPECIAL.items()),
  ]


@pytest.fixture(scope='module')
def finetuned(arguments, tmp_path_factory):
  run_dir = tmp_path_factory.mktemp('runs') / 'composite'
  assert codet5p('train', *arguments, f'RUN_DIR={run_dir}') == 0
  return run_dir


def test_fine_tuning_lowers_the_loss(finetuned):
  losses = [
      row['sequence_to_sequence/loss']
      for row in read_metrics(finetuned / 'metrics.jsonl')
      if row['kind'] == 'evaluation'
  ]
  assert losses[-1] < losses[0] - 0.1


def test_the_run_tells_what_it_is_made_of(finetuned, checkpoints):
  encoder, decoder = map(str, checkpoints)
  parts = json.loads((finetuned / 'parts.json').read_text())['parts']
  assert {
      (row['part'], row['trainable'], row['dtype'], row['source'])
      for row in parts
  } == {
      ('encoder', True, 'float32', encoder),
      ('encoder_to_decoder', True, 'float32', 'drawn'),
      ('decoder/last_layer/cross_attention', True, 'float32', 'drawn'),
      ('decoder', False, 'int8', decoder),
  }


def test_what_is_frozen_is_in_no_file_of_the_run(finetuned):
  for path in (
      finetuned / 'model' / 'metadata.json',
      finetuned / 'checkpoints' / str(STEPS) / 'metadata' / 'metadata',
  ):
    arrays = json.loads(path.read_text())['arrays']
    decoder = [name for name in arrays if '/decoder/' in f'/{name}']
    assert decoder and all('cross_attention' in name for name in decoder)


def test_the_trained_model_is_read_with_its_frozen_part(
    finetuned, checkpoints, tmp_path, capsys
):
  trained = load_trained_model(str(finetuned))
  frozen = flatten(unstack_layers(trained.frozen_params))
  kernel = np.asarray(frozen['decoder/last_layer/mlp/wi/kernel'])
  scale = np.asarray(frozen['decoder/last_layer/mlp/wi/kernel_scale'])
  source = load_trained_model(str(checkpoints[0].parent / '2b'))
  expected = flatten(unstack_layers(source.all_params))
  np.testing.assert_allclose(
      kernel * scale,
      np.asarray(expected['decoder/layers_2/mlp/wi/kernel']),
      atol=scale.max() * 0.51,
  )
  # And so it is exported, whole.
  exported = tmp_path / 'exported'
  assert codet5p('convert', finetuned, exported) == 0
  converted = tmp_path / 'converted'
  assert codet5p('convert', exported, converted) == 0


def test_sources_may_move_and_not_change(
    arguments, finetuned, checkpoints, tmp_path, capsys
):
  run_dir = tmp_path / 'run'
  shutil.copytree(finetuned, run_dir)
  _, decoder = checkpoints
  moved = tmp_path / 'moved'
  shutil.copytree(decoder, moved)
  elsewhere = [*arguments, f'RUN_DIR={run_dir}', f'DECODER_FROM={moved}']
  assert codet5p('train', *elsewhere) == 0  # It goes on, and is complete.

  other = tmp_path / 'other'
  assert codet5p(
      'convert', checkpoints[0].parent / '2b', other, '--dtype=float32'
  ) == 0
  capsys.readouterr()
  changed = [*arguments, f'RUN_DIR={run_dir}', f'DECODER_FROM={other}']
  assert codet5p('train', *changed) == 2
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert 'frozen parameters with fingerprint' in line

  # Nothing but what is frozen is looked for: the encoder's source is not.
  init_from = [
      (str(moved), 'decoder/(?!last_layer/cross_attention/).*',
       [('decoder/layers_2/(.*)', r'decoder/last_layer/\1')]),
      ('/nowhere', 'encoder', None),
      ('fresh', 'encoder_to_decoder|decoder/last_layer/cross_attention', None),
  ]  # fmt: skip
  here = load_trained_model(str(finetuned))
  there = load_trained_model(str(run_dir), init_from=init_from)
  jax.tree.map(
      np.testing.assert_array_equal, there.frozen_params, here.frozen_params
  )
  init_from[0] = (str(other), *init_from[0][1:])
  match = 'other the weights .* found others at decoder/'
  with pytest.raises(UserError, match=match):
    load_trained_model(str(run_dir), init_from=init_from)
  exported = tmp_path / 'exported'
  init_from[0] = (str(moved), *init_from[0][1:])
  # The part that is looked for is enough.
  only = f'--init_from={init_from[:1]}'
  assert codet5p('convert', run_dir, exported, only) == 0

  gone = moved.rename(tmp_path / 'moved_again')
  with pytest.raises(UserError, match='moved; check .* INIT_FROM to where'):
    load_trained_model(str(run_dir), init_from=init_from)
  gone.rename(moved)

  # Before its end a run is read from its newest checkpoint.
  shutil.rmtree(run_dir / 'model')
  unfinished = load_trained_model(str(run_dir))
  jax.tree.map(
      np.testing.assert_array_equal, unfinished.all_params, here.all_params
  )


def test_a_first_start_with_other_sources_leaves_no_trace(
    arguments, finetuned, checkpoints, tmp_path, monkeypatch
):
  """What counts is what the weights were trained with, not the first try."""
  run_dir = tmp_path / 'run'
  monkeypatch.chdir(checkpoints[0].parent)
  relative = [
      *arguments, f'RUN_DIR={run_dir}', 'ENCODER_FROM=350m',
      'DECODER_FROM=2b', 'TRAIN_STEPS=3',
  ]  # fmt: skip
  assert codet5p('train', *relative) == 0
  shutil.rmtree(run_dir / 'checkpoints')
  shutil.rmtree(run_dir / 'model')
  again = [*relative, f'DECODER_FROM={checkpoints[1]}']
  assert codet5p('train', *again) == 0
  monkeypatch.chdir(tmp_path)
  trained = load_trained_model(str(run_dir))
  jax.tree.map(
      np.testing.assert_array_equal,
      trained.frozen_params,
      load_trained_model(str(finetuned)).frozen_params,
  )


def test_a_decoder_that_knows_nothing_is_not_frozen_unasked(
    arguments, tmp_path, capsys
):
  run_dir = tmp_path / 'run'
  without = [a for a in arguments if 'initial_weights' not in a]
  without = [a for a in without if '_FROM=' not in a and '_MAP=' not in a]
  assert codet5p('train', *without, f'RUN_DIR={run_dir}') == 2
  line = capsys.readouterr().err.strip()
  assert 'expected INIT_FROM to say where the' in line
  assert '\n' not in line and not run_dir.exists()


def test_prompts_go_where_the_model_was_trained_to_find_them(
    finetuned, checkpoints, capsys
):
  arguments = ['--gin_file=runs/generate.gin', 'MAX_NEW_TOKENS=3']
  prompt = 'Sort a list.'
  for run_dir in (finetuned, checkpoints[0]):  # A composite, and CodeGen.
    arguments.append(f'RUN_DIR={run_dir}')
    assert codet5p('generate', prompt, *arguments) == 0
    assert capsys.readouterr().out.startswith(prompt)
    for mode in ('encoder_decoder', 'infill', 'seq2seq_causal_lm'):
      text = 'a <extra_id_0>'
      assert codet5p('generate', text, *arguments, f'MODE={mode}') == 2
      assert 'as it was trained, found' in capsys.readouterr().err


def test_a_converted_model_has_nothing_to_evaluate(checkpoints, capsys):
  arguments = ['--gin_file=runs/evaluate.gin', f'RUN_DIR={checkpoints[0]}']
  assert codet5p('evaluate', *arguments) == 2
  assert 'found a converted model' in capsys.readouterr().err
