import io

import matplotlib.image
import numpy as np
import pytest

from codet5p_jax.training.curves import draw_losses, draw_throughput, series

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


def has_red(png):
  red, green, blue = np.moveaxis(pixels(png)[..., :3], -1, 0)
  return bool(np.any((red > 0.7) & (green < 0.3) & (blue < 0.3)))


def test_a_series_has_the_rows_of_its_kind_that_have_the_number():
  assert series(ROWS, 'train', 'a/loss') == ([3, 9], [5.0, 3.0])
  assert series(ROWS, 'evaluation', 'a/loss') == ([6], [4.5])
  assert series(ROWS, 'train', 'mfu') == ([6], [0.25])
  assert series(ROWS, 'train', 'c/loss') == ([], [])


@pytest.mark.parametrize('names, shape', [('a', (1, 1)), ('ab', (1, 2)),
                                          ('abcd', (2, 3))])
def test_each_objective_has_a_panel_three_in_a_row(names, shape):
  height, width, _ = pixels(draw_losses(ROWS, list(names), {})).shape
  one_height, one_width, _ = pixels(draw_losses(ROWS, ['a'], {})).shape
  assert (height, width) == (one_height * shape[0], one_width * shape[1])


def test_the_unigram_entropy_is_drawn_where_it_is_known():
  assert has_red(draw_losses(ROWS, ['a', 'b'], {'b': 4.2}))
  assert not has_red(draw_losses(ROWS, ['a', 'b'], {}))


def test_utilisation_has_a_panel_where_it_is_known():
  without = [{**row, 'mfu': 'n/a'} for row in ROWS]
  with_mfu, one = (pixels(draw_throughput(r)).shape for r in (ROWS, without))
  assert with_mfu == (one[0], 2 * one[1], one[2])
