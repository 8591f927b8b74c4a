"""Curves and bars of a run, drawn from what it wrote down."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from matplotlib.figure import Figure

# Those of metrics.jsonl; see training/logging.py.
Rows = Sequence[Mapping[str, Any]]

_TRAINING, _VALIDATION, _ENTROPY = '#9ab8d6', '#0b4f8a', '#c0392b'
_BUCKETS = {
    'startup': '#d9a441',
    'compile': '#8c6bb1',
    'input': '#e67e22',
    'step': _VALIDATION,
    'evaluation': _TRAINING,
    'checkpoint': '#41ab5d',
    'other': '#8a8a8a',
    'lost_work': _ENTROPY,
}
_INCHES, _DOTS_PER_INCH = (4.6, 3.4), 120


@dataclasses.dataclass(frozen=True)
class LossCurve:
  """A loss to draw.

  Attributes:
    metric: its name in the rows.
    title: of its panel.
    unit: what a number of it is; losses of one unit are drawn to one scale.
    entropy: unigram entropy of the targets, nats, if it is known.
  """

  metric: str
  title: str
  unit: str
  entropy: float | None = None


def series(rows: Rows, kind: str, key: str) -> tuple[list[int], list[float]]:
  """The steps and values of a number in the rows of a kind that have it.

  >>> rows = [{'step': 5, 'kind': 'train', 'mfu': 'n/a'},
  ...         {'step': 9, 'kind': 'train', 'mfu': 0.25}]
  >>> series(rows, 'train', 'mfu')
  ([9], [0.25])
  """
  points = [
      (row['step'], row[key])
      for row in rows
      if row.get('kind') == kind and isinstance(row.get(key), int | float)
  ]
  return [step for step, _ in points], [value for _, value in points]


def draw_losses(rows: Rows, curves: Sequence[LossCurve]) -> bytes:
  """Draws losses over the steps; returns a PNG.

  Args:
    rows: of metrics.jsonl.
    curves: each gets a panel.
  """
  figure, panels = _panels([curve.unit for curve in curves])
  for curve, panel in zip(curves, panels, strict=True):
    train, validation = (
        series(rows, kind, curve.metric) for kind in ('train', 'evaluation')
    )
    _plot(panel, *train, _TRAINING, 'training')
    _plot(panel, *validation, _VALIDATION, 'validation')
    if curve.entropy is not None:
      panel.axhline(
          curve.entropy, color=_ENTROPY, linestyle='--', label='unigram entropy'
      )
    panel.set_title(curve.title)
    panel.set_ylabel(f'loss ({curve.unit})')
    panel.legend(frameon=False)
  return _png(figure)


def draw_throughput(rows: Rows) -> bytes:
  """Draws the speed, and MFU where it is known; returns a PNG.

  The speed is target tokens a second, or steps where there are no such tokens.
  """
  mfu = series(rows, 'train', 'mfu')
  figure, panels = _panels(['speed', 'MFU'] if mfu[0] else ['speed'])
  rates = series(rows, 'train', 'target_tokens_per_second')
  has_tokens = any(rates[1])
  if not has_tokens:
    rates = series(rows, 'train', 'steps_per_second')
  _plot(panels[0], *rates, _VALIDATION)
  panels[0].set_title('throughput')
  unit = 'target tokens' if has_tokens else 'steps'
  panels[0].set_ylabel(f'{unit} a second')
  panels[0].set_ylim(bottom=0)
  panels[0].yaxis.set_major_formatter('{x:,.0f}' if has_tokens else '{x:,.3g}')
  if mfu[0]:
    _plot(panels[1], mfu[0], [100 * x for x in mfu[1]], _VALIDATION)
    panels[1].set_title('model FLOPs utilisation (MFU)')
    panels[1].set_ylabel('% of the peak')
    panels[1].set_ylim(bottom=0)
  return _png(figure)


def draw_time(sessions: Sequence[tuple[float, Mapping[str, float]]]) -> bytes:
  """Draws a bar for each session, in its place in time; returns a PNG.

  Args:
    sessions: of each, the seconds from the start of the first one to its own,
      and its seconds by bucket, see training/timeline.py.
  """
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  last, spent = sessions[-1]
  is_long = last + sum(spent.values()) >= 2 * 3600
  unit, size = ('hours', 3600) if is_long else ('minutes', 60)
  # Hundreds of sessions are drawn thin.
  inches = min(1.6 + 0.25 * len(sessions), 8)
  figure = Figure(figsize=(2 * _INCHES[0], inches), layout='constrained')
  panel = figure.add_subplot()
  ends = [start / size for start, _ in sessions]
  numbers = range(1, len(sessions) + 1)
  for bucket, color in _BUCKETS.items():
    widths = [spent.get(bucket, 0.0) / size for _, spent in sessions]
    if any(widths):
      panel.barh(numbers, widths, 0.7, left=ends, color=color, label=bucket)
    ends = [end + width for end, width in zip(ends, widths, strict=True)]
  panel.set_xlabel(f'{unit} since the start')
  panel.set_xlim(left=0)
  panel.set_ylabel('session')
  panel.yaxis.set_major_locator(
      MaxNLocator(10, integer=True, min_n_ticks=1)  # There may be one session.
  )
  panel.set_ylim(len(sessions) + 0.6, 0.4)
  panel.grid(color='#e6e6e6', axis='x')
  panel.set_axisbelow(True)
  panel.spines[['top', 'right']].set_visible(False)
  figure.legend(loc='outside lower center', ncols=4, frameon=False)
  return _png(figure)


def _plot(
    panel: Any,
    steps: Sequence[int],
    values: Sequence[float],
    color: str,
    label: str = '',
) -> None:
  # Few points are shown as such; many would only thicken the line.
  marker = 'o' if len(steps) <= 20 else ''
  panel.plot(steps, values, color=color, label=label, marker=marker, ms=3)


def _panels(units: Sequence[str]) -> tuple['Figure', list[Any]]:
  """A figure of panels over the steps, three in a row.

  Args:
    units: of what each panel shows; those of one unit have one scale.
  """
  from matplotlib.figure import Figure  # Draws to memory; needs no screen.
  from matplotlib.ticker import MaxNLocator

  columns = min(len(units), 3)
  lines = -(-len(units) // columns)
  figure = Figure(
      figsize=(_INCHES[0] * columns, _INCHES[1] * lines), layout='constrained'
  )
  panels = []
  for number, unit in enumerate(units):
    first = units.index(unit)
    panels.append(
        figure.add_subplot(
            lines,
            columns,
            number + 1,
            sharey=panels[first] if first < number else None,
        )
    )
  for panel in panels:
    panel.set_xlabel('step')
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.grid(color='#e6e6e6')
    panel.spines[['top', 'right']].set_visible(False)
  return figure, panels


def _png(figure: 'Figure') -> bytes:
  stream = io.BytesIO()
  figure.savefig(stream, format='png', dpi=_DOTS_PER_INCH)
  return stream.getvalue()
