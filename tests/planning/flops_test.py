import jax
import jax.numpy as jnp
import pytest

from codet5p_jax.models.computation import Computation
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.sequence_to_sequence import SequenceToSequence
from codet5p_jax.planning.flops import forward_flops, training_flops


def test_every_product_is_counted_by_hand():
  config = T5Config(
      vocab_size=130,  # Padded to 256.
      emb_dim=10,
      num_heads=3,
      head_dim=2,
      mlp_dim=7,
      num_encoder_layers=1,
      num_decoder_layers=2,
  )
  encoder = (
      4 * 5 * 10 * 6  # Four projections of 5 tokens.
      + 2 * 5 * 5 * 6  # Scores and values.
      + 2 * 5 * 10 * 7  # Feed-forward layer.
  )
  decoder = (
      4 * 4 * 10 * 6  # Self-attention's projections of 4 tokens.
      + 2 * 4 * 4 * 6
      + 2 * 4 * 10 * 6  # Cross-attention's query and output.
      + 2 * 5 * 10 * 6  # Its keys and values, of 5 tokens.
      + 2 * 4 * 5 * 6
      + 2 * 4 * 10 * 7
  )
  head = 4 * 10 * 256
  multiplications = 9 * (encoder + 2 * decoder + head)
  assert forward_flops(config, 9, 5, 4) == 2 * multiplications


@pytest.mark.parametrize('source_length, target_length', [(48, 40), (1, 56)])
def test_the_count_agrees_with_the_compilers(source_length, target_length):
  config = T5Config(
      vocab_size=700,
      emb_dim=96,
      num_heads=5,
      head_dim=24,
      mlp_dim=208,
      num_encoder_layers=2,
      num_decoder_layers=3,
      # Their products with one-hot rows are no model FLOPs.
      relative_attention_num_buckets=4,
  )
  model = config.make_model(Computation(dtype='float32', scan_layers=False))
  rows = 6

  def forward(variables, source, target):
    states = model.apply(variables, source, target)
    head = model.apply(variables, method='output_head')
    return states @ head.kernel.T

  source = jax.ShapeDtypeStruct((rows, source_length), jnp.int32)
  target = jax.ShapeDtypeStruct((rows, target_length), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), source, target)
  compiled = jax.jit(forward).lower(variables, source, target).compile()
  ours = forward_flops(config, rows, source_length, target_length)
  # The compiler counts norms and softmax too: it may only find more.
  assert ours < compiled.cost_analysis()['flops'] < 1.02 * ours


@pytest.mark.parametrize(
    'objective, source_length, target_length',
    [
        (SequenceToSequence(source_length=11, target_length=9), 11, 9),
        (CausalLM(target_length=14), 1, 14),
    ],
)
def test_training_costs_three_forward_passes_of_any_objectives_batch(
    objective, source_length, target_length
):
  config = T5Config(
      vocab_size=131,
      emb_dim=24,
      num_heads=8,
      head_dim=4,
      mlp_dim=40,
      num_encoder_layers=2,
      num_decoder_layers=3,
  )
  forward = forward_flops(config, 13, source_length, target_length)
  assert training_flops(config, objective.batch_spec(13)) == 3 * forward


def test_a_long_row_of_220m_costs_six_flops_per_parameter_and_token():
  config = T5Config(32100, 768, 12, 64, 3072, 12, 12)
  # Without attention's pairs, and each token through one half of the model.
  flops = 3 * forward_flops(config, 1, 1, 1)
  assert flops == pytest.approx(6 * 222_882_048, rel=0.001)
