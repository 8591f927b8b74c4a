"""How good a model is: its losses, what it finds and what it writes."""

from collections.abc import Mapping
from typing import Any

from codet5p_jax.reporting import markdown
from codet5p_jax.reporting.reported_run import ReportedRun
from codet5p_jax.training.curves import LossCurve

_OF_TOKENS = '''\
The loss is the mean surprise of the model at each token it has to predict, in
nats: 0 for one that is always certain and right. The perplexity is the number
of equally likely tokens that would surprise as much, and the accuracy is the
share of tokens that the model found likeliest. The unigram entropy is the loss
of the best guess that knows how frequent each token is and does not read the
text: a model that has learned anything of code ends below it. Sentinels, which
mark gaps in a fixed order, and the first token of a target count in training
only, so there the loss is lower than on held-out text.'''

_SUM = '''\
The loss of `{name}`, which reads pairs of a text and its code, is the sum of
these, each of which is a mean surprise in nats: 0 for a model that is always
certain and right.'''

_BY_LOSS = {
    'contrastive': '''\
- `contrastive`: which code belongs to a text, and which text to a code, by the
  similarity of their embeddings. A blind guess among n has a loss of ln n. In
  training the others are those of the batch and of a queue of batches before
  it, in an evaluation those of the batch alone: so there it is lower. The
  accuracy is the share of texts and codes that are nearest to their own.''',
    'matching': '''\
- `matching`: does a code do what a text says? For each pair the decoder judges
  the pair itself, the text with a code that only seems to fit, and the code
  with such a text. Who always says no is right in 66.7% of these verdicts, and
  the loss of who knows no more than that is 0.637.''',
    'text_to_code': '''\
- `text_to_code`: each token of a code, given the text and those before.''',
    'code_to_text': '''\
- `code_to_text`: each token of a text, given the code and those before.''',
}

_UNITS = {
    'contrastive': 'nats a pair',
    'matching': 'nats a verdict',
    'text_to_code': 'nats a token',
    'code_to_text': 'nats a token',
}

_OF_RANKS = '''\
To find code, all codes of a pool are ranked for each of its texts. The mean
reciprocal rank (MRR) is the mean, over the texts, of 1 divided by the rank of
the text's own code: 1 if that is always the first, 0.5 if it is always the
second. The encoder ranks by the similarity of embeddings, which are made of
texts and codes apart; then the decoder may look at each text together with the
first codes and rank these again, with all others behind them. BM25 ranks by the
words that text and code share, where the names in a code are split into their
words: it knows names only and nothing of what a code does. Chance is the mean
of a random order.'''

_GREEDY = 'temperature 0'

# What is given and what is written, in modes that are about more than a text
# that goes on.
_GIVEN_AND_WRITTEN = {
    'text_to_code': ('Text', 'Code that the model writes for it'),
    'code_to_text': ('Code', 'Text that the model writes about it'),
}


def loss_curves(run: ReportedRun) -> list[LossCurve]:
  """The losses that are drawn: of each objective, and of what it sums up."""
  entropies = _entropies(run)
  curves = []
  for name in run.objectives:
    losses = run.losses_of(name)
    # A sum of one is that one.
    if not losses:
      curves.append(
          LossCurve(f'{name}/loss', name, 'nats a token', entropies.get(name))
      )
    elif len(losses) > 1:
      curves.append(
          LossCurve(f'{name}/loss', f'{name}: sum', 'nats, sum of means')
      )
    curves += [
        LossCurve(f'{name}/{loss}_loss', f'{name}: {loss}', _UNITS[loss])
        for loss in losses
    ]
  return curves


def _entropies(run: ReportedRun) -> dict[str, float]:
  """Unigram entropies by objective, of the validation split where known."""
  entropies = {}
  for where, values in run.evaluations.items():
    for name in run.objectives:
      entropy = values.get(f'{name}/unigram_entropy')
      is_first = name not in entropies or where.startswith('validation')
      if entropy is not None and is_first:
        entropies[name] = entropy
  return entropies


def explain_losses(run: ReportedRun) -> list[str]:
  """What the losses of this run mean."""
  words = []
  if not all(run.losses_of(name) for name in run.objectives):
    words.append(_OF_TOKENS)
  for name in run.objectives:
    if losses := run.losses_of(name):
      words.append(markdown.paragraph(_SUM.format(name=name)))
      words.append('\n'.join(_BY_LOSS[loss] for loss in losses))
  return words


def loss_tables(run: ReportedRun) -> list[str]:
  """Losses by objective and split; none where nothing was evaluated."""
  return [*_token_loss_table(run), *_pair_loss_table(run)]


def _token_loss_table(run: ReportedRun) -> list[str]:
  rows = []
  for name in run.objectives:
    for where, values in run.evaluations.items():
      loss = values.get(f'{name}/loss')
      if loss is None or run.losses_of(name):
        continue
      loss = float(loss)  # A text where it is not finite.
      entropy = values.get(f'{name}/unigram_entropy')
      rows.append([
          name,
          where,
          f'{loss:.3f}',
          markdown.number(values.get(f'{name}/accuracy'), '.1%'),
          markdown.number(values.get(f'{name}/perplexity'), '.4g'),
          markdown.number(entropy, '.3f'),
          markdown.number(None if entropy is None else entropy - loss, '.3f'),
      ])
  header = [
      'objective', 'measured on', 'loss', 'accuracy', 'perplexity',
      'unigram entropy', 'loss below it by',
  ]  # fmt: skip
  return [markdown.table(header, rows)] if rows else []


def _pair_loss_table(run: ReportedRun) -> list[str]:
  """The losses that are summed up, with the sum."""
  rows = []
  for name in run.objectives:
    for where, values in run.evaluations.items():
      losses = run.losses_of(name)
      if not losses or f'{name}/loss' not in values:
        continue
      rows += [
          [
              f'{name}: {loss}',
              where,
              markdown.number(values.get(f'{name}/{loss}_loss'), '.3f'),
              markdown.number(values.get(f'{name}/{loss}_accuracy'), '.1%'),
          ]
          for loss in losses
      ]
      total = markdown.number(values[f'{name}/loss'], '.3f')
      rows.append([f'{name}: sum', where, total, 'n/a'])
  header = ['loss of', 'measured on', 'loss', 'accuracy']
  return [markdown.table(header, rows)] if rows else []


def rank_tables(run: ReportedRun) -> list[str]:
  """How well codes are found; none where that was not measured."""
  rows = []
  for name in run.objectives:
    for where, values in run.evaluations.items():
      chance = values.get(f'{name}/mrr_chance')
      if chance is None:
        continue
      again = values.get(f'{name}/reranked', 0)
      for key, ranked_by in (
          ('mrr', 'encoder'),
          ('mrr_reranked', f'encoder, then decoder (first {again:,})'),
          ('mrr_bm25', 'BM25'),
          ('mrr_chance', 'chance'),
      ):
        found = values.get(f'{name}/{key}')
        if found is not None:
          rows.append([
              ranked_by,
              where,
              f'{values[f"{name}/pool_size"]:,}',
              f'{found:.4f}',
              f'{found / chance:.1f}',
          ])
  header = ['ranked by', 'measured on', 'pool', 'MRR', 'times chance']
  return [markdown.table(header, rows)] if rows else []


def rank_sections(run: ReportedRun) -> list[str]:
  """How well the model finds code, with words."""
  tables = rank_tables(run)
  return ['## How well it finds code', _OF_RANKS, *tables] if tables else []


def sample_sections(run: ReportedRun) -> list[str]:
  """What was generated, with its prompts; none where nothing was."""
  if not run.outputs:
    return []
  sections = ['## What it writes']
  if any(_how(row['settings']) == _GREEDY for row in run.outputs):
    sections.append(markdown.paragraph(
        'At temperature 0 it takes the likeliest token each time, which makes '
        'small models repeat themselves.'
    ))
  for row in run.outputs:
    given, written = _GIVEN_AND_WRITTEN.get(row['mode'], ('Prompt', 'Answer'))
    sections += [
        f'Mode `{row["mode"]}`, {_how(row["settings"])}, weights of step '
        f'{row["step"]:,}. {given}:',
        markdown.fenced(row['prompt']),
        f'{written}:',
        markdown.fenced(row['completion']),
    ]
  return sections


def _how(settings: Mapping[str, Any]) -> str:
  """How a completion was made."""
  if search := settings['beam_search']:
    return f'{search["num_beams"]} beams'
  return f'temperature {settings["sampling"]["temperature"]:g}'
