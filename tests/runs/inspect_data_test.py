import re

import numpy as np
import pytest
import seqio

from codet5p_jax import stage_1
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.seq2seq_causal_lm import Seq2SeqCausalLM
from codet5p_jax.objectives.span_denoising import SpanDenoising
from codet5p_jax.runs.inspect_data import inspect_data
from codet5p_jax.training.batches import training_examples, training_rows
from codet5p_jax.training.run_folder import open_run_folder

OBJECTIVES = (
    SpanDenoising(source_length=40, target_length=30),
    Seq2SeqCausalLM(row_length=30, source_length=29, target_length=29),
    CausalLM(target_length=24),
)


@pytest.fixture
def run_dir(small_corpus, tmp_path):
  """The folder of a run that was only begun."""
  config = {
      'objectives': OBJECTIVES, 'seed': 7, 'data_dir': str(small_corpus)
  }  # fmt: skip
  open_run_folder(tmp_path / 'run', config)
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  vocabulary.save(tmp_path / 'run' / 'vocabulary')
  return str(tmp_path / 'run')


def test_a_run_s_own_first_training_examples_are_shown(
    run_dir, small_corpus, capsys
):
  inspect_data(run_dir=run_dir, num_examples=2, num_rows=3)
  printed = capsys.readouterr().out
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  for objective in OBJECTIVES:
    assert f' {objective.name} ' in printed
    examples = training_examples(
        objective, str(small_corpus), vocabulary, seed=7
    )
    for index in range(2):
      targets = examples[index]['decoder_target_tokens'].tolist()
      shown = vocabulary.decode(targets, skip_special_ids=False)
      assert shown.replace('<pad>', '') in printed
  assert '<extra_id_0>' in printed
  assert '[CLM]<s>' in printed


def test_fill_is_the_share_of_tokens_in_padded_rows(run_dir, capsys):
  inspect_data(run_dir=run_dir, task='causal_lm', num_examples=1, num_rows=4)
  printed = capsys.readouterr().out
  assert 'span_denoising' not in printed
  rows = 'tokens a row on average, 100.0% of the'
  assert f'encoder_input: 1.0 {rows} 1 of' in printed
  assert f'decoder_target: 24.0 {rows} 24 of' in printed
  inspect_data(
      run_dir=run_dir, task='seq2seq_causal_lm', num_examples=1, num_rows=9
  )
  printed = capsys.readouterr().out
  source, target = map(float, re.findall(r': ([\d.]+) tokens a row', printed))
  # [CLM], <s> and </s> on top of the row's 30 tokens, and <s> once more.
  assert source + target == pytest.approx(34, abs=0.11)
  assert f'{source / 29:.0%}'[:2] in printed
  assert re.search(r'[\d,]+ rows/s, [\d,]+ tokens/s', printed)


@pytest.mark.parametrize('code_length', [30, 43, 60])
def test_pairs_are_shown_and_how_many_of_them_are_cut(
    paired_corpus, tmp_path, capsys, code_length
):
  objective = Bimodal(text_length=20, code_length=code_length, queue_size=4)
  config = {
      'objectives': (objective,), 'seed': 7, 'data_dir': str(paired_corpus)
  }  # fmt: skip
  open_run_folder(tmp_path / 'run', config)
  vocabulary = load_vocabulary(paired_corpus / 'vocabulary')
  vocabulary.save(tmp_path / 'run' / 'vocabulary')
  inspect_data(run_dir=str(tmp_path / 'run'), num_examples=2, num_rows=50)
  printed = capsys.readouterr().out
  examples = training_examples(
      objective, str(paired_corpus), vocabulary, seed=7
  )
  rows = training_rows(objective, str(paired_corpus), 'train', vocabulary, 7)
  for index in range(2):
    for side in ('text', 'code'):
      ids = examples[index][f'{side}_tokens'].tolist()
      shown = vocabulary.decode(ids, skip_special_ids=False)
      assert shown.replace('<pad>', '') in printed
  measured = range(2, 52)
  lengths = np.array([len(rows[i]['code']) + 2 for i in measured])
  cut = (lengths > code_length).mean()
  assert cut == {30: 1, 60: 0}.get(code_length, pytest.approx(0.5, abs=0.49))
  kept = np.minimum(lengths, code_length).mean()
  assert (
      f'code: {kept:.1f} tokens a row on average, {kept / code_length:.1%} of '
      f'the {code_length} of a padded row; {cut:.1%} of the rows are cut'
  ) in printed
  assert re.search(r'text: .* of the 20 of .*; 0.0% of the rows', printed)


def test_a_corpus_with_pairs_is_shown_as_both_stages(paired_corpus, capsys):
  inspect_data(str(paired_corpus), num_examples=1, num_rows=1)
  printed = capsys.readouterr().out
  for name in ('span_denoising', 'seq2seq_causal_lm', 'causal_lm', 'bimodal'):
    assert f' {name} ' in printed
  assert 'of the 128 of a padded row' in printed
  assert 'of the 420 of a padded row' in printed


def test_a_corpus_is_shown_with_the_lengths_of_the_paper(
    small_corpus, capsys, monkeypatch
):
  inspect_data(str(small_corpus), task='causal_lm', num_examples=1, num_rows=1)
  assert '100.0% of the 1024 of a padded row' in capsys.readouterr().out
  monkeypatch.setattr(stage_1, 'OBJECTIVES', OBJECTIVES[:1])
  inspect_data(str(small_corpus), num_examples=1, num_rows=1)
  assert 'of the 40 of a padded row' in capsys.readouterr().out


@pytest.fixture
def my_tasks(small_corpus, tmp_path, monkeypatch):
  """A module that registers tasks, as a user would write it."""
  (tmp_path / 'tasks_of_a_test.py').write_text(
      'from codet5p_jax import seqio_tasks\n'
      'from codet5p_jax.objectives.span_denoising import SpanDenoising\n'
      'import seqio\n'
      'seqio_tasks.register_stage_1(\n'
      f'    {str(small_corpus)!r}, objectives=[SpanDenoising(40, 30)])\n'
      'text = seqio.Feature(seqio.ByteVocabulary())\n'
      'seqio.TaskRegistry.add(\n'
      "    'plain', preprocessors=[], output_features={'targets': text},\n"
      '    source=seqio.FunctionDataSource(\n'
      '        lambda split, shuffle_files, seed=None: (\n'
      "            __import__('tensorflow').data.Dataset.from_tensors(\n"
      "                {'targets': [107, 108]})),\n"
      "        splits=['train']))\n"
  )
  monkeypatch.chdir(tmp_path)
  yield 'tasks_of_a_test'
  seqio.MixtureRegistry.remove('stage_1')
  for name in ('span_denoising', 'plain'):
    seqio.TaskRegistry.remove(name)


def test_any_seqio_task_and_mixture_is_shown(my_tasks, capsys):
  for name in ('stage_1', 'span_denoising'):
    inspect_data(module=my_tasks, task=name, num_examples=1, num_rows=3)
    printed = capsys.readouterr().out
    assert f' {name} ' in printed
    assert '<extra_id_0>' in printed
  inspect_data(module=my_tasks, task='plain', num_examples=1, num_rows=3)
  assert '\nhi\n' in capsys.readouterr().out
  for changes, expected in (
      ({'task': 'plian'}, 'plain, span_denoising, stage_1, found plian'),
      ({}, 'found None; set --task'),
      ({'task': 'plain', 'split': 'test'}, 'among train, found test'),
  ):
    with pytest.raises(UserError, match=expected) as error:
      inspect_data(module=my_tasks, **changes)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ({}, 'expected one of --data_dir, --run_dir and --module, found none'),
        ({'data_dir': 'a', 'run_dir': 'b'}, 'found --data_dir and --run_dir'),
        ({'module': 'no_such_module'}, 'a Python module no_such_module that'),
        ({'data_dir': '/nowhere'}, 'in /nowhere; give one, or a corpus_dir'),
        ({'run_dir': '/nowhere'}, '/nowhere/config.json'),
        ({'data_dir': 'a', 'num_rows': 0}, 'num_rows to be at least 1'),
    ],
)
def test_what_is_not_there_is_one_clear_line(arguments, expected):
  with pytest.raises(UserError, match=expected) as error:
    inspect_data(**arguments)
  assert '\n' not in str(error.value)


def test_an_objective_nobody_has_is_one_clear_line(run_dir):
  with pytest.raises(
      UserError, match='among span_denoising, seq2seq_causal_lm, causal_lm, fo'
  ):
    inspect_data(run_dir=run_dir, task='denoising')
