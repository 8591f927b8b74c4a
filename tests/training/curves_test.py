import io

import matplotlib.image
import numpy as np
import pytest

from codet5p_jax.training import curves
from codet5p_jax.training.curves import (
    LossCurve,
    draw_losses,
    draw_throughput,
    draw_time,
    series,
)
from codet5p_jax.training.timeline import BUCKETS, LOST_WORK

ROWS = [
    {'step': 3, 'kind': 'train', 'a/loss': 5.0, 'mfu': 'n/a'},
    {'step': 6, 'kind': 'train', 'b/loss': 4.0, 'mfu': 0.25},
    {'step': 6, 'kind': 'evaluation', 'a/loss': 4.5, 'b/loss': 4.75},
    {
        'step': 9,
        'kind': 'train',
        'a/loss': 3.0,
        'target_tokens_per_second': 80.0,
    },
]


def pixels(png):
  return matplotlib.image.imread(io.BytesIO(png), format='png')


@pytest.fixture
def drawn(monkeypatch):
  """The figures that were drawn."""
  figures = []

  def keep(figure):
    figures.append(figure)
    return b''

  monkeypatch.setattr(curves, '_png', keep)
  return figures


def has_red(png):
  red, green, blue = np.moveaxis(pixels(png)[..., :3], -1, 0)
  return bool(np.any((red > 0.7) & (green < 0.3) & (blue < 0.3)))


def test_a_series_has_the_rows_of_its_kind_that_have_the_number():
  assert series(ROWS, 'train', 'a/loss') == ([3, 9], [5.0, 3.0])
  assert series(ROWS, 'evaluation', 'a/loss') == ([6], [4.5])
  assert series(ROWS, 'train', 'mfu') == ([6], [0.25])
  assert series(ROWS, 'train', 'c/loss') == ([], [])


def curves_of(names, units='n' * 9, entropies={}):
  return [
      LossCurve(f'{name}/loss', name, unit, entropies.get(name))
      for name, unit in zip(names, units)
  ]


@pytest.mark.parametrize('names, shape', [('a', (1, 1)), ('ab', (1, 2)),
                                          ('abcd', (2, 3))])
def test_each_loss_has_a_panel_three_in_a_row(names, shape):
  height, width, _ = pixels(draw_losses(ROWS, curves_of(names))).shape
  one_height, one_width, _ = pixels(draw_losses(ROWS, curves_of('a'))).shape
  assert (height, width) == (one_height * shape[0], one_width * shape[1])


def test_the_unigram_entropy_is_drawn_where_it_is_known():
  assert has_red(draw_losses(ROWS, curves_of('ab', entropies={'b': 4.2})))
  assert not has_red(draw_losses(ROWS, curves_of('ab')))


def test_losses_of_one_unit_have_one_scale_and_their_unit_is_told(drawn):
  draw_losses(ROWS, curves_of('abc', ['nats', 'nats a pair', 'nats']))
  a, b, c = drawn.pop().axes
  assert [panel.get_title() for panel in (a, b, c)] == ['a', 'b', 'c']
  assert b.get_ylabel() == 'loss (nats a pair)'
  assert a.get_ylim() == c.get_ylim() != b.get_ylim()


def test_without_target_tokens_the_speed_is_told_in_steps(drawn):
  rows = [{'step': 3, 'kind': 'train', 'steps_per_second': 7.5}]
  for row, unit, shown in (
      ({'target_tokens_per_second': 0.0}, 'steps a second', 7.5),
      ({'target_tokens_per_second': 80.0}, 'target tokens a second', 80.0),
  ):
    draw_throughput([rows[0] | row])
    [panel] = drawn.pop().axes
    assert panel.get_ylabel() == unit
    assert panel.lines[0].get_ydata().tolist() == [shown]


def test_utilisation_has_a_panel_where_it_is_known():
  without = [{**row, 'mfu': 'n/a'} for row in ROWS]
  with_mfu, one = (pixels(draw_throughput(r)).shape for r in (ROWS, without))
  assert with_mfu == (one[0], 2 * one[1], one[2])


def test_every_bucket_has_a_colour_of_its_own():
  assert [*curves._BUCKETS] == [*BUCKETS, LOST_WORK]
  assert len(set(curves._BUCKETS.values())) == len(curves._BUCKETS)


def test_lost_work_is_drawn_red():
  spent = dict.fromkeys(BUCKETS, 30.0)
  kept = [(0.0, spent), (500.0, spent)]
  assert not has_red(draw_time(kept))
  assert has_red(draw_time([*kept, (1000.0, {**spent, LOST_WORK: 200.0})]))


def test_sessions_stand_where_they_were_in_time(drawn):
  for size, unit in ((60, 'minutes'), (3600, 'hours')):
    session = {'startup': 2.0 * size, 'step': 5.0 * size}
    draw_time([(0.0, session), (9.0 * size, session)])
    [panel] = drawn.pop().axes
    assert panel.get_xlabel() == f'{unit} since the start'
    bars = {
        (bar.get_x(), bar.get_width(), round(bar.get_y() + 0.35))
        for bar in panel.patches
    }
    assert bars == {(0, 2, 1), (2, 5, 1), (9, 2, 2), (11, 5, 2)}
  for count in (1, 3, 40):
    draw_time([(9.0 * number, session) for number in range(count)])
    [panel] = drawn.pop().axes
    assert all(tick == int(tick) for tick in panel.get_yticks())


def test_many_sessions_are_drawn_thin():
  session = {'step': 1.0}
  heights = [
      pixels(draw_time([(2.0 * n, session) for n in range(count)])).shape[0]
      for count in (1, 5, 30, 60)
  ]
  assert heights[0] < heights[1] < heights[2] == heights[3]
