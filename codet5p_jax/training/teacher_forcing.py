"""Teacher-forced cross-entropy of a target, given a source.

The loss of every objective whose batch is a source and a target.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from codet5p_jax.array_typing import PRNGKey, Scalar, Tree
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.losses import cross_entropy
from codet5p_jax.models.computation import Pass
from codet5p_jax.training.objective import Batch, Objective, ObjectiveOutput

if TYPE_CHECKING:
  from codet5p_jax.data.task_tokens import TaskTokens


def batch_spec(
    batch_size: int, source_length: int, target_length: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a batch of sources and targets."""

  def spec(length, dtype):
    return jax.ShapeDtypeStruct((batch_size, length), dtype)

  return {
      'encoder_input_tokens': spec(source_length, jnp.int32),
      'decoder_target_tokens': spec(target_length, jnp.int32),
      'decoder_loss_weights': spec(target_length, jnp.float32),
  }


def padded_example(
    source: npt.ArrayLike,
    target: npt.ArrayLike,
    pad: int,
    source_length: int,
    target_length: int,
    prompt_length: int = 0,
) -> dict[str, np.ndarray]:
  """Pads a source and a target to the lengths of a batch.

  >>> example = padded_example([7, 8], [1, 5, 2], 0, 3, 4)
  >>> example['encoder_input_tokens'].tolist()
  [7, 8, 0]
  >>> example['decoder_target_tokens'].tolist()
  [1, 5, 2, 0]
  >>> example['decoder_loss_weights'].tolist()
  [1.0, 1.0, 1.0, 0.0]

  Args:
    source: token ids.
    target: token ids.
    pad: the padding token.
    source_length: of the batch.
    target_length: of the batch.
    prompt_length: so many of the target's first tokens are given, not
      predicted: they have no loss weight.
  """

  def padded(tokens, length):
    row = np.full(length, pad, np.int32)
    row[: len(tokens)] = tokens
    return row

  return {
      'encoder_input_tokens': padded(source, source_length),
      'decoder_target_tokens': padded(target, target_length),
      'decoder_loss_weights': np.float32(
          (np.arange(target_length) >= prompt_length)
          & (np.arange(target_length) < len(target))
      ),
  }


def without_markers(
    example: Mapping[str, np.ndarray], task_tokens: 'TaskTokens'
) -> dict[str, np.ndarray]:
  """Takes the loss weight from sentinels and the first <s>, for evaluation.

  Their order is fixed, so predicting them says nothing about the text.

  >>> from codet5p_jax.data.task_tokens import TaskTokens
  >>> ids = TaskTokens(pad=0, bos=1, eos=2, unk=3, clm=3, match=4, tdec=5,
  ...                  cdec=6, sentinels=(99, 98))
  >>> example = padded_example([7, 99], [1, 99, 5, 2], 0, 2, 4)
  >>> without_markers(example, ids)['decoder_loss_weights'].tolist()
  [0.0, 0.0, 1.0, 1.0]
  """
  targets = example['decoder_target_tokens']
  is_marker = np.isin(targets, task_tokens.sentinels)
  is_marker[:1] |= targets[:1] == task_tokens.bos
  weights = np.where(is_marker, 0, example['decoder_loss_weights'])
  return {**example, 'decoder_loss_weights': np.float32(weights)}


def shift_right(targets: jax.Array, start_id: int) -> jax.Array:
  """Decoder inputs: the start token, then each target but the last.

  >>> shift_right(jnp.array([[1, 17, 18, 2]]), start_id=0).tolist()
  [[0, 1, 17, 18]]
  """
  return jnp.pad(
      targets[:, :-1], ((0, 0), (1, 0)), constant_values=start_id
  )


def loss(
    model: nn.Module,
    params: Tree,
    state: Tree,
    batch: Batch,
    key: PRNGKey | None,
    tile_length: int,
) -> tuple[Scalar, ObjectiveOutput]:
  """Sum of cross-entropies over target tokens; see `Objective.loss`.

  Args:
    model: the network.
    params: all of its parameters.
    state: of the objective; returned as it is.
    batch: see `batch_spec`.
    key: of the dropout; None for none.
    tile_length: see `cross_entropy`.
  """
  drops = key is not None and model.computation.dropout_rate > 0
  targets = batch['decoder_target_tokens']
  weights = batch['decoder_loss_weights']
  hidden = model.apply(
      {'params': params},
      batch['encoder_input_tokens'],
      shift_right(targets, model.config.decoder_start_id),
      deterministic=not drops,
      rngs={'dropout': key} if drops else None,
  )
  head = model.apply({'params': params}, method='output_head')
  loss_sum, correct = cross_entropy(
      hidden, head, targets, weights, tile_length, model.computation.dtype
  )
  weight = jnp.sum(weights)
  return loss_sum, ObjectiveOutput(
      weight=weight,
      tokens=weight,
      metrics={'accuracy': (correct, weight)},
      state=state,
  )


class TeacherForced:
  """What all objectives of a source and a target have in common.

  A class that inherits it has `source_length`, `target_length` and
  `loss_tile_length`, and makes unpadded pairs in `source_and_target(row,
  generator, vocabulary)`.
  """

  accumulates = True

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return batch_spec(batch_size, self.source_length, self.target_length)

  def check_model(self, model: Any) -> None:
    """Checks that a model has what reads the source and writes the target.

    Raises:
      UserError: it has no decoder; or no encoder, and the source is more than
        one token, which a decoder alone can do without.
    """
    stacks = model.head_counts()
    found = type(model).__name__
    if 'decoder' not in stacks:
      raise UserError(
          f'expected a model with a decoder to train {self.name}, found '
          f'{found}, an encoder alone; choose another model'
      )
    if 'encoder' not in stacks and self.source_length > 1:
      raise UserError(
          f'expected a model with an encoder to read the sources of '
          f'{self.name}, found {found}, a decoder alone; choose another model, '
          f'or train with objectives/causal_lm.gin'
      )

  def passes(self, batch_size: int) -> list[Pass]:
    return [
        Pass('encoder', batch_size, self.source_length),
        Pass(
            'decoder',
            batch_size,
            self.target_length,
            source_length=self.source_length,
            writes=True,
        ),
    ]

  def init_state(self, params: Tree, batch_size: int) -> dict[str, Any]:
    return {}

  def state_axes(self, parameter_axes: Mapping[str, Any]) -> dict[str, Any]:
    return {}

  def loss(self, model, params, state, batch, key):
    return loss(model, params, state, batch, key, self.loss_tile_length)

  def example(
      self, row: Any, generator: np.random.Generator, vocabulary: Any
  ) -> dict[str, np.ndarray]:
    return padded_example(
        *self.source_and_target(row, generator, vocabulary),
        vocabulary.task_tokens.pad,
        self.source_length,
        self.target_length,
    )


def check_fields(objective: Objective, **lengths: int) -> None:
  """Checks an objective's fields when it is made.

  Args:
    objective: with the fields of `Objective` and `loss_tile_length`.
    **lengths: of its rows, by name.

  Raises:
    UserError: a field is too small: a row must hold a token between <s> and
      </s>.
  """
  require_positive(
      loss_tile_length=objective.loss_tile_length,
      batch_scale=objective.batch_scale,
  )
  if objective.rate <= 0 or objective.first_step < 0:
    raise UserError(
        f'expected {objective.name} to have a rate above 0 and a first_step of '
        f'0 or more, found {objective.rate} and {objective.first_step}; mend '
        f'OBJECTIVES'
    )
  for name, length in lengths.items():
    if length < 3:
      raise UserError(
          f'expected {name} of {objective.name} to hold a token between <s> '
          f'and </s>, found {length}; make it 3 or more, see OBJECTIVES'
      )
