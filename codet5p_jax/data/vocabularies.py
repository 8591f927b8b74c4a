"""Text to token ids and back: CodeT5's BPE, CodeGen's BPE, our SentencePiece.

All three share the surface of `Vocabulary`. Two promises hold for each:

* `decode(encode(text)) == text` for every text that UTF-8 can hold;
* `encode` never yields a special id, whatever the text says. The standard
  library contains `<s>` and `<unk>`; in a corpus they are just characters.

`encode_as_released` breaks the second promise on purpose: it gives the ids that
the tokenizers published with the checkpoints give.

The `tokenizers` and `sentencepiece` libraries are imported where a vocabulary
is made, so that importing this module costs nothing.
"""

import abc
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from codet5p_jax import errors, storage
from codet5p_jax.data import sentencepiece_models, vocabulary_files, words
from codet5p_jax.data import task_tokens as task_tokens_lib

FORMAT_VERSION = 1
TaskTokens = task_tokens_lib.TaskTokens

_DESCRIPTION_FILE = 'vocabulary.json'
_PIECES_FILE, _MERGES_FILE = 'vocab.json', 'merges.txt'
_SENTENCEPIECE_FILE = 'sentencepiece.model'
# Each of these characters is lost, or made another, under other settings.
_LOSSLESS_PROBE = ' a  b\t\n\r\n  <s> \u00e9\ufb01\u2581\U0001f600\x00 '


class Vocabulary(abc.ABC):
  """What every vocabulary does; two of them are equal if fingerprints are.

  Attributes:
    kind: `codet5`, `codet5_bimodal`, `codegen` or `sentencepiece`.
    vocab_size: Logical number of ids, which `info` and conversion count.
    task_tokens: The ids by role.
    special_ids: The ids that stand for no text; `encode` never yields them.
    fingerprint: Hex SHA-256 of the kind and of the files that `save` writes.
  """

  def __init__(
      self,
      kind: str,
      files: Mapping[str, bytes],
      vocab_size: int,
      task_tokens: TaskTokens,
      pieces: Sequence[bytes],
      special_names: Mapping[int, str],
  ):
    """Makes the tables that follow from the bytes of each piece.

    Args:
      kind: One of the kinds above.
      files: Contents by name, enough to make the vocabulary again.
      vocab_size: Logical number of ids.
      task_tokens: The ids by role.
      pieces: The bytes that each id stands for; empty for special ids.
      special_names: How each special id is written when it is shown.
    """
    self.kind = kind
    self.vocab_size = vocab_size
    self.task_tokens = task_tokens
    self.special_ids = frozenset(special_names)
    self.fingerprint = vocabulary_files.fingerprint(kind, files)
    self._files = dict(files)
    self._pieces = list(pieces)
    self._shown_pieces = list(pieces)
    for index, name in special_names.items():
      self._shown_pieces[index] = name.encode()
    self._piece_lengths = np.array([len(piece) for piece in pieces], np.int64)

  @property
  def files(self) -> Mapping[str, bytes]:
    """The contents by name that `save` writes beside its description."""
    return dict(self._files)

  @property
  def padded_vocab_size(self) -> int:
    """Rows of an embedding table: `vocab_size` up to a multiple of 128."""
    return -(-self.vocab_size // 128) * 128

  @property
  def longest_piece(self) -> int:
    """Bytes of the longest piece, so a text has at least its share of ids."""
    return int(self._piece_lengths.max())

  @abc.abstractmethod
  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    """Encodes each text as `encode` does, on all cores.

    Raises:
      UserError: A text holds a lone surrogate.
    """

  @abc.abstractmethod
  def encode_as_released(self, text: str) -> list[int]:
    """Encodes as the tokenizer published with the checkpoints does.

    Special tokens spelled out in the text become their ids, and what that
    tokenizer adds around a sequence is added.

    Raises:
      UserError: The text holds a lone surrogate, or no such tokenizer exists.
    """

  def encode(self, text: str) -> list[int]:
    """Encodes a text; adds nothing around it and yields no special id.

    Raises:
      UserError: The text holds a lone surrogate, which UTF-8 cannot hold.
    """
    return self.encode_batch([text])[0]

  def decode(
      self, ids: Iterable[SupportsIndex], skip_special_ids: bool = True
  ) -> str:
    """Returns the text of ids, in which bytes that are not UTF-8 become U+FFFD.

    Args:
      ids: Token ids. Those without a piece (padding rows of the table, or
        negative ones) stand for nothing.
      skip_special_ids: False writes special ids by name, for inspection.
    """
    if isinstance(ids, np.ndarray):
      ids = ids.tolist()
    pieces = self._pieces if skip_special_ids else self._shown_pieces
    size = len(pieces)
    return b''.join([pieces[i] for i in ids if 0 <= i < size]).decode(
        errors='replace'
    )

  def word_starts(
      self, text: str, ids: Sequence[int] | npt.NDArray[np.integer]
  ) -> npt.NDArray[np.bool_]:
    """Marks the tokens that begin a word, for whole-word masking.

    A word is a run of [A-Za-z0-9_], a run of whitespace, or one other
    character. Hiding whole words means hiding whole groups of tokens, so a
    token that straddles two words joins them:

    `foo (bar)` as the tokens `fo`, `o`, ` (`, `bar`, `)` gives
    True, False, True, True, True: the third token joins a space and a bracket.

    Args:
      text: The text that was encoded.
      ids: What `encode(text)` gave, [length].

    Returns:
      [length]; True where a token's first byte is the first of a word, and so
      True for the first token, and False for the later bytes of a character.
    """
    lengths = self._piece_lengths[np.asarray(ids, np.int64)]
    starts_by_byte = words.word_starts_by_byte(text)
    if lengths.sum() != starts_by_byte.size or not lengths.all():
      raise ValueError('word_starts needs a text and exactly the ids of it')
    return starts_by_byte[np.cumsum(lengths) - lengths]

  def encode_with_word_starts(
      self, text: str
  ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Returns the ids of `encode` and their `word_starts`, both [length]."""
    ids = np.array(self.encode(text), np.int32)
    return ids, self.word_starts(text, ids)

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes a folder that `load_vocabulary` reads; it appears whole or not.

    Saving where the same vocabulary already lies does nothing.

    Raises:
      UserError: Something else lies there, or it cannot be written.
    """
    folder = pathlib.Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
      self._check_same_as(folder)
      return
    description = {
        'format_version': FORMAT_VERSION,
        'kind': self.kind,
        'fingerprint': self.fingerprint,
        'vocab_size': self.vocab_size,
        'padded_vocab_size': self.padded_vocab_size,
        'task_tokens': dataclasses.asdict(self.task_tokens),
    }
    contents = {
        **self._files,
        _DESCRIPTION_FILE: (json.dumps(description, indent=2) + '\n').encode(),
    }
    scratch = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex}.partial')
    try:
      scratch.mkdir(parents=True, exist_ok=True)
      for name, content in contents.items():
        (scratch / name).write_bytes(content)
      scratch.rename(folder)
    except OSError as error:
      # Another process of the same run may have been first.
      if (folder / _DESCRIPTION_FILE).is_file():
        self._check_same_as(folder)
        return
      raise storage.StorageFault(
          f'cannot write the vocabulary folder {folder}: {error.strerror}; '
          'give a folder that can be made and written'
      ) from error
    finally:
      shutil.rmtree(scratch, ignore_errors=True)

  def _check_same_as(self, folder: pathlib.Path) -> None:
    found = load_vocabulary(folder)
    if found != self:
      raise errors.UserError(
          f'{folder} already holds another vocabulary ({found.kind}, '
          f'fingerprint {found.fingerprint[:12]}), not this one ({self.kind}, '
          f'{self.fingerprint[:12]}); give a new folder or remove that one'
      )

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Vocabulary):
      return NotImplemented
    return self.fingerprint == other.fingerprint

  def __hash__(self) -> int:
    return hash(self.fingerprint)

  def __reduce__(self):
    # The libraries' own objects are made again from the files.
    return type(self), (self.kind, self._files)

  def __repr__(self) -> str:
    return (
        f'{type(self).__name__}(kind={self.kind!r}, '
        f'vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]!r})'
    )


def load_vocabulary(folder: str | os.PathLike[str]) -> Vocabulary:
  """Reads a folder that `Vocabulary.save` wrote, of any kind.

  Raises:
    UserError: A file is missing, damaged, or of a format we do not know.
  """
  folder = pathlib.Path(folder)
  path = folder / _DESCRIPTION_FILE
  vocabulary_files.require_description(path, folder / _PIECES_FILE)
  description = vocabulary_files.parse_json_object(
      vocabulary_files.read(path), path
  )
  version = description.get('format_version')
  if version != FORMAT_VERSION:
    raise errors.UserError(
        f'{path} should have format_version {FORMAT_VERSION}, but has '
        f'{version}; write the folder again with this release'
    )
  kind = description.get('kind')
  if kind not in _KINDS:
    raise errors.UserError(
        f'{path} should name a kind among {", ".join(_KINDS)}, but names '
        f'{kind!r}; write the folder again'
    )
  vocabulary_class, names = _KINDS[kind]
  files = {name: vocabulary_files.read(folder / name) for name in names}
  found = vocabulary_files.fingerprint(kind, files)
  if found != description.get('fingerprint'):
    raise errors.UserError(
        f'the vocabulary folder {folder} is damaged: its files do not have the '
        f'fingerprint in {_DESCRIPTION_FILE}; copy or write the folder again'
    )
  return vocabulary_class(kind, files)


class ByteLevelBPE(Vocabulary):
  """The two released vocabularies: pieces are strings of UTF-8's bytes.

  Made by `codet5` or `codegen`; the constructor takes files in their form.
  """

  def __init__(self, kind: str, files: Mapping[str, bytes]):
    trained = vocabulary_files.parse_pieces(files[_PIECES_FILE], _PIECES_FILE)
    self._merges = vocabulary_files.parse_merges(
        files[_MERGES_FILE], _MERGES_FILE
    )
    self._layout = layout = _LAYOUTS[kind](trained)
    ordinary = enumerate([*trained, *layout.whitespace])
    self._ids = {
        piece: i for i, piece in ordinary if i not in layout.special_names
    }
    pieces = vocabulary_files.piece_bytes(trained)
    pieces += [run.encode() for run in layout.whitespace]
    pieces += [b''] * (max(layout.special_names) + 1 - len(pieces))
    for special_id in layout.special_names:
      pieces[special_id] = b''
    # Plain encoding does not know the special tokens, so it cannot find them.
    self._tokenizer = self._make_tokenizer(specials=())
    self._released_tokenizer = None
    super().__init__(
        kind=kind,
        files=files,
        vocab_size=layout.vocab_size,
        task_tokens=layout.task_tokens,
        pieces=pieces,
        special_names=layout.special_names,
    )

  @classmethod
  def codet5(
      cls,
      vocab_file: str | os.PathLike[str],
      merges_file: str | os.PathLike[str],
      bimodal: bool = False,
  ) -> 'ByteLevelBPE':
    """The vocabulary of the models on the T5 stack.

    Args:
      vocab_file: CodeT5's `vocab.json`: 32,000 pieces, with or without the
        sentinels and the bimodal tokens that follow them.
      merges_file: Its `merges.txt`.
      bimodal: Whether [ENC], [TDEC] and [CDEC] belong to it, as for the
        embedding and the bimodal checkpoint: 32,103 ids instead of 32,100.

    Raises:
      UserError: A file is missing, or not what it should be.
    """
    kind = 'codet5_bimodal' if bimodal else 'codet5'
    pieces, merges = _read_bpe(vocab_file, merges_file)
    pieces = task_tokens_lib.drop_codet5_additions(pieces)
    return cls(kind, _bpe_files(pieces, merges))

  @classmethod
  def codegen(
      cls,
      vocab_file: str | os.PathLike[str],
      merges_file: str | os.PathLike[str],
  ) -> 'ByteLevelBPE':
    """The vocabulary of the 2B and larger models.

    Args:
      vocab_file: GPT-2's `vocab.json`, 50,257 pieces. The pieces for runs of
        spaces and tabs that CodeGen adds are added here.
      merges_file: GPT-2's `merges.txt`.

    Raises:
      UserError: A file is missing, or not what it should be.
    """
    return cls('codegen', _bpe_files(*_read_bpe(vocab_file, merges_file)))

  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    return _run_tokenizer(self._tokenizer, list(texts))

  def encode_as_released(self, text: str) -> list[int]:
    """Encodes as transformers' tokenizer for the checkpoint does.

    CodeT5's adds `<s>` and `</s>` around, and swallows the whitespace before a
    `<mask>` or a sentinel. CodeGen's adds nothing.

    Raises:
      UserError: The text holds a lone surrogate.
    """
    if self._released_tokenizer is None:
      self._released_tokenizer = self._make_tokenizer(
          self._layout.released_specials
      )
    [ids] = _run_tokenizer(self._released_tokenizer, [text])
    if self._layout.released_adds_ends:
      ids = [self.task_tokens.bos, *ids, self.task_tokens.eos]
    return ids

  def _make_tokenizer(
      self, specials: Iterable[task_tokens_lib.ReleasedSpecial]
  ) -> Any:
    """Returns a `tokenizers.Tokenizer` that finds just these specials."""
    import tokenizers  # pylint: disable=g-import-not-at-top

    names = {special.name for special in specials}
    ids = self._ids | {
        name: i
        for i, name in self._layout.special_names.items()
        if name in names
    }
    try:
      model = tokenizers.models.BPE(vocab=ids, merges=self._merges)
    except Exception as error:  # The library has no narrower class.
      raise errors.UserError(
          f'{_MERGES_FILE} does not belong to {_PIECES_FILE} '
          f'({vocabulary_files.one_line(error)}); give the two files of one '
          'vocabulary'
      ) from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(run, normalized=True)
            for run in self._layout.whitespace
        ]
    )
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(
                special.name, lstrip=special.lstrip, normalized=True
            )
            for special in specials
        ]
    )
    return tokenizer


class SentencePiece(Vocabulary):
  """Our own vocabulary: a SentencePiece BPE that loses nothing of code.

  No normalisation, no dummy prefix, no whitespace removed; newline and tab are
  pieces, and so are the runs of spaces that training finds; what no piece
  covers becomes UTF-8 bytes. Made by `train` or `from_file`.
  """

  def __init__(self, kind: str, files: Mapping[str, bytes]):
    self._processor = sentencepiece_models.load(files[_SENTENCEPIECE_FILE])
    pieces, special_names = sentencepiece_models.pieces(self._processor)
    self._meta_symbol_ids = [
        self._processor.piece_to_id(f'<0x{byte:02X}>')
        for byte in sentencepiece_models.META_SYMBOL.encode()
    ]
    # Unless a piece joins a newline with something else.
    joins_lines = any(b'\n' in piece and piece != b'\n' for piece in pieces)
    newline_id = self._processor.piece_to_id('\n')
    self._newline_id = None if joins_lines else newline_id
    super().__init__(
        kind=kind,
        files=files,
        vocab_size=len(pieces),
        task_tokens=sentencepiece_models.find_task_tokens(self._processor),
        pieces=pieces,
        special_names=special_names,
    )
    if self.decode(self.encode(_LOSSLESS_PROBE)) != _LOSSLESS_PROBE:
      raise errors.UserError(
          f'{_SENTENCEPIECE_FILE} should keep every character of a text, but '
          'loses some; train a model with `codet5p train_vocabulary`'
      )

  @classmethod
  def train(
      cls, sentence_iterator: Iterable[str], vocab_size: int
  ) -> 'SentencePiece':
    """Trains a vocabulary; the same texts in the same order give the same one.

    Takes about 55 seconds and 1.3 GB for 100 MB of code and 32,000 pieces.

    Args:
      sentence_iterator: Texts of any length, best whole files.
      vocab_size: Number of ids. It includes 4 + 104 control pieces, 256 bytes,
        newline, tab, and the characters that are not rare in the texts.

    Raises:
      UserError: There is no text, a text holds a lone surrogate, or the size
        does not fit the texts.
    """
    model = sentencepiece_models.train(
        map(_check_has_no_surrogate, sentence_iterator), vocab_size
    )
    return cls('sentencepiece', {_SENTENCEPIECE_FILE: model})

  @classmethod
  def from_file(cls, model_file: str | os.PathLike[str]) -> 'SentencePiece':
    """Reads a model file that `train` made.

    Raises:
      UserError: The file is missing, or not such a model.
    """
    content = vocabulary_files.read(model_file)
    return cls('sentencepiece', {_SENTENCEPIECE_FILE: content})

  def encode(self, text: str) -> list[int]:
    _check_has_no_surrogate(text)
    if sentencepiece_models.META_SYMBOL in text or self._newline_id is None:
      # The library is faster on one text than on a list of one.
      return self._keep_meta_symbol(text, self._processor.encode(text))
    # Lines are encoded apart, and those of code are often the same: this takes
    # three quarters of the time.
    lines = text.split('\n')
    distinct = list(dict.fromkeys(lines))
    encoded = dict(
        zip(distinct, self._processor.encode(distinct, num_threads=1))
    )
    ids = []
    for line in lines:
      ids += encoded[line]
      ids.append(self._newline_id)
    ids.pop()
    return ids

  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    texts = [_check_has_no_surrogate(text) for text in texts]
    encoded = self._processor.encode(texts)
    return [self._keep_meta_symbol(*pair) for pair in zip(texts, encoded)]

  def encode_as_released(self, text: str) -> list[int]:
    """Raises UserError: no checkpoint was released with this vocabulary."""
    raise errors.UserError(
        'encode_as_released needs the vocabulary of a released checkpoint '
        '(codet5, codet5_bimodal, codegen), but this one is sentencepiece; '
        'use encode'
    )

  def _keep_meta_symbol(self, text: str, ids: list[int]) -> list[int]:
    """Returns the ids of a text with each U+2581 spelled in bytes.

    SentencePiece writes a space as U+2581, and would read one as a space.
    """
    if sentencepiece_models.META_SYMBOL not in text:
      return ids
    first, *others = text.split(sentencepiece_models.META_SYMBOL)
    ids = self._processor.encode(first)
    for part in others:
      ids += self._meta_symbol_ids + self._processor.encode(part)
    return ids


_LAYOUTS = {
    'codet5': functools.partial(task_tokens_lib.codet5_layout, bimodal=False),
    'codet5_bimodal': functools.partial(
        task_tokens_lib.codet5_layout, bimodal=True
    ),
    'codegen': task_tokens_lib.codegen_layout,
}
# What `load_vocabulary` makes of each kind, from which files.
_KINDS = {
    **{kind: (ByteLevelBPE, (_PIECES_FILE, _MERGES_FILE)) for kind in _LAYOUTS},
    'sentencepiece': (SentencePiece, (_SENTENCEPIECE_FILE,)),
}


def _read_bpe(
    vocab_file: str | os.PathLike[str], merges_file: str | os.PathLike[str]
) -> tuple[list[str], list[tuple[str, str]]]:
  """Returns the pieces of a byte-level BPE by id, and its merges in order."""
  pieces = vocabulary_files.parse_pieces(
      vocabulary_files.read(vocab_file), vocab_file
  )
  merges = vocabulary_files.parse_merges(
      vocabulary_files.read(merges_file), merges_file
  )
  return pieces, merges


def _bpe_files(
    pieces: Sequence[str], merges: Sequence[tuple[str, str]]
) -> dict[str, bytes]:
  """Returns the files of a byte-level BPE in the one form that we write."""
  return {
      _PIECES_FILE: vocabulary_files.format_pieces(pieces),
      _MERGES_FILE: vocabulary_files.format_merges(merges),
  }


def _run_tokenizer(tokenizer: Any, texts: list[str]) -> list[list[int]]:
  """Encodes with a `tokenizers.Tokenizer`, which adds nothing around."""
  try:
    # The fast form leaves offsets out, and takes less than half the time.
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
  except TypeError:
    for text in texts:
      _check_has_no_surrogate(text)
    raise
  return [encoding.ids for encoding in encodings]


def _check_has_no_surrogate(text: str) -> str:
  try:
    text.encode()
    return text
  except UnicodeEncodeError as error:
    raise errors.UserError(
        'a text to encode should be valid Unicode, but its character '
        f'{error.start} is the lone surrogate U+{ord(text[error.start]):04X}; '
        "drop it, or read the file with errors='replace'"
    ) from error
