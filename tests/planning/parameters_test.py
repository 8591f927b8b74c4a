import dataclasses

import jax
import pytest

from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.planning import parameters

# All sizes differ.
TINY = T5Config(
    vocab_size=131,
    emb_dim=12,
    num_heads=5,
    head_dim=7,
    mlp_dim=29,
    num_encoder_layers=3,
    num_decoder_layers=4,
)


@pytest.mark.parametrize(
    ('width', 'heads', 'mlp_dim', 'layers', 'expected'),
    [
        (768, 12, 3072, 12, 222_882_048),
        (1024, 16, 4096, 24, 737_639_424),
    ],
    ids=['220m', '770m'],
)
def test_released_models_have_their_number_of_parameters(
    width, heads, mlp_dim, layers, expected
):
  config = T5Config(32100, width, heads, 64, mlp_dim, layers, layers)
  shapes = parameters.parameter_shapes(config.make_model())
  assert parameters.count(shapes) == expected


def test_scanned_and_unrolled_models_have_the_same_number_of_parameters():
  one, other = (
      parameters.parameter_shapes(
          TINY.make_model(Computation(scan_layers=scan_layers))
      )
      for scan_layers in (True, False)
  )
  assert len(one) < len(other)
  assert parameters.count(one) == parameters.count(other)


def test_paths_and_shapes_are_those_that_checkpoints_and_weights_rely_on():
  shapes = parameters.parameter_shapes(TINY.make_model())
  expected = {
      'token_embedder/embedding': (131, 12),  # The table holds 256 rows.
      'encoder/relative_position_bias/embedding': (32, 5),
      'encoder/layers/pre_attention_layer_norm/scale': (3, 12),
      'encoder/layers/self_attention/query/kernel': (3, 12, 5, 7),
      'decoder/layers/cross_attention/out/kernel': (4, 5, 7, 12),
      'decoder/layers/mlp/wi/kernel': (4, 12, 29),
      'decoder/final_layer_norm/scale': (12,),
  }
  assert expected.items() <= shapes.items()


def test_rows_that_pad_a_head_of_its_own_are_not_counted():
  config = CodeGenConfig(131, 12, 2, 5, 6, 4, 29)
  shapes = parameters.parameter_shapes(config.make_model())
  assert shapes['decoder/output_head/kernel'] == (131, 12)
  assert shapes['decoder/output_head/bias'] == (131,)


def test_nothing_is_allocated(monkeypatch):
  before = len(jax.live_arrays())
  config = dataclasses.replace(TINY, emb_dim=2**20, mlp_dim=2**22)
  shapes = parameters.parameter_shapes(config.make_model())
  assert parameters.count(shapes) > 2**44
  assert len(jax.live_arrays()) <= before + 2  # A key and a token.
