"""A model and batches so small that a step takes milliseconds."""

import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.shallow_encoder_deep_decoder import (
    ShallowEncoderDeepDecoderConfig,
)
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.sequence_to_sequence import SequenceToSequence
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.train_step import StepConfig

# Heads and batch divide by 8; no two axes have the same size.
MODEL = T5Config(
    vocab_size=131,
    emb_dim=24,
    num_heads=8,
    head_dim=4,
    mlp_dim=40,
    num_encoder_layers=2,
    num_decoder_layers=3,
)
PAIRS = SequenceToSequence(
    source_length=11, target_length=9, loss_tile_length=4
)
ROWS = CausalLM(target_length=14)

COMPOSITE = ShallowEncoderDeepDecoderConfig(
    encoder=CodeGenConfig(
        vocab_size=131,
        emb_dim=24,
        num_layers=2,
        num_heads=8,
        head_dim=6,
        rotary_dim=4,
        mlp_dim=40,
    ),
    decoder=CodeGenConfig(
        vocab_size=131,
        emb_dim=32,
        num_layers=4,
        num_heads=16,
        head_dim=10,
        rotary_dim=8,
        mlp_dim=56,
    ),
    pad_id=0,
    eos_id=0,
    decoder_start_id=0,
)
# What is trained of it by default.
SHALLOW = (
    'encoder/.*',
    'encoder_to_decoder/.*',
    'decoder/last_layer/cross_attention/.*',
)
PROMPTED = SequenceToSequence(
    source_length=11,
    target_length=9,
    prompt_to_decoder=True,
    loss_tile_length=4,
)


def step_config(optimizer, **changes) -> StepConfig:
  fields = {
      'model': MODEL,
      'objectives': (PAIRS,),
      'optimizer': optimizer,
      'batch_size': 16,
      'computation': Computation(dtype='float32'),
      'seed': 3,
      **changes,
  }
  return StepConfig(**fields)


def composite_config(optimizer, **changes) -> StepConfig:
  fields = {
      'model': COMPOSITE,
      'objectives': (PROMPTED,),
      'trainable': SHALLOW,
      **changes,
  }
  return step_config(optimizer, **fields)


def batch(config: StepConfig, seed: int, objective=PAIRS):
  """Random rows, each of its own length: {feature: [micro, batch, ...]}."""
  rng = np.random.default_rng(seed)
  shape = (config.num_microbatches, config.microbatch_size)
  spec = objective.batch_spec(config.microbatch_size)
  source_length = spec['encoder_input_tokens'].shape[1]
  target_length = spec['decoder_target_tokens'].shape[1]

  def tokens(length):
    rows = rng.integers(3, MODEL.vocab_size, (config.batch_size, length))
    lengths = rng.integers(length // 2, length + 1, config.batch_size)
    used = np.arange(length) < lengths[:, None]
    return np.where(used, rows, 0).reshape(*shape, length).astype(np.int32)

  targets = tokens(target_length)
  return {
      'encoder_input_tokens': tokens(source_length),
      'decoder_target_tokens': targets,
      'decoder_loss_weights': (targets > 0).astype(np.float32),
  }


def one_device():
  return make_mesh((1, 1, 1), jax.devices()[:1])


def to_numpy(tree):
  return jax.tree.map(np.asarray, tree)


@functools.cache
def _drawn(model, seed):
  """Initial parameters by path."""
  made = model.make_model(Computation(dtype='float32'))
  params = jax.jit(lambda key: nn.unbox(made.init_params(key)))(
      jax.random.key(seed)
  )
  return flax.traverse_util.flatten_dict(to_numpy(params), sep='/')


def initial_state(train_step):
  """As `train_step.init()`, but that parameters are drawn once for all steps.

  Compiling what draws them takes as long as compiling a step.
  """
  frozen = jax.tree.leaves(train_step.abstract_state.frozen_params)
  if any(leaf.dtype != jnp.float32 for leaf in frozen):
    return train_step.init()
  given = _drawn(train_step.config.model, train_step.config.seed)
  # Copies, as they are consumed.
  return train_step.init({k: jnp.array(leaf) for k, leaf in given.items()})


def assert_close(found, expected, tolerance):
  """Relative to each leaf's largest entry."""

  def compare(path, x, y):
    scale = max(np.abs(y).max(), 1e-30)
    worst = np.abs(np.float64(x) - np.float64(y)).max() / scale
    assert worst <= tolerance, f'{jax.tree_util.keystr(path)}: {worst}'

  jax.tree_util.tree_map_with_path(compare, found, expected)
