"""Where in the caches of a decoder its next tokens go, and what they see.

A cache has a place for every token of a row: first those of the prompt, which
all rows keep in as many places, whatever the length of their own; then, in the
same place of all rows, each token that is generated:

    row 0   p p p p p . . g g g
    row 1   p p . . . . . g g g
    slot    0 1 2 3 4 5 6 7 8 9

So a new token is written to one slot of the whole batch, and places that hold
none are never seen. Rows need not begin at the same place of a text, nor be
padded on the left: positions are told apart from slots.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Int


@flax.struct.dataclass
class CacheView:
  """What one step of decoding sees.

  Attributes:
    slot: where the keys and values of the new token go.
    positions: [batch, 1] of the new token, in its row.
    key_positions: [batch, cache_length] of what each slot holds.
    is_seen: [batch, cache_length] whether the new token attends to a slot, its
      own included.
  """

  slot: Any
  positions: Any
  key_positions: Any
  is_seen: Any


def view_cache(
    prompt_lengths: Int[Array, 'batch'],
    prompt_slots: int,
    cache_length: int,
    step: Int[Array, ''],
) -> CacheView:
  """What the generated token number `step` sees, once it is fed back.

  Args:
    prompt_lengths: tokens of each row's prompt, the start token included.
    prompt_slots: places that every row has for its prompt.
    cache_length: all places of a row.
    step: 0 for the first token after the prompt.
  """
  slots = jnp.arange(cache_length)[None]
  lengths = prompt_lengths[:, None]
  slot = prompt_slots + step
  return CacheView(
      slot=slot,
      positions=lengths + step,
      key_positions=jnp.where(
          slots < prompt_slots, slots, slots - prompt_slots + lengths
      ),
      is_seen=(slots < lengths) | ((slots >= prompt_slots) & (slots <= slot)),
  )
