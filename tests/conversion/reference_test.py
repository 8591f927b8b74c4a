"""Tests that the reference in NumPy equals the modules of transformers."""

import numpy as np
import pytest

from codet5p_jax.conversion import reference

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

BATCH, LENGTH, SOURCE_LENGTH = 2, 47, 37


def reader(module):
  tensors = module.state_dict()
  return lambda name: tensors[name].numpy()


def draw(*shape):
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def run(module, *inputs, **options):
  with torch.no_grad():
    output = module(
        *map(torch.from_numpy, inputs),
        **{
            name: torch.from_numpy(value)
            if isinstance(value, np.ndarray)
            else value
            for name, value in options.items()
        },
    )
  return (output if torch.is_tensor(output) else output[0]).numpy()


def randomise(module):
  """Gives norms and biases other values than ones and zeros."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in module.parameters():
      parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
  return module.eval()


def assert_close(found, expected):
  scale = max(1, np.max(np.abs(expected)))
  np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


@pytest.fixture(scope='module')
def t5():
  config = transformers.T5Config(
      vocab_size=131, d_model=12, num_heads=5, d_kv=7, d_ff=29, num_layers=2,
      num_decoder_layers=3, relative_attention_num_buckets=16,
      relative_attention_max_distance=20, layer_norm_epsilon=0.03,
      feed_forward_proj='relu', dropout_rate=0.0, use_cache=False,
      attn_implementation='eager',
  )  # fmt: skip
  return randomise(transformers.T5ForConditionalGeneration(config))


@pytest.mark.parametrize('stack', ['encoder', 'decoder'])
def test_t5_stacks_equal_those_of_transformers(t5, stack):
  """Bias, layers, norm; a mask of padding, and cross-attention."""
  config = t5.config.to_dict()
  read = reference.inside(reader(t5), stack)
  is_encoder = stack == 'encoder'
  length = SOURCE_LENGTH if is_encoder else LENGTH
  x, encoded = draw(BATCH, length, 12), draw(BATCH, SOURCE_LENGTH, 12) + 1
  lengths = np.array([[SOURCE_LENGTH], [9]])
  is_token = np.arange(SOURCE_LENGTH) < lengths
  key_bias = reference.added_to_logits(is_token[:, None, None, :])
  options = {'inputs_embeds': x}
  table = 'block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  bias = reference.t5_position_bias(read(table), length, is_encoder, 20)
  if is_encoder:
    bias, cross = bias + key_bias, ()
    options['attention_mask'] = is_token.astype(np.int64)
  else:
    bias = bias + reference.added_to_logits(reference.causal_mask(length))
    cross = (encoded, key_bias)
    options['encoder_hidden_states'] = encoded
    options['encoder_attention_mask'] = is_token.astype(np.int64)
  expected = run(getattr(t5, stack), **options)
  for i in range(2 if is_encoder else 3):
    block = reference.inside(read, f'block.{i}')
    x = reference.t5_block(block, config, x, bias, *cross)
  norm = reference.inside(read, 'final_layer_norm')
  assert_close(reference.t5_norm(norm, x, 0.03), expected)


def test_t5_logits_equal_those_of_transformers(t5):
  hidden = draw(BATCH, LENGTH, 12)
  expected = run(t5.lm_head, hidden * 12**-0.5)
  found = reference.t5_logits(reader(t5), t5.config.to_dict(), hidden)
  assert_close(found, expected)


@pytest.fixture(scope='module')
def codegen():
  config = transformers.CodeGenConfig(
      vocab_size=131, n_positions=64, n_ctx=64, n_embd=80, n_layer=3, n_head=8,
      rotary_dim=6, n_inner=53, layer_norm_epsilon=0.05, use_cache=False,
      attn_implementation='eager',
  )  # fmt: skip
  return randomise(transformers.CodeGenForCausalLM(config))


def test_a_codegen_block_equals_that_of_transformers(codegen):
  x = draw(BATCH, LENGTH, 80)
  mask = reference.causal_mask(LENGTH)
  block = codegen.transformer.h[1]
  expected = run(
      block,
      x,
      attention_mask=reference.added_to_logits(mask),
      position_ids=np.arange(LENGTH)[None],
  )
  found = reference.codegen_block(
      reader(block), codegen.config.to_dict(), x, mask
  )
  assert_close(found, expected)


def test_codegen_logits_equal_those_of_transformers(codegen):
  tokens = np.random.default_rng(0).integers(0, 131, (BATCH, LENGTH))
  found = reference.codegen_logits(
      reader(codegen), codegen.config.to_dict(), tokens
  )
  assert_close(found, run(codegen, tokens))
