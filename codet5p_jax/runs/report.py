"""What a run did, in words and curves for whoever ran it."""

import collections
import dataclasses
import json
import logging
import pathlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any


from codet5p_jax.corpus.folder import METADATA
from codet5p_jax.errors import UserError
from codet5p_jax.planning.parameters import (
    count,
    count_by_part,
    parameter_shapes,
)
from codet5p_jax.planning.pod_command import pod_commands
from codet5p_jax.training.curves import (
    draw_losses,
    draw_throughput,
    draw_time,
)
from codet5p_jax.training.files import read_json
from codet5p_jax.training.run_folder import (
    RunFolder,
    read_config,
    read_metrics,
    rebuild,
    write_result,
)
from codet5p_jax.training.timeline import (
    DOWN,
    Session,
    account,
    goodput,
    read_timeline,
)

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

_EXPLANATION = '''\
The loss is the mean surprise of the model at each token it has to predict, in
nats: 0 for one that is always certain and right. The perplexity is the number
of equally likely tokens that would surprise as much, and the accuracy is the
share of tokens that the model found likeliest. The unigram entropy is the loss
of the best guess that knows how frequent each token is and does not read the
text: a model that has learned anything of code ends below it. Sentinels, which
mark gaps in a fixed order, and the first token of a target count in training
only, so there the loss is lower than on held-out text.'''

_BUCKETS = '''\
A session is what one process made of the run; `step` is the time of updates,
the rest is its price. `startup` comes before the first of them, `compile` is
that of the train step, `input` waited for batches; during `evaluation` and
`checkpoint` training stood still. `lost_work` was done again, because a later
session went on from before it, and `down` lies between the sessions.'''


@dataclasses.dataclass(frozen=True)
class _Run:
  """What is known of a run.

  Attributes:
    folder: of the run.
    config: config.json, rebuilt.
    rows: of metrics.jsonl.
    evaluations: {where it was measured: {"<objective>/<metric>": value}}.
    outputs: rows of generation/outputs*.jsonl.
    sessions: of timeline.jsonl; none of a run that has no such file.
    corpus: metadata of the corpus; None where the data is none.
  """

  folder: RunFolder
  config: Mapping[str, Any]
  rows: Sequence[Mapping[str, Any]]
  evaluations: Mapping[str, Mapping[str, Any]]
  outputs: Sequence[Mapping[str, Any]]
  sessions: Sequence[Session]
  corpus: Mapping[str, Any] | None

  @property
  def objectives(self) -> list[str]:
    return [objective.name for objective in self.config['objectives']]

  @property
  def last_step(self) -> int:
    return self.rows[-1]['step']


def report(run_dir: str) -> None:
  """Writes report.md and its curves into the folder of a run; prints a summary.

  A run that is still going or was stopped is reported as far as it came.

  Args:
    run_dir: the folder of a run.

  Raises:
    UserError: the folder is none of a run, or nothing was trained yet, or it
      cannot be written.
  """
  run = _read(run_dir)
  path = run.folder.path
  write_result(
      path / 'report' / 'loss.png',
      draw_losses(run.rows, run.objectives, _entropies(run)),
  )
  write_result(path / 'report' / 'throughput.png', draw_throughput(run.rows))
  if run.sessions:
    began = run.sessions[0].began
    starts = [session.began - began for session in run.sessions]
    bars = list(zip(starts, account(run.sessions), strict=True))
    write_result(path / 'report' / 'time.png', draw_time(bars))
  table = _loss_table(run)
  sections = [
      f'# Report on {path}',
      _paragraph(_state(run)),
      '## How good the model is',
      _EXPLANATION,
      table or 'The run was not evaluated yet.',
      '![losses over the steps](report/loss.png)',
      *_samples(run),
      '## What was trained',
      _model(run),
      _data(run),
      '## How long it took',
      _paragraph(_speed(run)),
      '![tokens a second over the steps](report/throughput.png)',
      *_time(run.sessions),
      '## What lies in this folder',
      '\n'.join(
          f'- `{name}`: {words}'
          for name, words in _CONTENTS.items()
          if name == 'report.md' or (path / name).exists()
      ),
      '## The same on a TPU slice',
      _paragraph(
          'The same objectives at the size of CodeT5+ 220M. In a checkout of '
          'codet5p_jax, with the settings of the paper, as the gin files say:'
      ),
      _fenced(_commands(run), 'sh'),
  ]
  write_result(path / 'report.md', '\n\n'.join(sections) + '\n')
  print(f'{_paragraph(_state(run))}\n\n{table or "Not evaluated yet."}\n')
  _logger.info('The report is in %s.', path / 'report.md')


def _read(run_dir: str) -> _Run:
  config = rebuild(read_config(run_dir))
  folder = RunFolder(pathlib.Path(run_dir).expanduser())
  rows = read_metrics(folder.metrics)
  if not any(row.get('kind') == 'train' for row in rows):
    raise UserError(
        f'expected rows of training in {folder.metrics}, found none; start the '
        f'run, or wait for its first row'
    )
  evaluations = {}
  in_training = [row for row in rows if row.get('kind') == 'evaluation']
  if in_training:
    name = f'validation, in training at step {in_training[-1]["step"]}'
    evaluations[name] = in_training[-1]
  for path in sorted(folder.path.glob('evaluation/*/metrics.json')):
    values = read_json(path)
    evaluations[f'{path.parent.name}, at step {values.get("step")}'] = values
  outputs = [
      row
      for path in sorted(folder.path.glob('generation/outputs*.jsonl'))
      for row in read_metrics(path)
      if 'settings' in row  # Former versions did not write them.
  ]
  corpus = _corpus_metadata(pathlib.Path(config['data_dir']))
  sessions = read_timeline(folder.timeline)
  return _Run(folder, config, rows, evaluations, outputs, sessions, corpus)


def _corpus_metadata(data_dir: pathlib.Path) -> dict[str, Any] | None:
  try:
    metadata = json.loads((data_dir / METADATA).read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return None  # Pairs have none; and a corpus may have been moved away.
  return metadata if isinstance(metadata, dict) else None


def _entropies(run: _Run) -> dict[str, float]:
  """Unigram entropies by objective, of the validation split where known."""
  entropies = {}
  for where, values in run.evaluations.items():
    for name in run.objectives:
      entropy = values.get(f'{name}/unigram_entropy')
      is_first = name not in entropies or where.startswith('validation')
      if entropy is not None and is_first:
        entropies[name] = entropy
  return entropies


def _state(run: _Run) -> str:
  """What was trained and how far, in a sentence or two."""
  parameters = _rounded(count(_shapes(run)))
  wanted = run.config['train_steps']
  text = (
      f'A model of {parameters} parameters was trained for {run.last_step:,} '
      f'of {wanted:,} steps on {_listed(run.objectives)}.'
  )
  if run.last_step >= wanted and run.folder.model.exists():
    return f'{text} The run is complete.'
  return (
      f'{text} The run is not complete: it goes on, or the same command that '
      f'started it makes it go on.'
  )


def _shapes(run: _Run) -> dict[str, tuple[int, ...]]:
  return parameter_shapes(run.config['model'].make_model())


def _loss_table(run: _Run) -> str:
  """Losses by objective and split; empty where nothing was evaluated."""
  rows = []
  for name in run.objectives:
    for where, values in run.evaluations.items():
      loss = values.get(f'{name}/loss')
      if loss is None:
        continue
      loss = float(loss)  # A text where it is not finite.
      entropy = values.get(f'{name}/unigram_entropy')
      rows.append([
          name,
          where,
          f'{loss:.3f}',
          _number(values.get(f'{name}/accuracy'), '.1%'),
          _number(values.get(f'{name}/perplexity'), '.4g'),
          _number(entropy, '.3f'),
          _number(None if entropy is None else entropy - loss, '.3f'),
      ])
  header = [
      'objective', 'measured on', 'loss', 'accuracy', 'perplexity',
      'unigram entropy', 'loss below it by',
  ]  # fmt: skip
  return _table(header, rows) if rows else ''


def _samples(run: _Run) -> list[str]:
  if not run.outputs:
    return []
  sections = ['## What it writes']
  if any(_how(row['settings']) == _GREEDY for row in run.outputs):
    sections.append(_paragraph(
        'At temperature 0 it takes the likeliest token each time, which makes '
        'small models repeat themselves.'
    ))
  for row in run.outputs:
    sections += [
        f'Mode `{row["mode"]}`, {_how(row["settings"])}, weights of step '
        f'{row["step"]:,}. Prompt:',
        _fenced(row['prompt']),
        'Answer:',
        _fenced(row['completion']),
    ]
  return sections


_GREEDY = 'temperature 0'


def _how(settings: Mapping[str, Any]) -> str:
  """How a completion was made."""
  if search := settings['beam_search']:
    return f'{search["num_beams"]} beams'
  return f'temperature {settings["sampling"]["temperature"]:g}'


def _model(run: _Run) -> str:
  parts = count_by_part(_shapes(run))
  parts['total'] = sum(parts.values())
  return _table(
      ['part of the model', 'parameters'],
      [[part, f'{number:,}'] for part, number in parts.items()],
  )


def _data(run: _Run) -> str:
  """The data in words and, of a corpus, in tables."""
  where = f'The data is in {run.config["data_dir"]}'
  if run.corpus is None:
    return f'{where}, where no metadata of a corpus is found.'
  words = [f'{where}. Validation and test are whole packages or repositories.']
  for key, told in (('licences', 'Licences'), ('dropped', 'Files left out')):
    counts = _counts(run.corpus, key)
    shown = [f'{name} {number:,}' for name, number in counts.items() if number]
    if len(shown) > 12:
      shown[12:] = [f'{len(shown) - 12} more']
    if shown:
      words.append(f'{told}: {", ".join(shown)}.')
  return '\n\n'.join([
      _paragraph(' '.join(words)),
      *_count_tables(run.corpus, 'split', 'files', 'tokens'),
      *_count_tables(
          run.corpus, 'language', 'languages', 'tokens_by_language'
      ),
  ])


def _count_tables(
    corpus: Mapping[str, Any], by: str, files_key: str, tokens_key: str
) -> list[str]:
  """A table of files and tokens, if the metadata has them."""
  files, tokens = _counts(corpus, files_key), _counts(corpus, tokens_key)
  rows = [
      [name, f'{number:,}', _number(tokens.get(name), ',')]
      for name, number in files.items()
  ]
  return [_table([by, 'files', 'tokens'], rows)] if rows else []


def _counts(corpus: Mapping[str, Any], key: str) -> dict[str, int]:
  """The counts of that name in the metadata, the greatest first."""
  counts = corpus.get(key, {}).items()
  return dict(sorted(counts, key=lambda item: -item[1]))


def _speed(run: _Run) -> str:
  train = [row for row in run.rows if row.get('train_seconds')]
  seconds = sum(row['train_seconds'] for row in train)
  if not seconds:
    return 'No step was timed yet: the first ones are compiled.'

  def mean(key):
    return sum(row[key] * row['train_seconds'] for row in train) / seconds

  steps, tokens = mean('steps_per_second'), mean('target_tokens_per_second')
  seen = tokens / steps * run.last_step
  waited = sum(row['input_wait_seconds'] for row in train)
  text = (
      f'{_duration(seconds)} of training, not counting compiling, evaluation '
      f'and checkpoints: {steps:.3g} steps and {tokens:,.0f} target tokens a '
      f'second, about {_rounded(seen)} target tokens in all'
  )
  corpus_tokens = (run.corpus or {}).get('tokens', {}).get('train')
  if corpus_tokens:
    text += f' ({seen / corpus_tokens:.2g} times the training split)'
  text += f'. Steps waited {_duration(waited)} for their input.'
  known = [row for row in train if not isinstance(row['mfu'], str)]
  if known:
    utilisation = sum(row['mfu'] * row['train_seconds'] for row in known)
    utilisation /= sum(row['train_seconds'] for row in known)
    return (
        f'{text} The model FLOPs utilisation (MFU), the share of what the '
        f'chips could do at most, was {utilisation:.1%}.'
    )
  return (
      f'{text} The model FLOPs utilisation (MFU) is n/a: it is known of TPUs '
      f'only.'
  )


def _time(sessions: Sequence[Session]) -> list[str]:
  """Where the time went; nothing where that is not known."""
  if not sessions:
    return []
  spent = goodput(sessions)
  total = sum(spent.values())
  rows = [
      [bucket, f'{seconds:,.1f}', f'{seconds / total:.1%}']
      for bucket, seconds in {**spent, 'total': total}.items()
      if round(seconds, 1)
  ]
  ends = collections.Counter(
      session.status or 'no end (killed, or still going)'
      for session in sessions
  )
  ended = _listed([f'{end} {number}' for end, number in ends.items()])
  words = [
      f'Sessions: {len(sessions)}, by their end: {ended}. Of '
      f'{_duration(total)} from the first start on, '
      f'{spent["step"] / total:.1%} were spent on updates that count, and '
      f'{spent["step"] / (total - spent[DOWN]):.1%} of the time that a session '
      f'was there.'
  ]
  events = {
      name: [event for session in sessions for event in session.events(name)]
      for name in ('checkpoint', 'damaged_checkpoint', 'bad_step')
  }
  if saved := events['checkpoint']:
    size, seconds = (
        sum(event[key] for event in saved) / len(saved)
        for key in ('bytes', 'seconds')
    )
    words.append(
        f'Checkpoints: {len(saved)}, of {size / 1e6:,.1f} MB each, written '
        f'whole after {_duration(seconds)} (means).'
    )
  words.append(
      f'Damaged checkpoints set aside: {len(events["damaged_checkpoint"])}. '
      f'Bad steps: {len(events["bad_step"])}.'
  )
  return [
      '## Where the time went',
      _BUCKETS,
      _table(['bucket', 'seconds', 'share'], rows),
      _paragraph(' '.join(words)),
      '![what each session spent its time on](report/time.png)',
  ]


def _commands(run: _Run) -> str:
  return pod_commands(
      run.config['objectives'],
      run.config['model'].vocab_size,
      str(run.folder.path),
      run.config['data_dir'],
      (run.corpus or {}).get('settings', {}),
  )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table that is also one to the eye."""
  columns = list(zip(header, *rows))
  widths = [max(map(len, column)) for column in columns]
  is_text = [
      any(cell[:1].isalpha() and cell != 'n/a' for cell in column[1:])
      for column in columns
  ]
  lines = [
      '| ' + ' | '.join(
          f'{cell:<{width}}' if left else f'{cell:>{width}}'
          for cell, width, left in zip(row, widths, is_text)
      ) + ' |'
      for row in (header, *rows)
  ]  # fmt: skip
  rule = '|'.join(
      '-' * (width + 2) if left else '-' * (width + 1) + ':'
      for width, left in zip(widths, is_text)
  )
  return '\n'.join([lines[0], f'|{rule}|', *lines[1:]])


def _fenced(text: str, language: str = '') -> str:
  """A block of code, whatever backticks are in it."""
  longest = max(map(len, re.findall('`+', text)), default=0)
  fence = '`' * max(3, longest + 1)
  return f'{fence}{language}\n{text.rstrip()}\n{fence}'


def _paragraph(text: str) -> str:
  return textwrap.fill(
      text, 80, break_long_words=False, break_on_hyphens=False
  )


def _listed(names: Sequence[str]) -> str:
  *first, last = names
  return f'{", ".join(first)} and {last}' if first else last


def _number(value: float | int | str | None, form: str) -> str:
  if isinstance(value, str):
    return value  # What is not finite is no number in JSON.
  return 'n/a' if value is None else format(value, form)


def _rounded(number: float | int) -> str:
  """A number in words, of three digits: 2,500,000 is "2.5 million"."""
  for size, word in ((1e9, 'billion'), (1e6, 'million')):
    if number >= size:
      return f'{number / size:.3g} {word}'
  return f'{number:,.0f}'


def _duration(seconds: float | int) -> str:
  if seconds < 60:
    return f'{seconds:.3g} s'
  minutes = round(seconds / 60)
  return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else (
      f'{minutes} min')
