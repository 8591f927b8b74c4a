"""The composite in NumPy and float64, one plain loop after the other.

Written from section 4 of the specification, for comparison with classes that
know nothing of it. Takes tensors by the names of released checkpoints.
"""

import numpy as np

CHUNKS = 4


def rows_of_part(part, parts, size, heads):
  """Rows of a fused projection that hold one part, by (head, number within)."""
  head_dim, chunk_size = size // heads, size // CHUNKS
  heads_a_chunk = heads // CHUNKS
  return [
      head // heads_a_chunk * parts * chunk_size
      + part * chunk_size
      + head % heads_a_chunk * head_dim
      + number
      for head in range(heads)
      for number in range(head_dim)
  ]


def normalize(x, tensors, name):
  centred = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
  scaled = centred / deviation * tensors[f'{name}.weight']
  return scaled + tensors[f'{name}.bias']


def rotate(head, rotary_dim):
  """Turns pairs of [length, head_dim] by their positions, from 0."""
  turned = head.copy()
  for position in range(len(head)):
    for i in range(rotary_dim // 2):
      angle = position * 10000 ** (-2 * i / rotary_dim)
      even, odd = head[position, 2 * i], head[position, 2 * i + 1]
      turned[position, 2 * i] = even * np.cos(angle) - odd * np.sin(angle)
      turned[position, 2 * i + 1] = odd * np.cos(angle) + even * np.sin(angle)
  return turned


def attend(query, key, value, heads, rotary_dim, allowed):
  """Of [length, width] each; `allowed` is [queries, keys]."""
  outputs = []
  for q, k, v in zip(*(np.split(x, heads, -1) for x in (query, key, value))):
    scores = rotate(q, rotary_dim) @ rotate(k, rotary_dim).T
    scores = np.where(allowed, scores / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    outputs.append(weights / weights.sum(-1, keepdims=True) @ v)
  return np.concatenate(outputs, -1)


def run_block(x, tensors, name, config, allowed, encoded=None, visible=None):
  size, heads = config['n_embd'], config['n_head']
  parts_of = {3: ('query', 'value', 'key'), 2: ('value', 'key')}

  def project(states, projection, parts):
    weight = tensors[f'{name}.{projection}.qkv_proj.weight']
    return {
        part: states @ weight[rows_of_part(index, parts, size, heads)].T
        for index, part in enumerate(parts_of[parts])
    }

  def finish(projection, query, key, value, allowed):
    merged = attend(query, key, value, heads, config['rotary_dim'], allowed)
    return merged @ tensors[f'{name}.{projection}.out_proj.weight'].T

  u = normalize(x, tensors, f'{name}.ln_1')
  t = u @ tensors[f'{name}.mlp.fc_in.weight'].T
  t = t + tensors[f'{name}.mlp.fc_in.bias']
  gelu = 0.5 * t * (1 + np.tanh(np.sqrt(2 / np.pi) * (t + 0.044715 * t**3)))
  mlp = gelu @ tensors[f'{name}.mlp.fc_out.weight'].T
  x = x + mlp + tensors[f'{name}.mlp.fc_out.bias']
  x = x + finish('attn', **project(u, 'attn', 3), allowed=allowed)
  if encoded is not None:
    query = u @ tensors[f'{name}.crossattention.q_attn.weight'].T
    projected = project(encoded, 'crossattention', 2)
    x = x + finish('crossattention', query, **projected, allowed=visible)
  return x


def run_encoder(tensors, config, ids, mask):
  """States [length, width] of one row; `mask` is 1 for tokens."""
  allowed = np.broadcast_to(mask == 1, (len(ids), len(ids)))
  x = tensors['encoder.wte.weight'][ids]
  for layer in range(config['n_layer']):
    x = run_block(x, tensors, f'encoder.h.{layer}', config, allowed)
  return normalize(x, tensors, 'encoder.ln_f')


def run_composite(tensors, config, ids, mask, decoder_ids, decoder_mask):
  """Logits [target length, vocabulary] of one row."""
  tensors = {name: tensor.astype(float) for name, tensor in tensors.items()}
  encoded = run_encoder(tensors, config['encoder'], ids, mask)
  encoded = encoded @ tensors['enc_to_dec_proj.weight'].T
  encoded = encoded + tensors['enc_to_dec_proj.bias']
  length = len(decoder_ids)
  allowed = np.tri(length, dtype=bool) & (decoder_mask == 1)
  visible = np.broadcast_to(mask == 1, (length, len(ids)))
  decoder, stack = config['decoder'], 'decoder.transformer'
  x = tensors[f'{stack}.wte.weight'][decoder_ids]
  for layer in range(decoder['n_layer']):
    name = f'{stack}.h.{layer}'
    if layer < decoder['n_layer'] - 1:
      x = run_block(x, tensors, name, decoder, allowed)
    else:
      x = run_block(x, tensors, name, decoder, allowed, encoded, visible)
  x = normalize(x, tensors, f'{stack}.ln_f')
  weight, bias = (tensors[f'decoder.lm_head.{x}'] for x in ('weight', 'bias'))
  return x @ weight.T + bias
