"""transformers' T5 with parameters of ours; skips tests without torch."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

# Our sub-modules of a layer, as transformers numbers and names them.
SUB_LAYERS = {
    'encoder': {
        'pre_attention_layer_norm': '0.layer_norm',
        'self_attention': '0.SelfAttention',
        'pre_mlp_layer_norm': '1.layer_norm',
        'mlp': '1.DenseReluDense',
    },
    'decoder': {
        'pre_self_attention_layer_norm': '0.layer_norm',
        'self_attention': '0.SelfAttention',
        'pre_cross_attention_layer_norm': '1.layer_norm',
        'cross_attention': '1.EncDecAttention',
        'pre_mlp_layer_norm': '2.layer_norm',
        'mlp': '2.DenseReluDense',
    },
}
PROJECTIONS = {
    'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o', 'wi': 'wi', 'wo': 'wo'
}
STACK_PARTS = {
    ('relative_position_bias', 'embedding'): (
        'block.0.layer.0.SelfAttention.relative_attention_bias'
    ),
    ('final_layer_norm', 'scale'): 'final_layer_norm',
}


def as_in_torch(config, tree):
  """Returns a tree of ours, parameters or gradients, as {torch name: array}.

  Takes every leaf or fails with a KeyError, and gives no name twice.
  """
  result = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    keys = [key.key for key in path]
    for name, array in leaf_in_torch(config, keys, np.asarray(leaf)):
      assert name not in result
      result[name] = array
  return result


def leaf_in_torch(config, keys, leaf):
  """Yields the (torch name, array) of a leaf of ours, one for each layer."""
  if keys == ['token_embedder', 'embedding']:
    yield 'shared.weight', leaf[: config.vocab_size]
    return
  stack, part, *keys = keys
  if part != 'layers':
    yield f'{stack}.{STACK_PARTS[part, *keys]}.weight', leaf
    return
  part, *projection, _ = keys
  name = SUB_LAYERS[stack][part]
  if projection:
    (projection,) = projection
    name += '.' + PROJECTIONS[projection]
    # To [layers, outputs, inputs]: heads and their width are one axis.
    last_axis = leaf.shape[-1] if projection == 'out' else -1
    first_axis = -1 if projection == 'out' else leaf.shape[1]
    leaf = leaf.reshape(len(leaf), first_axis, last_axis).swapaxes(1, 2)
  for layer, array in enumerate(leaf):
    yield f'{stack}.block.{layer}.layer.{name}.weight', array


def make_reference(config, params):
  """Returns transformers' model with our parameters."""
  reference = transformers.T5ForConditionalGeneration(
      transformers.T5Config(
          vocab_size=config.vocab_size,
          d_model=config.emb_dim,
          num_heads=config.num_heads,
          d_kv=config.head_dim,
          d_ff=config.mlp_dim,
          num_layers=config.num_encoder_layers,
          num_decoder_layers=config.num_decoder_layers,
          relative_attention_num_buckets=config.relative_attention_num_buckets,
          relative_attention_max_distance=(
              config.relative_attention_max_distance
          ),
          layer_norm_epsilon=config.layer_norm_epsilon,
          pad_token_id=config.pad_id,
          decoder_start_token_id=config.decoder_start_id,
          feed_forward_proj='relu',
          dropout_rate=0.0,
          tie_word_embeddings=True,
          use_cache=False,
          attn_implementation='eager',
      )
  )
  weights = as_in_torch(config, params)
  # `named_parameters` gives tied ones once, as `shared.weight`.
  tensors = dict(reference.named_parameters())
  assert weights.keys() == tensors.keys()
  with torch.no_grad():
    for name, tensor in tensors.items():
      assert tensor.shape == weights[name].shape, name
      tensor.copy_(to_torch(weights[name]))
  assert reference.lm_head.weight is reference.shared.weight
  return reference.eval()


def to_torch(array):
  array = np.array(array)
  if array.dtype == np.int32:
    array = array.astype(np.int64)
  return torch.from_numpy(array)


def run_reference(module, *inputs, **options):
  """Returns the first output of a module of transformers, for arrays."""
  with torch.no_grad():
    output = module(
        *map(to_torch, inputs),
        **{name: to_torch(array) for name, array in options.items()},
    )
  return (output if torch.is_tensor(output) else output[0]).numpy()


def loss_and_gradients(reference, sources, is_token, labels):
  """Returns (logits, mean loss, {torch name: gradient})."""
  output = reference(
      input_ids=to_torch(sources),
      attention_mask=to_torch(is_token),
      labels=to_torch(labels),
  )
  output.loss.backward()
  gradients = {
      name: tensor.grad.numpy()
      for name, tensor in reference.named_parameters()
  }
  return output.logits.detach().numpy(), output.loss.item(), gradients


def position_buckets(relative, bidirectional, num_buckets, max_distance):
  """Returns the bucket of each (key - query) distance."""
  attention = transformers.models.t5.modeling_t5.T5Attention
  return attention._relative_position_bucket(
      torch.from_numpy(relative), bidirectional, num_buckets, max_distance
  ).numpy()


def added_to_logits(mask):
  """Returns a mask of ours as transformers' layers take it."""
  return np.where(mask, 0, np.finfo(np.float32).min).astype(np.float32)
