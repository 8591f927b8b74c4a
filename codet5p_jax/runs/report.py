"""What a run did, in words and curves for whoever ran it."""

import logging

from codet5p_jax.planning.parameters import count, count_by_part
from codet5p_jax.planning.pod_command import pod_commands
from codet5p_jax.reporting import markdown, quality, speed
from codet5p_jax.reporting.data import describe_data
from codet5p_jax.reporting.reported_run import ReportedRun, read_run
from codet5p_jax.training.curves import (
    draw_losses,
    draw_throughput,
    draw_time,
)
from codet5p_jax.training.run_folder import write_result
from codet5p_jax.training.timeline import account

_logger = logging.getLogger(__name__)

_CONTENTS = {
    'report.md': 'this report; the curves are in `report/`',
    'config.json': 'the model, its objectives and how they were trained',
    'operative_config.gin': 'the same as a gin file, which replays the run',
    'metrics.jsonl': 'losses and speed by step, one JSON object a line',
    'timeline.jsonl': 'where the time went, session by session',
    'events': 'the numbers for TensorBoard',
    'checkpoints': 'from which a stopped run goes on',
    'model': 'the weights, for `codet5p evaluate` and `codet5p generate`',
    'bad_steps': 'batches of bad steps, as NumPy arrays',
    'vocabulary': 'the vocabulary the model reads and writes with',
    'compiled': 'programs, so that a run that starts again need not compile',
    'evaluation': 'what `codet5p evaluate` measured, by split',
    'generation': 'what `codet5p generate` wrote',
}


def report(run_dir: str) -> None:
  """Writes report.md and its curves into the folder of a run; prints a summary.

  A run that is still going or was stopped is reported as far as it came.

  Args:
    run_dir: the folder of a run.

  Raises:
    UserError: the folder is none of a run, or nothing was trained yet, or it
      cannot be written.
  """
  run = read_run(run_dir)
  path = run.folder.path
  write_result(
      path / 'report' / 'loss.png',
      draw_losses(run.rows, quality.loss_curves(run)),
  )
  write_result(path / 'report' / 'throughput.png', draw_throughput(run.rows))
  if run.sessions:
    began = run.sessions[0].began
    starts = [session.began - began for session in run.sessions]
    bars = list(zip(starts, account(run.sessions), strict=True))
    write_result(path / 'report' / 'time.png', draw_time(bars))
  tables = quality.loss_tables(run)
  sections = [
      f'# Report on {path}',
      markdown.paragraph(_state(run)),
      '## How good the model is',
      *quality.explain_losses(run),
      *(tables or ['The run was not evaluated yet.']),
      '![losses over the steps](report/loss.png)',
      *quality.rank_sections(run),
      *quality.sample_sections(run),
      '## What was trained',
      _model(run),
      describe_data(run),
      '## How long it took',
      markdown.paragraph(speed.describe_speed(run)),
      '![speed over the steps](report/throughput.png)',
      *speed.time_sections(run.sessions),
      '## What lies in this folder',
      '\n'.join(
          f'- `{name}`: {words}'
          for name, words in _CONTENTS.items()
          if name == 'report.md' or (path / name).exists()
      ),
      '## The same on a TPU slice',
      markdown.paragraph(
          'The same objectives at the size of CodeT5+ 220M. In a checkout of '
          'codet5p_jax, with the settings of the paper, as the gin files say:'
      ),
      markdown.fenced(_commands(run), 'sh'),
  ]
  write_result(path / 'report.md', '\n\n'.join(sections) + '\n')
  tables += quality.rank_tables(run)
  told = [markdown.paragraph(_state(run)), *(tables or ['Not evaluated yet.'])]
  print('\n\n'.join(told) + '\n')
  _logger.info('The report is in %s.', path / 'report.md')


def _state(run: ReportedRun) -> str:
  """What was trained and how far, in a sentence or two."""
  parameters = markdown.rounded(count(run.shapes))
  wanted = run.config['train_steps']
  text = (
      f'A model of {parameters} parameters was trained for {run.last_step:,} '
      f'of {wanted:,} steps on {markdown.listed(run.objectives)}.'
  )
  if run.last_step >= wanted and run.folder.model.exists():
    return f'{text} The run is complete.'
  return (
      f'{text} The run is not complete: it goes on, or the same command that '
      f'started it makes it go on.'
  )


def _model(run: ReportedRun) -> str:
  parts = count_by_part(run.shapes)
  parts['total'] = sum(parts.values())
  return markdown.table(
      ['part of the model', 'parameters'],
      [[part, f'{number:,}'] for part, number in parts.items()],
  )


def _commands(run: ReportedRun) -> str:
  return pod_commands(
      run.config['objectives'],
      run.config['model'],
      str(run.folder.path),
      run.config['data_dir'],
      (run.corpus or {}).get('settings', {}),
  )
