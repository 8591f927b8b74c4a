"""How fast a run was, and where its time went."""

import collections
from collections.abc import Sequence

from codet5p_jax.reporting import markdown
from codet5p_jax.reporting.reported_run import ReportedRun
from codet5p_jax.training.timeline import DOWN, Session, goodput

_BUCKETS = '''\
A session is what one process made of the run; `step` is the time of updates,
the rest is its price. `startup` comes before the first of them, `compile` is
that of the train step, `input` waited for batches; during `evaluation` and
`checkpoint` training stood still. `lost_work` was done again, because a later
session went on from before it, and `down` lies between the sessions.'''


def describe_speed(run: ReportedRun) -> str:
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
      f'{markdown.duration(seconds)} of training, not counting compiling, '
      f'evaluation and checkpoints: {steps:.3g} steps'
  )
  if tokens:  # Contrast and matching predict none.
    text += (
        f' and {tokens:,.0f} target tokens a second, about '
        f'{markdown.rounded(seen)} target tokens in all'
    )
    corpus_tokens = (run.corpus or {}).get('tokens', {}).get('train')
    if corpus_tokens:
      text += f' ({seen / corpus_tokens:.2g} times the training split)'
  else:
    text += ' a second'
  text += f'. Steps waited {markdown.duration(waited)} for their input.'
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


def time_sections(sessions: Sequence[Session]) -> list[str]:
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
  ended = markdown.listed([f'{end} {number}' for end, number in ends.items()])
  words = [
      f'Sessions: {len(sessions)}, by their end: {ended}. Of '
      f'{markdown.duration(total)} from the first start on, '
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
        f'whole after {markdown.duration(seconds)} (means).'
    )
  words.append(
      f'Damaged checkpoints set aside: {len(events["damaged_checkpoint"])}. '
      f'Bad steps: {len(events["bad_step"])}.'
  )
  return [
      '## Where the time went',
      _BUCKETS,
      markdown.table(['bucket', 'seconds', 'share'], rows),
      markdown.paragraph(' '.join(words)),
      '![what each session spent its time on](report/time.png)',
  ]
