"""A vocabulary beside a model in Hugging Face's layout.

Written as the released repositories have it (spec 1.4, 1.5), so that
transformers' `AutoTokenizer` gives the ids of `Vocabulary.encode_as_released`.
A SentencePiece vocabulary of our own has no class there; it lies in the folder
in our form, `vocabulary/`, and comes back when the folder is converted again.
"""

import json
from pathlib import Path
from typing import Any

from codet5p_jax.conversion.tensor_files import read_json_object
from codet5p_jax.data.task_tokens import (
    BIMODAL_NAMES,
    CODEGEN_WHITESPACE,
    END_OF_TEXT,
    SENTINEL_NAMES,
)
from codet5p_jax.data.vocabularies import (
    ByteLevelBPE,
    Vocabulary,
    load_vocabulary,
)
from codet5p_jax.data.vocabulary_files import format_pieces, parse_pieces

_PIECES, _MERGES = 'vocab.json', 'merges.txt'
_ADDED, _CONFIG = 'added_tokens.json', 'tokenizer_config.json'
_SPECIALS = 'special_tokens_map.json'
_OURS = 'vocabulary'


def has_tokenizer(folder: Path) -> bool:
  """Whether a folder in Hugging Face's layout has files we can read."""
  return (folder / _OURS).is_dir() or all(
      (folder / name).is_file() for name in (_PIECES, _MERGES)
  )


def read_tokenizer(folder: Path, kind: str) -> Vocabulary:
  """Returns the vocabulary of a folder in Hugging Face's layout.

  Args:
    folder: has a tokenizer.
    kind: of the released models of this family.

  Raises:
    UserError: a file is damaged, or not that of such a vocabulary.
  """
  if (folder / _OURS).is_dir():
    return load_vocabulary(folder / _OURS)
  files = folder / _PIECES, folder / _MERGES
  if kind == 'codegen':
    return ByteLevelBPE.codegen(*files)
  added = folder / _ADDED
  # Beside a plain T5 too, if it was trained with them.
  is_bimodal = kind == 'codet5_bimodal' or (
      added.exists() and BIMODAL_NAMES[0] in read_json_object(added)
  )
  return ByteLevelBPE.codet5(*files, bimodal=is_bimodal)


def write_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
  """Writes a vocabulary's files into a folder in Hugging Face's layout.

  Raises:
    OSError: the disk is full or the folder not writable.
  """
  if vocabulary.kind == 'sentencepiece':
    vocabulary.save(folder / _OURS)
    return
  trained = parse_pieces(vocabulary.files[_PIECES], _PIECES)
  pieces, added, configuration = {
      'codet5': _codet5,
      'codet5_bimodal': _codet5_bimodal,
      'codegen': _codegen,
  }[vocabulary.kind](trained)
  (folder / _PIECES).write_bytes(format_pieces(pieces))
  (folder / _MERGES).write_bytes(vocabulary.files[_MERGES])
  _write_json(folder / _ADDED, added)
  _write_json(folder / _CONFIG, configuration)
  specials = {
      name: token
      for name, token in configuration.items()
      if name.endswith('_token') or name == 'additional_special_tokens'
  }
  _write_json(folder / _SPECIALS, _without_types(specials))


def _codet5(
    trained: list[str],
) -> tuple[list[str], dict[str, int], dict[str, Any]]:
  """Returns the pieces, the added tokens and tokenizer_config.json."""
  sentinels = list(SENTINEL_NAMES[::-1])  # The last has the lowest id.
  additional = [_token(name, lstrip=True) for name in sentinels]
  return [*trained, *sentinels], {}, _roberta(additional)


def _codet5_bimodal(
    trained: list[str],
) -> tuple[list[str], dict[str, int], dict[str, Any]]:
  # The sentinels have ids, but no text is taken for them.
  pieces = [*trained, *SENTINEL_NAMES[::-1]]
  added = {name: len(pieces) + i for i, name in enumerate(BIMODAL_NAMES)}
  return pieces, added, _roberta(list(BIMODAL_NAMES))


def _codegen(
    trained: list[str],
) -> tuple[list[str], dict[str, int], dict[str, Any]]:
  added = {
      run: len(trained) + i for i, run in enumerate(CODEGEN_WHITESPACE)
  }
  names = ('bos_token', 'eos_token', 'unk_token', 'pad_token')
  return trained, added, {
      'tokenizer_class': 'CodeGenTokenizer',
      'add_prefix_space': False,
      'model_max_length': 2048,
      **dict.fromkeys(names, END_OF_TEXT),
  }


def _roberta(additional: list[Any]) -> dict[str, Any]:
  return {
      'tokenizer_class': 'RobertaTokenizer',
      'add_prefix_space': False,
      'model_max_length': 512,
      'bos_token': _token('<s>'),
      'eos_token': _token('</s>'),
      'unk_token': _token('<unk>'),
      'sep_token': _token('</s>'),
      'pad_token': _token('<pad>'),
      'cls_token': _token('<s>'),
      'mask_token': _token('<mask>', lstrip=True),
      'additional_special_tokens': additional,
  }


def _token(content: str, lstrip: bool = False) -> dict[str, Any]:
  return {
      'content': content,
      'single_word': False,
      'lstrip': lstrip,
      'rstrip': False,
      'normalized': True,
      '__type': 'AddedToken',
  }


def _without_types(value: Any) -> Any:
  """Returns tokens as special_tokens_map.json has them."""
  if isinstance(value, list):
    return [_without_types(x) for x in value]
  if isinstance(value, dict):
    return {k: _without_types(x) for k, x in value.items() if k != '__type'}
  return value


def _write_json(path: Path, content: dict[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + '\n')
