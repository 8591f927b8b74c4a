"""transformers' CodeGen with parameters of ours; skips tests without torch.

The layout of the fused projection is written down here once more, by hand,
apart from the table that conversion uses.
"""

import jax
import numpy as np
import pytest

from tests.parity.transformers_t5 import to_torch

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

NUM_GROUPS = 4  # `mp_num`: of heads, each with its queries, values and keys.
OUTSIDE_LAYERS = {
    'token_embedder/embedding': 'transformer.wte.weight',
    'final_layer_norm/scale': 'transformer.ln_f.weight',
    'final_layer_norm/bias': 'transformer.ln_f.bias',
    'output_head/kernel': 'lm_head.weight',
    'output_head/bias': 'lm_head.bias',
}


def as_in_torch(config, decoder):
  """Returns our decoder, with stacked layers, as {torch name: array}."""
  decoder = jax.tree.map(np.asarray, decoder)
  result = {}
  for path, name in OUTSIDE_LAYERS.items():
    part, leaf = path.split('/')
    array = decoder[part][leaf]
    # Rows that only pad the vocabulary exist in our tables alone.
    is_table = part in ('token_embedder', 'output_head')
    result[name] = array[: config.vocab_size] if is_table else array
  for i in range(config.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], decoder['layers'])
    attention, mlp = layer['self_attention'], layer['mlp']
    for name, array in {
        'ln_1.weight': layer['layer_norm']['scale'],
        'ln_1.bias': layer['layer_norm']['bias'],
        'attn.qkv_proj.weight': fuse(
            *(attention[name]['kernel'] for name in ('query', 'value', 'key'))
        ),
        'attn.out_proj.weight': merge(attention['out']['kernel']),
        'mlp.fc_in.weight': mlp['wi']['kernel'].T,
        'mlp.fc_in.bias': mlp['wi']['bias'],
        'mlp.fc_out.weight': mlp['wo']['kernel'].T,
        'mlp.fc_out.bias': mlp['wo']['bias'],
    }.items():
      result[f'transformer.h.{i}.{name}'] = array
  return result


def fuse(*kernels):
  """Fuses kernels [embed, heads, kv] to [len(kernels) * heads * kv, embed]."""
  groups = [
      np.split(kernel, NUM_GROUPS, axis=1) for kernel in kernels
  ]
  rows = [
      kernel[group].reshape(kernel[group].shape[0], -1).T
      for group in range(NUM_GROUPS)
      for kernel in groups
  ]
  return np.concatenate(rows)


def merge(kernel):
  """Returns [embed, heads * kv] for [heads, kv, embed]."""
  return kernel.reshape(-1, kernel.shape[-1]).T


def make_reference(config, params):
  """Returns transformers' model with our parameters."""
  reference = transformers.CodeGenForCausalLM(
      transformers.CodeGenConfig(
          vocab_size=config.vocab_size,
          n_positions=128,
          n_ctx=128,
          n_embd=config.emb_dim,
          n_layer=config.num_layers,
          n_head=config.num_heads,
          rotary_dim=config.rotary_dim,
          n_inner=config.mlp_dim,
          activation_function='gelu_new',
          resid_pdrop=0.0,
          embd_pdrop=0.0,
          attn_pdrop=0.0,
          layer_norm_epsilon=config.layer_norm_epsilon,
          tie_word_embeddings=False,
          use_cache=False,
          attn_implementation='eager',
      )
  )
  weights = as_in_torch(config, params['decoder'])
  tensors = dict(reference.named_parameters())
  assert weights.keys() == tensors.keys()
  with torch.no_grad():
    for name, tensor in tensors.items():
      assert tensor.shape == weights[name].shape, name
      tensor.copy_(to_torch(weights[name]))
  return reference.eval()


def rotate(x, positions, rotary_dim):
  """Returns rotated queries [batch, length, heads, rotary_dim]."""
  codegen = transformers.models.codegen.modeling_codegen
  table = codegen.create_sinusoidal_positions(128, rotary_dim)
  sin, cos = torch.chunk(table[to_torch(positions)], 2, dim=-1)
  return codegen.apply_rotary_pos_emb(to_torch(x), sin, cos).numpy()
