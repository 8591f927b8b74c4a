import dataclasses

import jax
import pytest

from codet5p_jax.models.t5 import T5Config
from codet5p_jax.runs.info import info

SMALL = T5Config(32100, 768, 12, 64, 3072, 12, 12)
LARGE = T5Config(32100, 1024, 16, 64, 4096, 24, 24)


def table(output):
  """{part: (parameters, trainable, frozen)} of what was printed."""
  _, _, parts = output.partition('\n\n')
  header, *rows = [line.split() for line in parts.splitlines()]
  assert header == ['part', 'parameters', 'trainable', 'frozen']
  return {
      part: tuple(int(number.replace(',', '')) for number in numbers)
      for part, *numbers in rows
  }


@pytest.mark.parametrize(
    ('model', 'expected'),
    [(SMALL, 222_882_048), (LARGE, 737_639_424)],
    ids=['220m', '770m'],
)
def test_released_models_have_their_number_of_parameters(
    model, expected, capsys
):
  assert info(model) == expected
  output = capsys.readouterr().out
  assert f'{expected:,}' in output
  assert table(output)['total'] == (expected, expected, 0)


def test_parts_add_up_and_tell_what_is_frozen(capsys):
  info(SMALL, trainable=('encoder/.*', '.*/cross_attention/.*'))
  parts = table(capsys.readouterr().out)
  assert list(parts)[-1] == 'total'
  total = parts.pop('total')
  assert total == tuple(map(sum, zip(*parts.values(), strict=True)))
  for parameters, trainable, frozen in parts.values():
    assert trainable + frozen == parameters
  table_size = 32100 * 768
  assert parts['token_embedder'] == (table_size, 0, table_size)
  assert parts['encoder'][2] == 0
  # Four matrices of 768 x 768 in each of 12 layers.
  assert parts['decoder'][1] == 12 * 4 * 768 * 768


def test_what_goes_with_the_model_holds_where_nothing_else_is_said(capsys):
  info(SMALL, model_trainable=('encoder/.*',))
  assert table(capsys.readouterr().out)['decoder'][1] == 0
  info(SMALL, trainable=('decoder/.*',), model_trainable=('encoder/.*',))
  assert table(capsys.readouterr().out)['decoder'][2] == 0


def test_the_sizes_of_the_model_are_printed(capsys):
  info(SMALL)
  sizes, _, _ = capsys.readouterr().out.partition('\n\n')
  printed = dict(line.split(maxsplit=1) for line in sizes.splitlines())
  assert printed == {
      field.name: str(getattr(SMALL, field.name))
      for field in dataclasses.fields(SMALL)
  }


def test_nothing_is_allocated(capsys):
  before = sum(array.nbytes for array in jax.live_arrays())
  huge = dataclasses.replace(SMALL, emb_dim=2**20, mlp_dim=2**22)
  assert info(huge) > 2**44
  after = sum(array.nbytes for array in jax.live_arrays())
  assert after - before < 1000
