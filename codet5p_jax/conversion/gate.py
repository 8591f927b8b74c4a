"""Compares a model before and after conversion, one module at a time.

Theirs is `reference`, NumPy that knows only their names; ours are the layers
that train, with the weights as they lie on disk. Both get the same random
inputs. Neither model is ever whole in memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codet5p_jax.array_typing import Tree
from codet5p_jax.conversion import reference
from codet5p_jax.conversion.huggingface_folder import HuggingFaceFolder
from codet5p_jax.errors import UserError
from codet5p_jax.layers.dense import Dense
from codet5p_jax.layers.embedding import OutputHead
from codet5p_jax.layers.normalization import LayerNorm, RMSNorm
from codet5p_jax.layers.positions import RelativePositionBias
from codet5p_jax.models import codegen, shallow_encoder_deep_decoder, t5
from codet5p_jax.models.computation import Computation
from codet5p_jax.training.checkpoints.layout import nest

# Largest difference of a module's outputs, in multiples of the largest output
# if that is more than 1.
TOLERANCE = 1e-4

_BATCH, _LENGTH, _SOURCE_LENGTH = 2, 5, 7
_COMPUTATION = Computation(dtype='float32')

Read = Callable[[str], np.ndarray]
# The module's name at Hugging Face, our output, theirs.
Outputs = Iterator[tuple[str, np.ndarray, np.ndarray]]


def compare_modules(
    folder: HuggingFaceFolder, read_theirs: Read, read_ours: Read
) -> float:
  """Compares all modules of a model in both layouts.

  Args:
    folder: in Hugging Face's layout; says what the modules are.
    read_theirs: (name in the table) -> tensor.
    read_ours: (our path) -> leaf.

  Returns:
    The largest difference of a module's outputs.

  Raises:
    UserError: a module's outputs differ by more than `TOLERANCE`.
  """
  modules = {
      't5': _t5,
      'codet5p_bimodal': _t5,
      'codet5p_embedding': _t5,
      'codegen': _codegen,
      'codet5p': _composite,
  }[folder.family.model_type]
  worst = 0.0
  with jax.default_matmul_precision('highest'):
    for name, found, expected in modules(
        _Sides(folder, read_theirs, read_ours)
    ):
      scale = max(1.0, float(np.max(np.abs(expected))))
      difference = float(np.max(np.abs(found - expected))) / scale
      # Written so that NaN fails.
      if not difference <= TOLERANCE:
        raise UserError(
            f'expected {name} to compute the same after conversion, found '
            f'outputs that differ by {difference:.2g} where {TOLERANCE:g} is '
            f'allowed; nothing was written: report this with the name of the '
            f'model'
        )
      worst = max(worst, difference)
  return worst


@dataclasses.dataclass(frozen=True)
class _Sides:
  """Reads both sides.

  Attributes:
    folder: see `compare_modules`.
    read_theirs: likewise.
    read_ours: likewise.
    config: their config.json, complete.
  """

  folder: HuggingFaceFolder
  read_theirs: Read
  read_ours: Read

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    # What the file says stands: a field that was misread must be noticed.
    folder = self.folder
    return _complete(folder.config, folder.family.write_config(folder.model))

  def theirs(self, name: str) -> np.ndarray:
    """Returns one of their tensors in float32."""
    return self.read_theirs(name).astype(np.float32)

  def params(self, module: str) -> Tree:
    """Returns our parameters of the module at a path."""
    prefix = f'{module}/'
    return nest({
        path.removeprefix(prefix): self.read_ours(path)
        for path in self.folder.shapes
        if path.startswith(prefix)
    })

  def embeddings(
      self, name: str, path: str, vocab_size: int
  ) -> tuple[str, np.ndarray, np.ndarray]:
    """Compares some rows of a table, the first and last among them."""
    drawn = np.random.default_rng(0).integers(0, vocab_size, 14)
    tokens = np.array([0, *drawn, vocab_size - 1])
    found, expected = (
        read(table)[tokens].astype(np.float32)
        for read, table in ((self.read_ours, path), (self.read_theirs, name))
    )
    return name, found, expected


def _complete(
    config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the fields of `defaults` as config.json has them, if it does."""
  completed = {}
  for name, default in defaults.items():
    value = config.get(name)
    if isinstance(default, Mapping):
      completed[name] = _complete(value, default)
    else:
      completed[name] = default if value is None else value
  return completed


@functools.partial(jax.jit, static_argnums=0)
def _apply(module: Any, params: Tree, inputs: tuple[Any, ...]) -> jax.Array:
  output = module.apply({'params': params}, *inputs)
  return output[0] if isinstance(output, tuple) else output


@functools.partial(jax.jit, static_argnums=0)
def _apply_layer(
    module: Any, params: Tree, inputs: tuple[Any, ...]
) -> jax.Array:
  output = module.apply({'params': params}, *inputs, True)  # deterministic
  return output[0] if isinstance(output, tuple) else output


def _run(module: Any, params: Tree, *inputs: Any) -> np.ndarray:
  """Returns a module's output; all of its kind are compiled once."""
  # Waits for it, so that the two sides never need memory together.
  return np.asarray(_apply(module, params, inputs))


def _run_layer(module: Any, params: Tree, *inputs: Any) -> np.ndarray:
  """As `_run`, of a layer, whose last argument is `deterministic`."""
  return np.asarray(_apply_layer(module, params, inputs))


_apply_head = jax.jit(OutputHead.logits)


def _logits(head: OutputHead, hidden: np.ndarray) -> np.ndarray:
  return np.asarray(_apply_head(head, hidden))


def _draw(*shape: int) -> np.ndarray:
  """Returns numbers of order one; equal shapes give equal numbers."""
  return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def _source_is_token() -> np.ndarray:
  """True where a source has a token; rows of 7 and of 3 tokens."""
  lengths = np.array([_SOURCE_LENGTH, 3])
  return np.arange(_SOURCE_LENGTH)[None] < lengths[:, None]


def _t5(sides: _Sides) -> Outputs:
  config, model = sides.config, sides.folder.model
  yield from _t5_table(sides)
  source_mask = _source_is_token()[:, None, None, :]
  stacks = {
      'encoder': (t5.EncoderLayer, _SOURCE_LENGTH, model.num_encoder_layers),
      'decoder': (t5.DecoderLayer, _LENGTH, model.num_decoder_layers),
  }
  encoded = _draw(_BATCH, _SOURCE_LENGTH, model.emb_dim)
  for stack, (layer, length, num_layers) in stacks.items():
    if not num_layers:
      continue
    is_encoder = stack == 'encoder'
    table = f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias'
    # Further apart than the farthest bucket begins.
    far = model.relative_attention_max_distance + 8
    position = np.arange(far)[None]
    found = _run(
        RelativePositionBias(
            model.num_heads,
            model.relative_attention_num_buckets,
            model.relative_attention_max_distance,
            bidirectional=is_encoder,
            init_stddev=1.0,
        ),
        sides.params(f'{stack}/relative_position_bias'),
        position,
        position,
    )
    expected = reference.t5_position_bias(
        sides.theirs(f'{table}.weight'),
        far,
        is_encoder,
        config['relative_attention_max_distance'],
    )
    yield table, found, expected

    bias = expected[..., :length, :length]
    x = _draw(_BATCH, length, model.emb_dim)
    if is_encoder:
      mask, inputs, cross = source_mask, (), ()
    else:
      mask, cross_mask = reference.causal_mask(length), source_mask
      inputs = (encoded,)
      cross = (encoded, reference.added_to_logits(cross_mask))
    masks = (mask,) if is_encoder else (mask, cross_mask)
    module = layer(model, _COMPUTATION)
    for i in range(num_layers):
      params = sides.params(f'{stack}/layers_{i}')
      found = _run_layer(module, params, x, *inputs, bias, *masks)
      block = f'{stack}.block.{i}'
      yield block, found, reference.t5_block(
          reference.inside(sides.theirs, block),
          config,
          x,
          bias + reference.added_to_logits(mask),
          *cross,
      )
    module = RMSNorm(model.layer_norm_epsilon, 'float32')
    norm = f'{stack}.final_layer_norm'
    found = _run(module, sides.params(f'{stack}/final_layer_norm'), x)
    yield norm, found, reference.t5_norm(
        reference.inside(sides.theirs, norm), x, config['layer_norm_epsilon']
    )
  for name, path in (('proj', 'projection'), ('itm_head', 'matching_head')):
    if f'{path}/bias' in sides.folder.shapes:
      yield _linear(sides, name, path, model.emb_dim)


def _t5_table(sides: _Sides) -> Outputs:
  """The table, as embeddings and, where there is a decoder, as head."""
  model, path = sides.folder.model, 'token_embedder/embedding'
  yield sides.embeddings('shared.weight', path, model.vocab_size)
  if model.num_decoder_layers:
    hidden = _draw(_BATCH, _LENGTH, model.emb_dim)
    kernel = jnp.asarray(sides.read_ours(path))
    head = OutputHead(kernel, model.emb_dim**-0.5, model.vocab_size)
    found = _logits(head, hidden)
    expected = reference.t5_logits(sides.theirs, sides.config, hidden)
    yield 'lm_head', found, expected


def _linear(
    sides: _Sides, name: str, path: str, width: int
) -> tuple[str, np.ndarray, np.ndarray]:
  """A map with bias of vectors of this width."""
  x = _draw(_BATCH, width)
  (features,) = sides.folder.shapes[f'{path}/bias'].shape
  dense = Dense((features,), ('embed', 'mlp'), 1.0, bias_axes=('mlp',))
  found = _run(dense, sides.params(path), x)
  return name, found, reference.linear(reference.inside(sides.theirs, name), x)


def _codegen(sides: _Sides) -> Outputs:
  config, model = sides.config, sides.folder.model
  mask = reference.causal_mask(_LENGTH)
  yield from _codegen_stack(
      sides, config, model, 'transformer', 'decoder', mask
  )
  yield _codegen_head(sides, model, 'lm_head')


def _composite(sides: _Sides) -> Outputs:
  config, model = sides.config, sides.folder.model
  mask, cross_mask = reference.causal_mask(_LENGTH), _source_is_token()
  cross_mask = cross_mask[:, None, None, :]
  yield from _codegen_stack(
      sides, config['encoder'], model.encoder, 'encoder', 'encoder', cross_mask
  )
  yield _linear(
      sides, 'enc_to_dec_proj', 'encoder_to_decoder', model.encoder.emb_dim
  )
  decoder = 'decoder.transformer'
  yield from _codegen_stack(
      sides, config['decoder'], model.decoder, decoder, 'decoder', mask
  )

  name = f'{decoder}.h.{model.decoder.num_layers - 1}'
  x = _draw(_BATCH, _LENGTH, model.decoder.emb_dim)
  encoded = _draw(_BATCH, _SOURCE_LENGTH, model.decoder.emb_dim)
  layer = shallow_encoder_deep_decoder.LastLayer(model.decoder, _COMPUTATION)
  found = _run_layer(
      layer,
      sides.params('decoder/last_layer'),
      x,
      encoded,
      np.arange(_LENGTH)[None],
      np.arange(_SOURCE_LENGTH)[None],
      mask,
      cross_mask,
  )
  block = reference.inside(sides.theirs, name)
  yield name, found, reference.codegen_block(
      block, config['decoder'], x, mask, encoded, cross_mask
  )
  yield _codegen_head(sides, model.decoder, 'decoder.lm_head')


def _codegen_stack(
    sides: _Sides,
    config: Mapping[str, Any],
    model: codegen.CodeGenConfig,
    name: str,
    path: str,
    mask: np.ndarray,
) -> Outputs:
  """Embeddings, plain layers and the final norm of a stack."""
  yield sides.embeddings(
      f'{name}.wte.weight',
      f'{path}/token_embedder/embedding',
      model.vocab_size,
  )
  read = reference.inside(sides.theirs, name)
  length = mask.shape[-1]
  x = _draw(_BATCH, length, model.emb_dim)
  layer = codegen.Layer(model, _COMPUTATION)
  for i in range(model.num_layers):
    if not (params := sides.params(f'{path}/layers_{i}')):
      continue  # The composite's last layer, which has another form.
    found = _run_layer(layer, params, x, np.arange(length)[None], mask)
    block = reference.inside(read, f'h.{i}')
    expected = reference.codegen_block(block, config, x, mask)
    yield f'{name}.h.{i}', found, expected
  norm = LayerNorm(model.layer_norm_epsilon, 'float32')
  found = _run(norm, sides.params(f'{path}/final_layer_norm'), x)
  yield f'{name}.ln_f', found, reference.layer_norm(
      reference.inside(read, 'ln_f'), x, config['layer_norm_epsilon']
  )


def _codegen_head(
    sides: _Sides, model: codegen.CodeGenConfig, name: str
) -> tuple[str, np.ndarray, np.ndarray]:
  hidden = _draw(_BATCH, _LENGTH, model.emb_dim)
  head = OutputHead(
      jnp.asarray(sides.read_ours('decoder/output_head/kernel')),
      1.0,
      model.vocab_size,
      bias=jnp.asarray(sides.read_ours('decoder/output_head/bias')),
  )
  found = _logits(head, hidden)
  read = reference.inside(sides.theirs, name)
  return name, found, reference.linear(read, hidden)
