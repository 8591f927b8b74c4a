import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import seqio

from codet5p_jax import seqio_tasks
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.seq2seq_causal_lm import Seq2SeqCausalLM
from codet5p_jax.objectives.span_denoising import SpanDenoising
from codet5p_jax.training.batches import evaluation_examples
from tests.objectives.causal_lm_test import UNFRAMED, write_corpus

OBJECTIVES = (
    SpanDenoising(source_length=40, target_length=30),
    Seq2SeqCausalLM(row_length=30, source_length=29, target_length=29),
    CausalLM(target_length=24),
)
NAMES = [objective.name for objective in OBJECTIVES]


@pytest.fixture
def stage_1(small_corpus):
  """The tasks in seqio's registry, which is as before afterwards."""
  seqio_tasks.register_stage_1(str(small_corpus), objectives=OBJECTIVES)
  yield str(small_corpus)
  seqio.MixtureRegistry.remove('stage_1')
  for name in NAMES:
    seqio.TaskRegistry.remove(name)


def rows_of(name, split, lengths=None, **changes):
  lengths = lengths or {'inputs': 99, 'targets': 99}
  dataset = seqio.get_mixture_or_task(name).get_dataset(
      lengths, split=split, shuffle=False, **changes
  )
  return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
@pytest.mark.parametrize('objective', OBJECTIVES, ids=NAMES)
def test_seqio_gives_exactly_the_examples_of_the_trainer(
    stage_1, objective, split
):
  vocabulary = load_vocabulary(f'{stage_1}/vocabulary')
  expected = evaluation_examples(objective, stage_1, split, vocabulary)
  found = rows_of(objective.name, split)
  assert len(found) == len(expected) > 1
  task = seqio.TaskRegistry.get(objective.name)
  assert task.num_input_examples(split) == len(found)
  for theirs, ours in zip(found, expected, strict=True):
    assert theirs.keys() == {'inputs', 'targets'}
    for name, feature in (
        ('inputs', 'encoder_input_tokens'),
        ('targets', 'decoder_target_tokens'),
    ):
      assert theirs[name].dtype == np.int32
      length = len(theirs[name])
      assert theirs[name].tolist() == ours[feature][:length].tolist()
      assert not ours[feature][length:].any()


def test_the_mixture_holds_all_objectives_at_equal_rates(stage_1):
  mixture = seqio.MixtureRegistry.get('stage_1')
  assert sorted(task.name for task in mixture.tasks) == sorted(NAMES)
  assert {mixture.get_rate(task) for task in mixture.tasks} == {1.0}
  dataset = mixture.get_dataset(
      {'inputs': 99, 'targets': 99}, split='train', shuffle=False, seed=0,
      num_epochs=None,
  ).take(900)  # fmt: skip
  vocabulary = load_vocabulary(f'{stage_1}/vocabulary')
  clm = vocabulary.task_tokens.clm
  kinds = {name: 0 for name in NAMES}
  for row in dataset.as_numpy_iterator():
    inputs = row['inputs'].tolist()
    if inputs == [clm]:
      kinds['causal_lm'] += 1
    else:
      is_seq2seq = inputs[0] == clm
      kinds['seq2seq_causal_lm' if is_seq2seq else 'span_denoising'] += 1
  assert all(240 < count < 360 for count in kinds.values())


SIDES = {'text': 7, 'code': 41}  # Short, so that some are cut.
PAIRS = Bimodal(
    text_length=SIDES['text'], code_length=SIDES['code'], queue_size=3
)


@pytest.fixture
def stage_2(paired_corpus):
  """As `stage_1`."""
  seqio_tasks.register_stage_2(str(paired_corpus), objective=PAIRS)
  yield str(paired_corpus)
  seqio.MixtureRegistry.remove('stage_2')
  for name in ('bimodal', 'text_to_code', 'code_to_text'):
    seqio.TaskRegistry.remove(name)


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_seqio_gives_exactly_the_pairs_of_the_trainer(stage_2, split):
  vocabulary = load_vocabulary(f'{stage_2}/vocabulary')
  ids = vocabulary.task_tokens
  expected = evaluation_examples(PAIRS, stage_2, split, vocabulary)
  pairs = rows_of('bimodal', split, lengths={'text': 99, 'code': 99})
  written = {
      task: (rows_of(f'{source}_to_{target}', split), source, target, token)
      for task, (source, target, token) in enumerate(
          [('text', 'code', ids.cdec), ('code', 'text', ids.tdec)]
      )
  }
  assert len(pairs) == len(expected) > 1
  are_cut = set()
  for place, (pair, ours) in enumerate(zip(pairs, expected, strict=True)):
    assert pair.keys() == {'text', 'code'}
    for side, length in SIDES.items():
      tokens = ours[f'{side}_tokens']
      assert pair[side].dtype == np.int32
      assert pair[side].tolist() == tokens[: len(pair[side])].tolist()
      assert not tokens[len(pair[side]) :].any()
      assert (pair[side][0], pair[side][-1]) == (ids.bos, ids.eos)
      are_cut.add((side, len(pair[side]) == length))
    for rows, source, target, token in written.values():
      row = rows[place]
      assert row.keys() == {'inputs', 'targets'}
      assert row['inputs'].tolist() == pair[source].tolist()
      assert row['targets'].tolist() == [token, *pair[target][1:]]
      assert row['targets'].dtype == np.int32
  assert {('text', True), ('code', True)} <= are_cut


def test_the_mixture_of_stage_2_writes_both_sides_equally(stage_2):
  vocabulary = load_vocabulary(f'{stage_2}/vocabulary')
  ids = vocabulary.task_tokens
  dataset = seqio.MixtureRegistry.get('stage_2').get_dataset(
      {'inputs': 99, 'targets': 99}, split='train', shuffle=False, seed=0,
      num_epochs=None,
  ).take(400)  # fmt: skip
  begins = [row['targets'][0] for row in dataset.as_numpy_iterator()]
  assert set(begins) == {ids.cdec, ids.tdec}
  assert 150 < begins.count(ids.cdec) < 250


def test_a_corpus_without_pairs_has_no_stage_2(small_corpus):
  with pytest.raises(UserError, match='expected pairs in .*--pairs'):
    seqio_tasks.register_stage_2(str(small_corpus))


def test_stretches_of_a_split_lie_end_to_end(stage_1):
  source = seqio.TaskRegistry.get('span_denoising').source
  whole = list(source.get_dataset('train', shuffle=False).as_numpy_iterator())
  parts = [
      row
      for index in range(3)
      for row in source.get_dataset(
          'train', shuffle=False, shard_info=seqio.ShardInfo(index, 3)
      ).as_numpy_iterator()
  ]
  assert [row['index'] for row in whole] == list(range(len(whole)))
  for one, other in zip(whole, parts, strict=True):
    for name, value in one.items():
      np.testing.assert_array_equal(value, other[name])


def test_a_shuffled_split_holds_the_same_rows(stage_1):
  source = seqio.TaskRegistry.get('span_denoising').source
  rows = source.get_dataset('train', shuffle=True, seed=1)
  indices = [row['index'] for row in rows.as_numpy_iterator()]
  assert indices != sorted(indices)
  assert sorted(indices) == list(range(len(indices)))


def test_the_last_token_stays_where_it_is_also_the_padding(tmp_path):
  """As for CodeGen's vocabulary, which has one id for both."""
  vocabulary = write_corpus(tmp_path / 'corpus', UNFRAMED)
  objective = CausalLM(target_length=4)
  folder = str(tmp_path / 'corpus')
  seqio_tasks.register_task('a_test', objective, folder, vocabulary)
  try:
    assert [row['targets'].tolist() for row in rows_of('a_test', 'train')] == [
        [11, 12, 13, 50], [14, 15, 50, 50], [21, 22, 23, 50],
    ]  # fmt: skip
  finally:
    seqio.TaskRegistry.remove('a_test')


def test_importing_the_module_registers_nothing():
  before = set(seqio.TaskRegistry.names())
  runpy.run_path(seqio_tasks.__file__)
  assert set(seqio.TaskRegistry.names()) == before


def test_seqio_caches_the_tasks(stage_1, tmp_path):
  """Through seqio's own command, which runs on Beam."""
  pytest.importorskip('apache_beam')
  (tmp_path / 'my_tasks.py').write_text(
      'from codet5p_jax.objectives.span_denoising import SpanDenoising\n'
      'from codet5p_jax.seqio_tasks import register_stage_1\n'
      f'register_stage_1({stage_1!r}, objectives=[\n'
      '    SpanDenoising(source_length=40, target_length=30)])\n'
  )
  command = os.path.join(os.path.dirname(sys.executable), 'seqio_cache_tasks')
  subprocess.run(
      [
          command,
          '--tasks=span_denoising',
          '--module_import=my_tasks',
          f'--output_cache_dir={tmp_path / "cache"}',
          '--pipeline_options=--runner=DirectRunner',
      ],
      env={**os.environ, 'PYTHONPATH': str(tmp_path), 'XLA_FLAGS': ''},
      check=True,
      capture_output=True,
  )
  seqio.add_global_cache_dirs([str(tmp_path / 'cache')])
  # The cache knows no order; what each row becomes goes by its index.
  for split in ('validation', 'train'):
    cached = rows_of('span_denoising', split, use_cached=True)
    fresh = rows_of('span_denoising', split)
    assert sorted(map(str, cached)) == sorted(map(str, fresh))
