import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp
import pytest

from codet5p_jax.models.bimodal import BimodalConfig
from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.computation import REMAT_POLICIES, Computation
from codet5p_jax.models.shallow_encoder_deep_decoder import (
    ShallowEncoderDeepDecoderConfig,
)
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.sequence_to_sequence import SequenceToSequence
from codet5p_jax.planning.flops import forward_flops, training_flops
from codet5p_jax.planning.hlo import matmul_flops
from codet5p_jax.planning.parameters import parameter_shapes
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.optimizers import SGD
from codet5p_jax.training.train_step import (
    StepConfig,
    make_train_step,
    step_batch_spec,
)

T5 = T5Config(
    vocab_size=131,
    emb_dim=24,
    num_heads=8,
    head_dim=4,
    mlp_dim=40,
    num_encoder_layers=2,
    num_decoder_layers=3,
    # Their products with one-hot rows are no model FLOPs.
    relative_attention_num_buckets=4,
)
CODEGEN = CodeGenConfig(
    vocab_size=130,  # Padded to 256.
    emb_dim=12,
    num_layers=3,
    num_heads=2,
    head_dim=8,
    rotary_dim=4,
    mlp_dim=20,
)
COMPOSITE = ShallowEncoderDeepDecoderConfig(
    encoder=dataclasses.replace(
        CODEGEN, emb_dim=10, num_layers=2, num_heads=3, head_dim=6, mlp_dim=14
    ),
    decoder=CODEGEN,
)
SHALLOW = (
    'encoder/.*',
    'encoder_to_decoder/.*',
    'decoder/last_layer/cross_attention/.*',
)


def test_every_product_of_t5_is_counted_by_hand():
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


# Of a row of 5 source and 7 target tokens.
ENCODER = 2 * (4 * 5 * 10 * 18 + 2 * 5 * 5 * 18 + 2 * 5 * 10 * 14)
BRIDGE = 5 * 10 * 12
DECODER = 3 * (4 * 7 * 12 * 16 + 2 * 7 * 7 * 16 + 2 * 7 * 12 * 20)
QUERY, KEY, PAIRS = 7 * 12 * 16, 5 * 12 * 16, 7 * 5 * 16
HEAD = 7 * 12 * 256


def test_every_product_of_the_composite_is_counted_by_hand():
  cross = 2 * QUERY + 2 * KEY + 2 * PAIRS
  assert forward_flops(COMPOSITE, 9, 5, 7) == 2 * 9 * (
      ENCODER + BRIDGE + DECODER + cross + HEAD
  )
  assert forward_flops(CODEGEN, 9, 1, 7) == 2 * 9 * (DECODER + HEAD)


def paths(config, patterns, computation=Computation()):
  """Parameters that these patterns choose."""
  import re

  return {
      path
      for path in parameter_shapes(config.make_model(computation))
      if any(re.fullmatch(pattern, path) for pattern in patterns)
  }


def test_frozen_parts_of_the_composite_cost_their_forward_pass_alone():
  objective = SequenceToSequence(5, 7, prompt_to_decoder=True)
  flops = training_flops(
      COMPOSITE,
      objective.passes(9),
      paths(COMPOSITE, SHALLOW),
      Computation(remat_policy='full'),
  )
  assert flops.forward == forward_flops(COMPOSITE, 9, 5, 7)
  backward = (
      2 * ENCODER
      + 2 * BRIDGE
      + QUERY  # The kernel's gradient; the trunk needs none.
      + 2 * 2 * KEY
      + 2 * 2 * PAIRS
      + 2 * QUERY  # The output projection.
      + HEAD  # The states' gradient; the kernel needs none.
  )
  assert flops.backward == 2 * 9 * backward
  assert flops.least == flops.forward + flops.backward
  # What is only added to the stream need not be computed again.
  joining = 2 * (5 * 10 * 18 + 5 * 10 * 14)
  assert flops.recomputed == 2 * 9 * (ENCODER - joining)


@pytest.mark.parametrize('config', [T5, CODEGEN, COMPOSITE])
@pytest.mark.parametrize(
    'objective',
    [SequenceToSequence(source_length=11, target_length=9),
     CausalLM(target_length=14)],
)  # fmt: skip
def test_what_is_trained_whole_costs_three_forward_passes(config, objective):
  spec = objective.batch_spec(13)
  source = spec['encoder_input_tokens'].shape[1]
  target = spec['decoder_target_tokens'].shape[1]
  flops = training_flops(
      config, objective.passes(13), paths(config, ['.*']), Computation()
  )
  assert flops.recomputed == 0
  assert flops.least == 3 * forward_flops(config, 13, source, target)


def test_a_long_row_of_220m_costs_six_flops_per_parameter_and_token():
  config = T5Config(32100, 768, 12, 64, 3072, 12, 12)
  # Without attention's pairs, and each token through one half of the model.
  flops = 3 * forward_flops(config, 1, 1, 1)
  assert flops == pytest.approx(6 * 222_882_048, rel=0.001)


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


def compiled_and_planned(config, objective, trainable, computation):
  """FLOPs of a real step, as compiled for the CPU and as counted by us."""
  step_config = StepConfig(
      model=config,
      objectives=(objective,),
      optimizer=SGD(1.0),
      batch_size=6,
      trainable=trainable,
      computation=computation,
  )
  mesh = make_mesh((1, 1, 1), jax.devices()[:1])
  train_step = make_train_step(step_config, mesh)
  batch = step_batch_spec(step_config, train_step, {objective.name: 1})
  compiled = train_step.step.lower(train_step.abstract_state, batch).compile()
  planned = training_flops(
      config,
      objective.passes(6),
      flax.traverse_util.flatten_dict(
          train_step.abstract_state.params, sep='/'
      ),
      computation,
  )
  return matmul_flops(compiled.as_text()), planned


@pytest.mark.parametrize(
    ('remat_policy', 'scan_layers'),
    [*((policy, True) for policy in REMAT_POLICIES), ('full', False)],
)
def test_a_compiled_composite_does_the_least_and_what_is_named(
    remat_policy, scan_layers
):
  objective = SequenceToSequence(
      5, 8, prompt_to_decoder=True, loss_tile_length=4
  )
  compiled, planned = compiled_and_planned(
      COMPOSITE,
      objective,
      SHALLOW,
      Computation('float32', 0.0, remat_policy, scan_layers),
  )
  assert (planned.recomputed > 0) == (remat_policy != 'none')
  assert compiled == planned.least + planned.recomputed


@pytest.mark.parametrize(
    'trainable',
    [('.*',), ('encoder/.*',), ('decoder/.*cross_attention/.*',),
     ('decoder/.*layer_norm/.*',)],
)  # fmt: skip
def test_a_compiled_t5_of_which_some_is_frozen_does_little_more(trainable):
  objective = SequenceToSequence(7, 8, loss_tile_length=4)
  compiled, planned = compiled_and_planned(
      T5, objective, trainable, Computation('float32', 0.0, 'none', False)
  )
  # Products of one-hot rows with the tables of position biases.
  buckets = 2 * 2 * T5.relative_attention_num_buckets * T5.num_heads
  biases = buckets * (7 * 7 + 8 * 8)
  assert planned.least < compiled <= planned.least + biases


def test_a_compiled_step_of_stage_2_does_the_least():
  """The slow encoder has no backward pass; heads are next to nothing."""
  config = BimodalConfig(
      **dataclasses.asdict(T5), projection_dim=2, initial_temperature=0.1
  )
  objective = Bimodal(9, 13, queue_size=6, loss_tile_length=4)
  compiled, planned = compiled_and_planned(
      config, objective, ['.*'], Computation('float32', 0.0, 'none', False)
  )
  assert 1 <= compiled / planned.least < 1.03


def test_an_encoder_without_gradient_is_counted_forward_only():
  objective = Bimodal(9, 13, queue_size=6, losses=('contrastive',))
  config = BimodalConfig(**dataclasses.asdict(T5), initial_temperature=0.1)
  flops = training_flops(
      config,
      objective.passes(6),
      paths(config, ['.*']),
      Computation('float32'),
  )
  # With a target of no tokens, but for keys and values of the source.
  keys_and_values = 2 * 6 * 3 * 2 * (9 + 13) * 24 * 32
  encoders = sum(forward_flops(T5, 6, length, 0) for length in (9, 13))
  encoders -= keys_and_values
  assert flops.forward == 2 * encoders
  assert flops.backward == 2 * encoders
