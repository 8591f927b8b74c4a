"""A model in Hugging Face's layout to a folder of ours.

    config.json     model, fingerprint of the vocabulary, source and its own
    vocabulary/     where the source has one that we can read
    model/          the weights, in groups, with the source's dtype
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from codet5p_jax.conversion.gate import compare_modules
from codet5p_jax.conversion.huggingface_folder import HuggingFaceFolder
from codet5p_jax.conversion.sources import WeightSource, from_huggingface
from codet5p_jax.conversion.target_folder import whole_or_nothing
from codet5p_jax.data.vocabularies import Vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.training.checkpoints.fingerprint import (
    digest_array,
    join_digests,
)
from codet5p_jax.training.checkpoints.weights import (
    SavedWeights,
    write_weights,
)
from codet5p_jax.training.files import write_json
from codet5p_jax.training.run_folder import RunFolder, describe

# Called with the bytes of each tensor that was dealt with.
Advance = Callable[[int], Any]


def convert_to_ours(
    theirs: HuggingFaceFolder, target: Path, advance: Advance
) -> float:
  """Converts a folder in Hugging Face's layout.

  Args:
    theirs: the folder, opened.
    target: must not exist.
    advance: called for each leaf twice, when written and when compared.

  Returns:
    The largest difference of a module's outputs.

  Raises:
    UserError: the source is damaged or of no family we know, or the target
      cannot be written. Nothing is left of it then.
  """
  weights = from_huggingface(theirs)
  vocabulary = weights.load_vocabulary()
  require_vocabulary(weights, vocabulary)
  with whole_or_nothing(target) as partial:
    folder = RunFolder(partial)
    digests: dict[str, str] = {}
    write_weights(
        folder.model,
        _recorded(weights.leaves(), digests, advance),
        {'step': 0},
    )
    if vocabulary is not None:
      vocabulary.save(folder.vocabulary)
    config = {
        'model': weights.model,
        'vocabulary_fingerprint': vocabulary and vocabulary.fingerprint,
        'source': str(theirs.path),
        'source_fingerprint': join_digests(digests.items()),
    }
    write_json(folder.config, describe(config))
    worst = compare_modules(
        theirs,
        theirs.read_theirs,
        reading_what_was_written(
            SavedWeights(folder.model).read, digests, target, advance
        ),
    )
  return worst


def require_vocabulary(
    weights: WeightSource, vocabulary: Vocabulary | None
) -> None:
  """Refuses a vocabulary with more ids than the model has rows.

  Raises:
    UserError: it has.
  """
  size = weights.model.vocab_size
  if vocabulary is not None and vocabulary.vocab_size > size:
    raise UserError(
        f'expected in {weights.vocabulary} a vocabulary of at most {size} ids, '
        f'as the model has rows, found one of {vocabulary.vocab_size}; give '
        f"the model's own tokenizer files"
    )


def reading_what_was_written(
    read: Callable[[str], np.ndarray],
    digests: dict[str, str],
    target: Path,
    advance: Advance,
) -> Callable[[str], np.ndarray]:
  """Returns `read`, made to compare every bit with what was meant.

  Args:
    read: (name) -> tensor of the written folder.
    digests: {name: `digest_array`} of what was to be written.
    target: for the message.
    advance: called for each tensor.
  """

  def read_verified(name: str) -> np.ndarray:
    tensor = read(name)
    if digest_array(name, tensor) != digests[name]:
      raise UserError(
          f'expected in {target} the bits that were written, found others in '
          f'{name}; the disk may be failing: try another'
      )
    advance(tensor.nbytes)
    return tensor

  return read_verified


def _recorded(
    leaves: Iterable[tuple[str, np.ndarray]],
    digests: dict[str, str],
    advance: Advance,
) -> Iterator[tuple[str, np.ndarray]]:
  """Passes leaves on, and notes the digest of each."""
  for path, leaf in leaves:
    digests[path] = digest_array(path, leaf)
    yield path, leaf
    advance(leaf.nbytes)
