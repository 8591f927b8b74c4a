"""Greedy decoding: the likeliest token, again and again."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from codet5p_jax.array_typing import Tokens, Tree


@functools.partial(jax.jit, static_argnums=(0, 4))
def greedy_decode(
    model: nn.Module,
    params: Tree,
    encoder_input_tokens: Int[Array, 'batch kv_length'],
    prompt: Tokens,
    eos_id: int,
) -> Tokens:
  """Continues each row's prompt until the end token or the end of the row.

  The decoder runs over the whole row for every token: simple, and right for
  any model, at a cost that grows with the square of the length.

  Args:
    model: with `encode`, `decode` and `output_head`.
    params: its parameters.
    encoder_input_tokens: the source.
    prompt: decoder input tokens [batch, length], the decoder's start token
      first; -1 marks what is to be generated.
    eos_id: generation of a row ends with this token.

  Returns:
    The prompt with every -1 that follows it replaced by the generated token;
    after the end token, -1 remains.
  """
  variables = {'params': params}
  encoded = model.apply(variables, encoder_input_tokens, method='encode')
  head = model.apply(variables, method='output_head')
  length = prompt.shape[1]
  rows = jnp.arange(prompt.shape[0])

  def unfinished(carry):
    tokens, position, done = carry
    return (position < length) & ~jnp.all(done)

  def extend(carry):
    tokens, position, done = carry
    hidden = model.apply(
        variables,
        encoded,
        encoder_input_tokens,
        jnp.maximum(tokens, 0),
        method='decode',
    )
    token = jnp.argmax(head.logits(hidden[rows, position - 1]), axis=-1)
    given = tokens[:, position]
    token = jnp.where(given >= 0, given, jnp.where(done, -1, token))
    # An end token within the prompt ends nothing.
    done = done | ((given < 0) & (token == eos_id))
    return tokens.at[:, position].set(token), position + 1, done

  # Positions before the shortest prompt's end hold nothing to generate.
  first = jnp.maximum(jnp.min(jnp.sum(prompt >= 0, axis=1)), 1)
  done = jnp.zeros(prompt.shape[0], bool)
  tokens, _, _ = jax.lax.while_loop(unfinished, extend, (prompt, first, done))
  return tokens
