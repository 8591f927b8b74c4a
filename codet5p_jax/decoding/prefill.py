"""The prompt, read at once, and what grows out of it token by token."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codet5p_jax.array_typing import Tree
from codet5p_jax.errors import UserError
from codet5p_jax.layers.cache import view_cache

# Keys and values of what the decoder wrote itself; those of the source stay as
# they are, one row for all that comes of it.
_OWN = 'self_attention'


@flax.struct.dataclass
class Prompts:
  """What a batch of prompts is generated from.

  Attributes:
    encoder_input_tokens: [prompts, source_length], padded on the right.
    decoder_input_tokens: [prompts, slots] what the decoder is given, its start
      token first, padded on the right with any token.
    lengths: [prompts] tokens that each row of these has, the start token
      included.
  """

  encoder_input_tokens: Any
  decoder_input_tokens: Any
  lengths: Any


@flax.struct.dataclass
class Continuations:
  """The rows that grow out of prompts, as many of each; at first one.

  Attributes:
    encoder_input_tokens: [prompts, source_length] of the prompts.
    prompt_lengths: [rows] of each row's prompt.
    cache: of the decoder, see layers/cache.py; of the source one row a prompt.
  """

  encoder_input_tokens: Any
  prompt_lengths: Any
  cache: Tree


def read_prompts(
    model: nn.Module,
    params: Tree,
    prompts: Prompts,
) -> tuple[Continuations, Float[Array, 'prompts vocab']]:
  """Runs encoder and decoder over prompts.

  Args:
    model: with layers of their own, not scanned: a cache that is cut by layers
      in a loop would be copied with every token.
    params: its parameters, see `decoding_params`.
    prompts: a batch.

  Returns:
    A row of each, without a place for more, and the logits of the first token
    after it, float32.

  Raises:
    UserError: the model scans its layers.
  """
  if model.computation.scan_layers:
    raise UserError(
        'expected a model with scan_layers=False to generate with, found one '
        'that scans its layers; load it so'
    )
  variables = {'params': params}
  encoded = model.apply(
      variables, prompts.encoder_input_tokens, method='encode'
  )
  hidden, kept = model.apply(
      variables,
      encoded,
      prompts.encoder_input_tokens,
      prompts.decoder_input_tokens,
      method='decode',
      mutable=['cache'],
  )
  rows = jnp.arange(hidden.shape[0])
  last = hidden[rows, prompts.lengths - 1]
  head = model.apply(variables, method='output_head')
  continuations = Continuations(
      prompts.encoder_input_tokens, prompts.lengths, kept['cache']
  )
  return continuations, head.logits(last)


def make_rows(
    continuations: Continuations,
    logits: Float[Array, 'prompts vocab'],
    rows_per_prompt: int,
    max_new_tokens: int,
) -> tuple[Continuations, Float[Array, 'rows vocab']]:
  """Makes rows of prompts that were read, and places for what they generate.

  Args:
    continuations: of `read_prompts`.
    logits: likewise.
    rows_per_prompt: rows that grow out of each, one after the other.
    max_new_tokens: places to make for each row.

  Returns:
    The rows, and the logits of the first token of each.
  """

  def grow(path, array):
    if not _is_own(path):
      return array
    array = jnp.repeat(array, rows_per_prompt, axis=0)
    return jnp.pad(array, ((0, 0), (0, 0), (0, max_new_tokens), (0, 0)))

  continuations = continuations.replace(
      prompt_lengths=jnp.repeat(continuations.prompt_lengths, rows_per_prompt),
      cache=jax.tree_util.tree_map_with_path(grow, continuations.cache),
  )
  return continuations, jnp.repeat(logits, rows_per_prompt, axis=0)


def select_rows(cache: Tree, rows: Int[Array, 'rows']) -> Tree:
  """The cache of some rows in place of all; those of sources stay.

  Args:
    cache: see `Continuations`.
    rows: for each row, which one it goes on from, of the same prompt.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, array: array[rows] if _is_own(path) else array, cache
  )


def _is_own(path: tuple) -> bool:
  return any(getattr(part, 'key', None) == _OWN for part in path)


def next_logits(
    model: nn.Module,
    params: Tree,
    continuations: Continuations,
    tokens: Int[Array, 'rows'],
    step: Int[Array, ''],
    max_new_tokens: int,
) -> tuple[Continuations, Float[Array, 'rows vocab']]:
  """Feeds each row's newest token back; returns the logits of its next one.

  Args:
    model: as in `read_prompts`.
    params: its parameters.
    continuations: the rows.
    tokens: the newest of each.
    step: its number, 0 for the first one generated.
    max_new_tokens: as in `make_rows`.
  """
  [cache_length] = {
      array.shape[2]
      for path, array in jax.tree_util.tree_leaves_with_path(
          continuations.cache
      )
      if _is_own(path)
  }
  view = view_cache(
      continuations.prompt_lengths,
      cache_length - max_new_tokens,
      cache_length,
      step,
  )
  variables = {'params': params, 'cache': continuations.cache}
  hidden, kept = model.apply(
      variables,
      continuations.encoder_input_tokens,
      tokens[:, None],
      view,
      method='decode_step',
      mutable=['cache'],
  )
  head = model.apply({'params': params}, method='output_head')
  continuations = continuations.replace(cache=kept['cache'])
  return continuations, head.logits(hidden[:, 0])


def decoding_params(params: Tree, dtype: str) -> Tree:
  """Parameters in the dtype in which they are used, to be read once a token.

  Products take kernels in the dtype of the computation, and embeddings are
  rounded to it: to do that once gives the same numbers. What is used in
  float32, such as norms and position biases, stays.

  Args:
    params: of a model with layers of their own.
    dtype: of its computation.
  """

  def cast(path, array):
    names = [getattr(part, 'key', None) for part in path]
    is_table = names[-2:] == ['token_embedder', 'embedding']
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    if is_float and (names[-1] == 'kernel' or is_table):
      return array.astype(dtype)
    return array

  return jax.tree_util.tree_map_with_path(cast, params)
