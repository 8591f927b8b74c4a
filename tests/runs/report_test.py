import json
import re

import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.main import main
from codet5p_jax.models.bimodal import BimodalConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.objectives.bimodal import LOSSES as PAIR_LOSSES
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.sequence_to_sequence import SequenceToSequence
from codet5p_jax.runs import report as report_run
from codet5p_jax.runs.report import report
from codet5p_jax.training.optimizers import AdamW
from codet5p_jax.training.run_folder import (
    append_metrics,
    open_run_folder,
    write_result,
)
from codet5p_jax.training.timeline import BUCKETS

MODEL = T5Config(
    vocab_size=131,
    emb_dim=24,
    num_heads=8,
    head_dim=4,
    mlp_dim=40,
    num_encoder_layers=2,
    num_decoder_layers=3,
)
PAIRS = SequenceToSequence(source_length=11, target_length=9)
LOSSES = {'causal_lm': 3.0, 'sequence_to_sequence': 2.0}


def train_row(step, **changes):
  # 4 steps and 800 target tokens a second; half an hour a row.
  row = {
      'step': step,
      'kind': 'train',
      'causal_lm/loss': 5.0,
      'train_seconds': 1800.0,
      'input_wait_seconds': 7.5,
      'steps_per_second': 4.0,
      'target_tokens_per_second': 800.0,
      'mfu': 'n/a',
  }
  return {**row, **changes}


def metrics(with_entropy, losses=LOSSES):
  values = {}
  for name, loss in losses.items():
    values |= {
        f'{name}/loss': loss,
        f'{name}/accuracy': 0.4321,
        f'{name}/perplexity': 20.0855,
        f'{name}/tokens': 90.0,
    }
    if with_entropy:
      values[f'{name}/unigram_entropy'] = loss + 1.25
  return values


@pytest.fixture
def run(tmp_path):
  """A run of two objectives, of which 8 of 9 steps were logged."""
  folder = open_run_folder(
      tmp_path / 'run',
      {
          'model': MODEL,
          'objectives': (CausalLM(target_length=14), PAIRS),
          'optimizer': AdamW(1e-2, 2, 9, 0.1),
          'computation': Computation(),
          'train_steps': 9,
          'data_dir': str(tmp_path / 'data'),
      },
  )
  append_metrics(folder.metrics, train_row(4))
  append_metrics(folder.metrics, train_row(8))
  return folder


def finish(run):
  append_metrics(run.metrics, train_row(9))
  row = {'step': 9, 'kind': 'evaluation', **metrics(with_entropy=True)}
  append_metrics(run.metrics, row)
  run.model.mkdir()


def written(run):
  """report.md, with lines joined."""
  return ' '.join((run.path / 'report.md').read_text().split())


def test_a_finished_run_is_told_whole(run, capsys):
  finish(run)
  split = {'step': 9, **metrics(False, {'causal_lm': 3.5})}
  write_result(run.path / 'evaluation' / 'test' / 'metrics.json', split)
  report(str(run.path))
  text = written(run)
  assert 'A model of 38,192 parameters was trained' in text
  assert 'for 9 of 9 steps on causal_lm and sequence_to_sequence' in text
  assert 'The run is complete.' in text
  cells = [
      [cell.strip() for cell in line.strip('|').split('|')]
      for line in (run.path / 'report.md').read_text().splitlines()
      if line.startswith('| causal_lm') or line.startswith('| sequence_to')
  ]
  in_training = 'validation, in training at step 9'
  assert cells == [
      ['causal_lm', in_training, '3.000', '43.2%', '20.09', '4.250', '1.250'],
      ['causal_lm', 'test, at step 9', '3.500', '43.2%', '20.09', 'n/a', 'n/a'],
      ['sequence_to_sequence', in_training, '2.000', '43.2%', '20.09', '3.250',
       '1.250'],
  ]  # fmt: skip
  for name in ('loss', 'throughput'):
    png = run.path / 'report' / f'{name}.png'
    assert png.read_bytes().startswith(b'\x89PNG')
    assert f'(report/{name}.png)' in text
  printed = capsys.readouterr().out
  assert 'The run is complete.' in printed
  assert '| causal_lm ' in printed


def test_the_curves_have_the_entropies_of_the_validation_split(
    run, monkeypatch
):
  for split, loss in (('test', 4.0), ('validation', 3.0)):
    values = metrics(with_entropy=True, losses={'causal_lm': loss})
    path = run.path / 'evaluation' / split / 'metrics.json'
    write_result(path, {'step': 8, **values})
  drawn = []

  def draw_losses(*arguments):
    drawn.append({curve.title: curve.entropy for curve in arguments[-1]})
    return b''

  monkeypatch.setattr(report_run, 'draw_losses', draw_losses)
  report(str(run.path))
  assert drawn == [{'causal_lm': 4.25, 'sequence_to_sequence': None}]


def test_time_and_speed_are_those_of_all_rows(run):
  finish(run)
  report(str(run.path))
  text = written(run)
  assert '1 h 30 min of training' in text
  assert '4 steps and 800 target tokens a second, about 1,800 target' in text
  assert 'Steps waited 22.5 s for their input.' in text
  assert '(MFU) is n/a' in text


def test_utilisation_is_told_where_it_is_known(run):
  append_metrics(run.metrics, train_row(9, mfu=0.5, train_seconds=3600.0))
  run.metrics.write_text(
      run.metrics.read_text().replace('"mfu": "n/a"', '"mfu": 0.25')
  )
  report(str(run.path))
  assert 'could do at most, was 37.5%.' in written(run)


def test_steps_that_were_only_compiled_have_no_speed(run):
  rows = [train_row(4, train_seconds=0.0)]
  run.metrics.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
  report(str(run.path))
  assert 'No step was timed yet' in written(run)


def test_an_unfinished_run_without_an_evaluation_says_so(run, capsys):
  with run.metrics.open('a') as file:
    file.write('{"step": 9, "ki')  # Killed within a line.
  report(str(run.path))
  text = written(run)
  assert 'trained for 8 of 9 steps' in text
  assert 'The run is not complete' in text
  assert 'The run was not evaluated yet.' in text
  assert 'Not evaluated yet.' in capsys.readouterr().out


def timeline_row(kind, seconds, buckets, **more):
  buckets = {**dict.fromkeys(BUCKETS, 0.0), **buckets}
  return {'kind': kind, 'seconds': seconds, 'buckets': buckets, **more}


def test_where_the_time_went_is_told_of_all_sessions(run):
  # 100 s, of which 20 were lost; 50 s down; 50 s of which 10 are startup.
  first, second = (
      timeline_row('start', 10.0, {'startup': 10.0}, time=time)
      for time in (1000.0, 1150.0)
  )
  saved = {'step': 4, 'bytes': 2_500_000, 'seconds': 3.0}
  for row in (
      first,
      timeline_row('training', 10.0, {'startup': 10.0}, step=0),
      timeline_row(
          'event', 80.0, {'startup': 10.0, 'step': 70.0}, step=4,
          event='checkpoint', details=saved,
      ),
      timeline_row(
          'progress', 100.0, {'startup': 10.0, 'step': 90.0}, step=5
      ),
      second,
      timeline_row('training', 10.0, {'startup': 10.0}, step=4),
      timeline_row(
          'event', 30.0, {'startup': 10.0, 'step': 20.0}, step=5,
          event='bad_step', details={},
      ),
      timeline_row(
          'end', 50.0, {'startup': 10.0, 'step': 40.0}, step=9, status='done'
      ),
  ):  # fmt: skip
    append_metrics(run.timeline, row)
  report(str(run.path))
  text = re.sub(' +', ' ', written(run))
  for cells in (
      'startup | 20.0 | 10.0%',
      'step | 110.0 | 55.0%',
      'lost_work | 20.0 | 10.0%',
      'down | 50.0 | 25.0%',
      'total | 200.0 | 100.0%',
  ):
    assert f'| {cells} |' in text
  assert '| input |' not in text
  assert 'Sessions: 2, by their end: no end (killed, or still going) 1 and' in (
      text
  )
  assert 'done 1. Of 3 min from the first start on, 55.0% were spent' in text
  assert 'and 73.3% of the time that a session was there.' in text
  assert 'Checkpoints: 1, of 2.5 MB each, written whole after 3 s (me' in text
  assert 'Damaged checkpoints set aside: 0. Bad steps: 1.' in text
  png = run.path / 'report' / 'time.png'
  assert png.read_bytes().startswith(b'\x89PNG')
  assert '- `timeline.jsonl`:' in text


def test_a_run_without_a_timeline_has_no_section_of_it(run):
  report(str(run.path))
  assert 'Where the time went' not in written(run)
  assert not (run.path / 'report' / 'time.png').exists()


def test_a_corpus_is_told_in_tables_and_drops_by_reason(run, tmp_path):
  (tmp_path / 'data').mkdir()
  metadata = {
      'format_version': 99,  # Not that of the run folder.
      'files': {'train': 20, 'test': 3},
      'tokens': {'train': 360, 'test': 41},
      'languages': {'go': 3, 'python': 20},
      'licences': {f'licence {n}': n for n in range(1, 16)},
      'dropped': {'empty': 0, 'duplicate': 2},
      'settings': {'source': 'mine', 'vocab_size': 131},
  }
  (tmp_path / 'data' / 'metadata.json').write_text(json.dumps(metadata))
  report(str(run.path))
  text = written(run)
  assert 'Files left out: duplicate 2.' in text
  assert 'Licences: licence 15 15, licence 14 14,' in text
  assert 'licence 4 4, 3 more.' in text
  assert '| python | 20 | n/a |' in re.sub(' +', ' ', text)
  assert '| train | 20 | 360 |' in re.sub(' +', ' ', text)
  assert '1,600 target tokens in all (4.4 times the training split)' in text


def test_without_metadata_the_place_of_the_data_is_told(run, tmp_path):
  report(str(run.path))
  assert f'The data is in {tmp_path / "data"}, where no' in written(run)
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'metadata.json').write_text('[')
  report(str(run.path))
  assert f'The data is in {tmp_path / "data"}, where no' in written(run)


def test_samples_are_shown_with_their_prompts_whatever_they_hold(run):
  row = {
      'prompt': '```py\nx',
      'mode': 'infill',
      'completion': 'y',
      'step': 1234,
      'settings': {
          'sampling': {'temperature': 0.0},
          'beam_search': None,
      },
  }
  path = run.path / 'generation' / 'outputs.jsonl'
  write_result(path, f'{json.dumps(row)}\n')
  report(str(run.path))
  text = (run.path / 'report.md').read_text()
  told = 'Mode `infill`, temperature 0, weights of step 1,234. Prompt:'
  assert told in text and 'At temperature 0 it takes the likeliest' in text
  assert '\n````\n```py\nx\n````\n' in text
  assert '- `generation`:' in text and '- `model`:' not in text


def test_no_metrics_are_one_clear_line_and_no_report(run):
  run.metrics.unlink()
  with pytest.raises(UserError, match='expected rows of training') as error:
    report(str(run.path))
  assert '\n' not in str(error.value)
  assert not (run.path / 'report.md').exists()


def test_a_folder_of_no_run_is_one_clear_line(tmp_path):
  with pytest.raises(UserError, match='config.json, found none'):
    report(str(tmp_path))


def test_a_broken_line_within_the_metrics_is_named(run):
  lines = run.metrics.read_text().splitlines()
  run.metrics.write_text('\n'.join([lines[0][:20], lines[1], '']))
  with pytest.raises(UserError, match='expected JSON in line 1 of'):
    report(str(run.path))


def test_a_place_that_cannot_be_written_is_one_clear_line(run):
  (run.path / 'report').write_text('in the way')
  with pytest.raises(UserError, match='cannot write .*/loss.png: '):
    report(str(run.path))


def test_the_command_line_reports(run, capsys):
  assert main(['report', f'--run_dir={run.path}']) == 0
  assert 'causal_lm' in capsys.readouterr().out
  assert (run.path / 'report.md').exists()


@pytest.mark.parametrize(
    'seconds, text', [(0.0123, '0.0123 s'), (90, '2 min'), (3720, '1 h 2 min')]
)
def test_durations_have_sensible_digits(run, seconds, text):
  row = train_row(4, train_seconds=float(seconds))
  run.metrics.write_text(f'{json.dumps(row)}\n')
  report(str(run.path))
  assert f'{text} of training' in written(run)


def test_losses_that_are_no_numbers_are_told_as_such(run):
  bad = dict.fromkeys(('loss', 'accuracy', 'perplexity'), float('nan'))
  values = metrics(with_entropy=True)
  values |= {f'causal_lm/{name}': value for name, value in bad.items()}
  append_metrics(run.metrics, train_row(9, **{'causal_lm/loss': float('inf')}))
  append_metrics(run.metrics, {'step': 9, 'kind': 'evaluation', **values})
  report(str(run.path))
  [line] = [
      line
      for line in (run.path / 'report.md').read_text().splitlines()
      if line.startswith('| causal_lm')
  ]
  cells = [cell.strip() for cell in line.strip('|').split('|')]
  assert cells[2:] == ['nan', 'nan', 'nan', '4.250', 'nan']


@pytest.fixture
def make_pair_run(tmp_path):
  """Makes the folder of a run that trains such losses of pairs."""

  def make(*losses):
    folder = open_run_folder(
        tmp_path / '-'.join(losses),
        {
            'model': BimodalConfig(
                vocab_size=131,
                emb_dim=24,
                num_heads=2,
                head_dim=5,
                mlp_dim=40,
                num_encoder_layers=1,
                num_decoder_layers=2,
                initial_temperature=0.07,
            ),
            'objectives': (Bimodal(losses=losses),),
            'optimizer': AdamW(1e-2, 2, 9, 0.1),
            'computation': Computation(),
            'train_steps': 9,
            'data_dir': str(tmp_path / 'data'),
        },
    )
    row = {f'bimodal/{loss}_loss': 2.0 for loss in losses}
    append_metrics(folder.metrics, train_row(9, **row, **{'bimodal/loss': 8.0}))
    return folder

  return make


def pair_metrics(losses):
  values = {'bimodal/loss': 6.5}
  for number, loss in enumerate(losses):
    values |= {
        f'bimodal/{loss}_loss': 1.5 + number,
        f'bimodal/{loss}_accuracy': 0.25 + number / 8,
    }
  return values


def cells_of(run, beginnings):
  """The cells of the lines of tables that begin with one of these words."""
  return [
      [cell.strip() for cell in line.strip('|').split('|')]
      for line in (run.path / 'report.md').read_text().splitlines()
      if line.startswith(tuple(f'| {word}' for word in beginnings))
  ]


def test_losses_of_pairs_and_ranks_are_told_with_what_they_mean(
    make_pair_run, capsys
):
  run = make_pair_run(*PAIR_LOSSES)
  ranks = {
      'pool_size': 1000, 'reranked': 32, 'mrr': 0.075, 'mrr_reranked': 0.15,
      'mrr_bm25': 0.3, 'mrr_chance': 0.0075,
  }  # fmt: skip
  write_result(
      run.path / 'evaluation' / 'test' / 'metrics.json',
      {'step': 9, **pair_metrics(PAIR_LOSSES)}
      | {f'bimodal/{name}': value for name, value in ranks.items()},
  )
  report(str(run.path))
  where = 'test, at step 9'
  assert cells_of(run, ['bimodal']) == [
      ['bimodal: contrastive', where, '1.500', '25.0%'],
      ['bimodal: matching', where, '2.500', '37.5%'],
      ['bimodal: text_to_code', where, '3.500', '50.0%'],
      ['bimodal: code_to_text', where, '4.500', '62.5%'],
      ['bimodal: sum', where, '6.500', 'n/a'],
  ]
  assert [
      cells
      for cells in cells_of(run, ['encoder', 'BM25', 'chance'])
      if len(cells) == 5  # The encoder has parameters, too.
  ] == [
      ['encoder', where, '1,000', '0.0750', '10.0'],
      ['encoder, then decoder (first 32)', where, '1,000', '0.1500', '20.0'],
      ['BM25', where, '1,000', '0.3000', '40.0'],
      ['chance', where, '1,000', '0.0075', '1.0'],
  ]
  text = written(run)
  for word in ('ln n', 'mean reciprocal rank (MRR)', 'knows names only',
               '66.7%', '- `code_to_text`: each token'):  # fmt: skip
    assert word in text
  # What has no meaning for these losses is not explained.
  assert 'perplexity' not in text and 'unigram' not in text
  assert '| encoder, then decoder' in capsys.readouterr().out


def test_each_loss_of_pairs_has_a_curve_with_its_unit(
    make_pair_run, monkeypatch
):
  drawn = []

  def draw_losses(rows, curves):
    drawn.append({curve.metric: curve.unit for curve in curves})
    return b''

  monkeypatch.setattr(report_run, 'draw_losses', draw_losses)
  for losses in (PAIR_LOSSES, ('contrastive',)):
    report(str(make_pair_run(*losses).path))
  assert drawn == [
      {
          'bimodal/loss': 'nats, sum of means',
          'bimodal/contrastive_loss': 'nats a pair',
          'bimodal/matching_loss': 'nats a verdict',
          'bimodal/text_to_code_loss': 'nats a token',
          'bimodal/code_to_text_loss': 'nats a token',
      },
      # The sum of one is that one.
      {'bimodal/contrastive_loss': 'nats a pair'},
  ]


def test_a_run_that_only_contrasts_tells_of_nothing_else(make_pair_run):
  run = make_pair_run('contrastive')
  rows = train_row(9, target_tokens_per_second=0.0)
  run.metrics.write_text(f'{json.dumps(rows)}\n')
  append_metrics(
      run.metrics,
      {'step': 9, 'kind': 'evaluation', **pair_metrics(['contrastive'])},
  )
  report(str(run.path))
  assert len(cells_of(run, ['bimodal'])) == 2
  text = written(run)
  assert '`contrastive`' in text and '`matching`' not in text
  assert 'How well it finds code' not in text
  assert 'checkpoints: 4 steps a second. Steps waited' in text


def test_pairs_are_counted_beside_files(run, tmp_path):
  (tmp_path / 'data').mkdir()
  metadata = {
      'files': {'train': 20, 'test': 3},
      'tokens': {'train': 360, 'test': 41},
      'languages': {'python': 20, 'go': 3},
      'pairs': {'train': 1234, 'test': 56},
      'pairs_by_language': {'python': 1290},
      'pairs_dropped': {'no_text': 7, 'test': 9, 'empty': 0},
  }
  (tmp_path / 'data' / 'metadata.json').write_text(json.dumps(metadata))
  report(str(run.path))
  assert cells_of(run, ['train', 'test', 'python', 'go']) == [
      ['train', '20', '360', '1,234'],
      ['test', '3', '41', '56'],
      ['python', '20', 'n/a', '1,290'],
      ['go', '3', 'n/a', '0'],
  ]
  told = 'Functions left out of the pairs of text and code: test 9, no_text 7.'
  assert told in written(run)


def test_texts_and_codes_are_named_where_one_is_written_from_the_other(run):
  settings = {'sampling': {'temperature': 0.4}, 'beam_search': None}
  for mode in ('text_to_code', 'code_to_text'):
    row = {
        'prompt': 'given', 'mode': mode, 'completion': 'made', 'step': 9,
        'settings': settings,
    }  # fmt: skip
    path = run.path / 'generation' / f'outputs-{mode}.jsonl'
    write_result(path, f'{json.dumps(row)}\n')
  report(str(run.path))
  text = written(run)
  for told in (
      'step 9. Text: ``` given ``` Code that the model writes for it: ``` made',
      'step 9. Code: ``` given ``` Text that the model writes about it: ``` ma',
  ):
    assert told in text
