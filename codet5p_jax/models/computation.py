"""How a network is computed, apart from what it is."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from codet5p_jax.errors import UserError

# What the backward pass of a layer finds saved, and what it computes again.
REMAT_POLICIES = {
    # Everything is saved.
    'none': None,
    # Results of products with weights are saved; attention logits and
    # element-wise operations are computed again.
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Only each layer's input is saved.
    'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Computation:
  """What a run chooses of a network, whatever its sizes.

  Attributes:
    dtype: of the computation, "bfloat16" or "float32"; parameters are float32.
    dropout_rate: of embeddings, attention weights and sub-layer outputs; 0 in
      pre-training, 0.1 in fine-tuning.
    remat_policy: a key of `REMAT_POLICIES`.
    scan_layers: one compiled layer applied to stacked parameters (fast to
      compile), or one copy per layer.

  Raises:
    UserError: a value is none of those.
  """

  dtype: str = 'bfloat16'
  dropout_rate: float = 0.0
  remat_policy: str = 'none'
  scan_layers: bool = True

  def __post_init__(self):
    if self.remat_policy not in REMAT_POLICIES:
      raise UserError(
          f'expected a remat_policy among {", ".join(REMAT_POLICIES)}, found '
          f'{self.remat_policy!r}; set REMAT_POLICY'
      )
    if self.dtype not in ('float32', 'bfloat16'):
      raise UserError(
          f'expected dtype float32 or bfloat16, found {self.dtype!r}; set DTYPE'
      )
    if not 0 <= self.dropout_rate < 1:
      raise UserError(
          f'expected 0 <= dropout_rate < 1, found {self.dropout_rate}; set '
          f'DROPOUT_RATE'
      )


@dataclasses.dataclass(frozen=True)
class Pass:
  """A use of one stack of a network.

  Attributes:
    stack: 'encoder' or 'decoder'.
    rows: of the batch.
    length: positions of each row.
    source_length: positions that each row of a decoder attends to, if it has
      an encoder.
    writes: whether the vocabulary's logits are computed.
    is_trained: whether there is a backward pass.
  """

  stack: str
  rows: int
  length: int
  source_length: int = 0
  writes: bool = False
  is_trained: bool = True


def apply_layers(
    config: Any,
    computation: Computation,
    layer: type[nn.Module],
    num_layers: int,
    x: jax.Array,
    inputs: tuple[Any, ...],
    cache_slot: jax.Array | None = None,
) -> jax.Array:
  """Applies the layers of a stack in turn; all take the same `inputs`.

  Called within a compact module, whose parameters the layers become:
  `layers` with a leading axis when scanned, else `layers_0`, `layers_1`, ...

  Args:
    config: of the layers.
    computation: of the layers; says whether they are scanned, and what of them
      the backward pass computes again.
    layer: made of these two, and called with (x, *inputs); returns (x, None).
    num_layers: depth of the stack.
    x: [batch, length, embed].
    inputs: the last of them is the flag `deterministic`.
    cache_slot: one more argument of the layers, where it is given; see
      layers/attention.py.

  Returns:
    [batch, length, embed].
  """
  if computation.remat_policy != 'none':
    layer = nn.remat(
        layer,
        policy=REMAT_POLICIES[computation.remat_policy],
        # Within a scan nothing can be merged with the forward pass anyway.
        prevent_cse=not computation.scan_layers,
        static_argnums=(len(inputs) + 1,),
    )
  if cache_slot is not None:
    inputs = (*inputs, cache_slot)
  if computation.scan_layers:
    scanned = nn.scan(
        layer,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(nn.broadcast,) * len(inputs),
        length=num_layers,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    x, _ = scanned(config, computation, name='layers')(x, *inputs)
    return x
  for i in range(num_layers):
    x, _ = layer(config, computation, name=f'layers_{i}')(x, *inputs)
  return x
