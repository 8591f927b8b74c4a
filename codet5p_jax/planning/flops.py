"""FLOPs of a training step's matrix products, by arithmetic.

A multiplication and an addition are two. Counted are the projections, attention
scores and values, feed-forward layers, and the output head over the padded
vocabulary. Every position counts, padding included. Causal attention is counted
in full, as in PaLM's MFU (Chowdhery et al. 2022, appendix B): most published
figures do so, and it is what a dense product computes. Norms, softmax, position
biases, rotations and look-ups are not counted.

What a compiled step really does is read in planning/hlo.py.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from codet5p_jax.layers.embedding import padded_vocab_size
from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.computation import Computation, Pass
from codet5p_jax.models.shallow_encoder_deep_decoder import (
    ShallowEncoderDeepDecoderConfig,
)


@dataclasses.dataclass(frozen=True)
class StepFlops:
  """FLOPs of a batch.

  Attributes:
    forward: of the forward pass.
    backward: of the gradients that training needs: of each trainable kernel,
      and of a product's input where something trainable lies below it.
    recomputed: of what the remat policy computes again; no useful work.
  """

  forward: int
  backward: int
  recomputed: int

  @property
  def least(self) -> int:
    """The least that a step can do: the model FLOPs of an MFU."""
    return self.forward + self.backward


def forward_flops(
    config: Any, rows: int, source_length: int, target_length: int
) -> int:
  """FLOPs of a forward pass.

  Args:
    config: of the model.
    rows: of the batch.
    source_length: tokens of a row of the encoder, if there is one.
    target_length: tokens of a row of the decoder.
  """
  passes = (
      Pass('encoder', rows, source_length),
      Pass('decoder', rows, target_length, source_length, writes=True),
  )
  return training_flops(config, passes, (), Computation()).forward


def training_flops(
    config: Any,
    passes: Iterable[Pass],
    trainable: Collection[str],
    computation: Computation,
) -> StepFlops:
  """FLOPs of one batch of an objective, backward included.

  Where all is trained the backward pass makes two products for each of the
  forward pass.

  Args:
    config: of the model. Passes of an encoder that it lacks are no work.
    passes: an objective's `passes(rows)`.
    trainable: paths of the trainable parameters, as `computation` lays out the
      layers.
    computation: decides what is computed again.
  """
  total = [0, 0, 0]
  for each in passes:
    work = _Work(frozenset(trainable if each.is_trained else ()))
    if each.stack == 'encoder':
      _count_encoder(work, config, each.length, computation)
    else:
      # What the decoder looks at was counted with the pass that made it.
      before = _Work(work.trainable)
      encoded = _count_encoder(
          before, config, each.source_length, computation
      )
      _count_decoder(work, config, encoded, each, computation)
    for index, count in enumerate(
        (work.forward, work.backward, work.recomputed)
    ):
      total[index] += 2 * each.rows * count
  return StepFlops(*total)


@dataclasses.dataclass
class _Work:
  """Multiplications of one row so far.

  Each product tells whether its result depends on something trainable, and
  needs to know the same of its inputs.

  Attributes:
    trainable: paths of parameters.
    forward: of the forward pass.
    backward: of the gradients.
    recomputed: of rematerialisation.
    pairs: of the forward pass, those of attention's queries, keys and values.
    joining: of the forward pass, those whose result is only added to the
      residual stream, so that no gradient needs it again.
  """

  trainable: frozenset[str]
  forward: int = 0
  backward: int = 0
  recomputed: int = 0
  pairs: int = 0
  joining: int = 0

  def learns(self, path: str) -> bool:
    """Whether anything below a path is trainable."""
    return any(name.startswith(f'{path}/') for name in self.trainable)

  def product(
      self, kernel: str, multiplications: int, below: bool, joins: bool = False
  ) -> bool:
    """A product with a parameter.

    Args:
      kernel: its path.
      multiplications: of the forward pass.
      below: whether the input depends on something trainable.
      joins: whether the result is only added to the residual stream.

    Returns:
      Whether the result does.
    """
    is_trainable = kernel in self.trainable
    self.forward += multiplications
    self.backward += multiplications * (is_trainable + below)
    self.joining += multiplications * joins
    return is_trainable or below

  def dense(
      self, path: str, multiplications: int, below: bool, joins: bool = False
  ) -> bool:
    """A `Dense`, whose bias may be trainable too."""
    result = self.product(f'{path}/kernel', multiplications, below, joins)
    return result or self.learns(path)

  def pair(self, multiplications: int, left: bool, right: bool) -> bool:
    """A product of two activations."""
    self.forward += multiplications
    self.backward += multiplications * (left + right)
    self.pairs += multiplications
    return left or right

  @contextlib.contextmanager
  def layer(self, remat_policy: str) -> Iterator[None]:
    """What is counted within is a layer under a policy of `REMAT_POLICIES`."""
    before = dataclasses.replace(self)
    yield
    if self.backward == before.backward:
      return
    if remat_policy == 'full':
      self.recomputed += self.forward - before.forward
      self.recomputed -= self.joining - before.joining
    elif remat_policy == 'dots':
      self.recomputed += self.pairs - before.pairs


@dataclasses.dataclass(frozen=True)
class _Sequence:
  """A row's states at some place of the network.

  Attributes:
    length: positions.
    embed: width.
    depends: whether they depend on something trainable.
  """

  length: int
  embed: int
  depends: bool


def _count_encoder(
    work: _Work, config: Any, length: int, computation: Computation
) -> _Sequence | None:
  """What the decoder looks at; None where there is no encoder."""
  if isinstance(config, CodeGenConfig):
    return None
  if isinstance(config, ShallowEncoderDeepDecoderConfig):
    return _composite_encoder(work, config, length, computation)
  return _t5_encoder(work, config, length, computation)


def _count_decoder(
    work: _Work,
    config: Any,
    encoded: _Sequence | None,
    of: Pass,
    computation: Computation,
) -> None:
  if isinstance(config, CodeGenConfig):
    x = _codegen_embeddings(work, 'decoder', config, of.length)
    x = _codegen_layers(work, 'decoder', config, x, computation)
  elif isinstance(config, ShallowEncoderDeepDecoderConfig):
    x = _composite_decoder(work, config, encoded, of.length, computation)
    config = config.decoder
  else:
    x = _t5_decoder(work, config, encoded, of.length, computation)
    if of.writes:
      rows = padded_vocab_size(config.vocab_size)
      table = 'token_embedder/embedding'
      work.product(table, x.length * x.embed * rows, x.depends)
    return
  if of.writes:
    rows = padded_vocab_size(config.vocab_size)
    work.dense('decoder/output_head', x.length * x.embed * rows, x.depends)


def _layer_paths(
    stack: str, num_layers: int, computation: Computation
) -> list[str]:
  if computation.scan_layers:
    return [f'{stack}/layers'] * num_layers
  return [f'{stack}/layers_{i}' for i in range(num_layers)]


def _attention(
    work: _Work,
    path: str,
    width: int,
    queries: _Sequence,
    keys: _Sequence,
    bias_depends: bool = False,
    joins: bool = False,
) -> bool:
  """Attention of `width` = heads * head_dim; whether its result depends."""
  size = queries.length * queries.embed * width
  query = work.dense(f'{path}/query', size, queries.depends)
  key_size = keys.length * keys.embed * width
  key = work.dense(f'{path}/key', key_size, keys.depends)
  value = work.dense(f'{path}/value', key_size, keys.depends)
  pair = queries.length * keys.length * width
  weights = work.pair(pair, query, key) or bias_depends
  mixed = work.pair(pair, weights, value)
  return work.dense(f'{path}/out', size, mixed, joins)


def _mlp(work: _Work, path: str, mlp_dim: int, x: _Sequence) -> bool:
  size = x.length * x.embed * mlp_dim
  hidden = work.dense(f'{path}/wi', size, x.depends)
  return work.dense(f'{path}/wo', size, hidden, joins=True)


def _or(x: _Sequence, depends: bool) -> _Sequence:
  return dataclasses.replace(x, depends=x.depends or depends)


def _t5_layer(
    work: _Work,
    layer: str,
    config: Any,
    x: _Sequence,
    bias: bool,
    attention_norm: str,
    encoded: _Sequence | None = None,
) -> _Sequence:
  """Sub-layers in turn, each with a norm of its own."""
  width = config.num_heads * config.head_dim

  def attend(kind, norm, x, keys, bias_depends=False):
    y = _or(x, work.learns(f'{layer}/{norm}'))
    path = f'{layer}/{kind}'
    return _or(x, _attention(work, path, width, y, keys or y, bias_depends))

  x = attend('self_attention', attention_norm, x, None, bias)
  if encoded is not None:
    norm = 'pre_cross_attention_layer_norm'
    x = attend('cross_attention', norm, x, encoded)
  y = _or(x, work.learns(f'{layer}/pre_mlp_layer_norm'))
  return _or(x, _mlp(work, f'{layer}/mlp', config.mlp_dim, y))


def _t5_encoder(
    work: _Work, config: Any, length: int, computation: Computation
) -> _Sequence:
  depends = 'token_embedder/embedding' in work.trainable
  x = _Sequence(length, config.emb_dim, depends)
  bias = work.learns('encoder/relative_position_bias')
  norm = 'pre_attention_layer_norm'
  for layer in _layer_paths('encoder', config.num_encoder_layers, computation):
    with work.layer(computation.remat_policy):
      x = _t5_layer(work, layer, config, x, bias, norm)
  return _or(x, work.learns('encoder/final_layer_norm'))


def _t5_decoder(
    work: _Work,
    config: Any,
    encoded: _Sequence,
    length: int,
    computation: Computation,
) -> _Sequence:
  depends = 'token_embedder/embedding' in work.trainable
  x = _Sequence(length, config.emb_dim, depends)
  bias = work.learns('decoder/relative_position_bias')
  norm = 'pre_self_attention_layer_norm'
  for layer in _layer_paths('decoder', config.num_decoder_layers, computation):
    with work.layer(computation.remat_policy):
      x = _t5_layer(work, layer, config, x, bias, norm, encoded)
  return _or(x, work.learns('decoder/final_layer_norm'))


def _codegen_embeddings(
    work: _Work, stack: str, config: CodeGenConfig, length: int
) -> _Sequence:
  depends = work.learns(f'{stack}/token_embedder')
  return _Sequence(length, config.emb_dim, depends)


def _codegen_layers(
    work: _Work,
    stack: str,
    config: CodeGenConfig,
    x: _Sequence,
    computation: Computation,
) -> _Sequence:
  for layer in _layer_paths(stack, config.num_layers, computation):
    with work.layer(computation.remat_policy):
      x = _parallel_layer(work, layer, config, x)
  return _or(x, work.learns(f'{stack}/final_layer_norm'))


def _parallel_layer(
    work: _Work,
    path: str,
    config: CodeGenConfig,
    x: _Sequence,
    encoded: _Sequence | None = None,
) -> _Sequence:
  """CodeGen's layer: all branches are of one norm, and added."""
  width = config.num_heads * config.head_dim
  y = _or(x, work.learns(f'{path}/layer_norm'))
  attended = _attention(work, f'{path}/self_attention', width, y, y, joins=True)
  fed = _mlp(work, f'{path}/mlp', config.mlp_dim, y)
  crossed = encoded is not None and _attention(
      work, f'{path}/cross_attention', width, y, encoded, joins=True
  )
  return _or(x, attended or fed or crossed)


def _composite_encoder(
    work: _Work,
    config: ShallowEncoderDeepDecoderConfig,
    length: int,
    computation: Computation,
) -> _Sequence:
  """A shallow encoder, and the map to the width of the decoder."""
  encoder, decoder = config.encoder, config.decoder
  x = _codegen_embeddings(work, 'encoder', encoder, length)
  x = _codegen_layers(work, 'encoder', encoder, x, computation)
  size = length * encoder.emb_dim * decoder.emb_dim
  depends = work.dense('encoder_to_decoder', size, x.depends)
  return _Sequence(length, decoder.emb_dim, depends)


def _composite_decoder(
    work: _Work,
    config: ShallowEncoderDeepDecoderConfig,
    encoded: _Sequence,
    length: int,
    computation: Computation,
) -> _Sequence:
  """A deep decoder, whose last layer attends to the encoder."""
  decoder = config.decoder
  x = _codegen_embeddings(work, 'decoder', decoder, length)
  for layer in _layer_paths('decoder', decoder.num_layers - 1, computation):
    x = _parallel_layer(work, layer, decoder, x)
  x = _parallel_layer(work, 'decoder/last_layer', decoder, x, encoded)
  return _or(x, work.learns('decoder/final_layer_norm'))
