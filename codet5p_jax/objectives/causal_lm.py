"""Decoder-only causal language modelling (paper, section 3.1).

The encoder sees the single token [CLM]; the decoder generates the whole row.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from codet5p_jax.corpus.folder import token_store_folder
from codet5p_jax.corpus.token_store import TokenRows
from codet5p_jax.training import teacher_forcing

if TYPE_CHECKING:
  import grain

  from codet5p_jax.data.vocabularies import TaskTokens


def causal_lm_example(
    row: Mapping[str, np.ndarray], task_tokens: 'TaskTokens'
) -> dict[str, np.ndarray]:
  """Makes an example of a row of tokens.

  >>> from codet5p_jax.data.task_tokens import TaskTokens
  >>> ids = TaskTokens(pad=0, bos=1, eos=2, unk=3, clm=3, match=4, tdec=5,
  ...                  cdec=6, sentinels=())
  >>> example = causal_lm_example({'tokens': np.array([17, 18, 19])}, ids)
  >>> example['encoder_input_tokens'].tolist()
  [3]
  >>> example['decoder_target_tokens'].tolist()
  [1, 17, 18, 19, 2]
  >>> example['decoder_loss_weights'].tolist()
  [1.0, 1.0, 1.0, 1.0, 1.0]

  Args:
    row: 'tokens', int32 [length - 2] (length - 1 or length where a vocabulary
      has no <s>).
    task_tokens: ids by role.
  """
  before = [] if task_tokens.bos is None else [task_tokens.bos]
  targets = np.concatenate([before, row['tokens'], [task_tokens.eos]])
  return {
      'encoder_input_tokens': np.array([task_tokens.clm], np.int32),
      'decoder_target_tokens': targets.astype(np.int32),
      'decoder_loss_weights': np.ones(len(targets), np.float32),
  }


@dataclasses.dataclass(frozen=True)
class CausalLM:
  """Decoder-only causal language modelling over a corpus folder.

  Attributes:
    target_length: tokens of a row, <s> and </s> included; paper: 1024.
    rate: how often it is drawn, relative to the other objectives.
    loss_tile_length: positions of each row whose logits exist at a time.
  """

  target_length: int = 1024
  rate: float = 1.0
  loss_tile_length: int = 128

  name = 'causal_lm'

  def __post_init__(self):
    teacher_forcing.check_lengths(
        self.loss_tile_length, target_length=self.target_length
    )

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return teacher_forcing.batch_spec(batch_size, 1, self.target_length)

  def init_state(self, model: Any, params: Any) -> dict[str, Any]:
    return {}

  def loss(self, model, params, state, batch, key):
    return teacher_forcing.loss(
        model, params, state, batch, key, self.loss_tile_length
    )

  def dataset(
      self, data_dir: str, split: str, vocabulary: Any
  ) -> 'grain.MapDataset':
    """All examples of a split of a corpus folder, in the order of the store."""
    import grain

    task_tokens = vocabulary.task_tokens
    rows = _rows(data_dir, split, vocabulary, self.target_length)
    return grain.MapDataset.source(rows).map(
        lambda row: causal_lm_example(row, task_tokens)
    )


def _rows(data_dir, split, vocabulary, target_length) -> TokenRows:
  folder = token_store_folder(pathlib.Path(data_dir), vocabulary, split)
  added = 1 if vocabulary.task_tokens.bos is None else 2
  return TokenRows(folder, target_length - added)


def register_causal_lm(
    name: str, data_dir: str, vocabulary: Any, target_length: int = 1024
) -> None:
  """Registers the objective as a seqio task over a corpus folder.

  The task makes the very examples the trainer reads, under the names seqio
  uses: `inputs` and `targets`.

  Args:
    name: of the task in seqio's registry.
    data_dir: a corpus folder.
    vocabulary: the one whose token store is read.
    target_length: see `CausalLM`.
  """
  import seqio
  import tensorflow as tf

  from codet5p_jax.data.seqio_vocabularies import SeqioVocabulary

  splits = {
      split: len(_rows(data_dir, split, vocabulary, target_length))
      for split in ('train', 'validation', 'test')
  }
  objective = CausalLM(target_length)

  def examples(split, shuffle_files, seed=None):
    del shuffle_files, seed  # Rows are read by index, in the store's order.

    def generate():
      for example in objective.dataset(data_dir, split, vocabulary):
        yield {
            'inputs': example['encoder_input_tokens'],
            'targets': example['decoder_target_tokens'],
        }

    spec = tf.TensorSpec([None], tf.int32)
    return tf.data.Dataset.from_generator(
        generate, output_signature={'inputs': spec, 'targets': spec}
    )

  feature = seqio.Feature(SeqioVocabulary(vocabulary), add_eos=False)
  seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(
          examples, splits=tuple(splits), num_input_examples=splits
      ),
      preprocessors=[],
      output_features={'inputs': feature, 'targets': feature},
  )
