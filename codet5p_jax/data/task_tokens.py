"""Which token ids play the paper's roles, in each vocabulary.

| role               | CodeT5 BPE          | CodeGen BPE         | our own    |
| ------------------ | ------------------- | ------------------- | ---------- |
| pad, bos, eos, unk | 0, 1, 2, 3          | 50256, but no bos   | 0, 1, 2, 3 |
| clm                | 3                   | 50295               | a piece    |
| sentinel k         | 32099 - k           | 50296 + k           | 100 pieces |
| match, tdec, cdec  | 32100, 32101, 32102 | 50396, 50397, 50398 | 3 pieces   |

The two released columns are computed from the number of trained pieces, so that
a small BPE in the same form gets the same layout at its own size. In our own,
SentencePiece, training makes control pieces of these names.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from codet5p_jax import errors

NUM_SENTINELS = 100
SENTINEL_NAMES = tuple(f'<extra_id_{k}>' for k in range(NUM_SENTINELS))
# Where no released tokenizer has a name, we give one.
CLM_NAME = '[CLM]'
MATCH_NAME, TDEC_NAME, CDEC_NAME = '[MATCH]', '[TDEC]', '[CDEC]'

_CODET5_SPECIALS = ('<pad>', '<s>', '</s>', '<unk>', '<mask>')
BIMODAL_NAMES = ('[ENC]', '[TDEC]', '[CDEC]')  # match, tdec, cdec.
END_OF_TEXT = '<|endoftext|>'
# CodeGen's additions to GPT-2: 31 to 2 spaces, then 9 to 2 tabs.
CODEGEN_WHITESPACE = tuple(
    [' ' * n for n in range(31, 1, -1)] + ['\t' * n for n in range(9, 1, -1)]
)
# Rows of CodeGen's tables; those above the task tokens are never used.
_CODEGEN_VOCAB_SIZE = 51_200


@dataclasses.dataclass(frozen=True)
class TaskTokens:
  """The token id that plays each role.

  In CodeT5's plain vocabulary (without `bimodal`) match, tdec and cdec lie just
  above the logical size: their rows exist in every padded table, so that a
  stage-1 model goes into stage 2 as it is.
  """

  pad: int
  bos: int | None  # None where the released tokenizer adds none (CodeGen).
  eos: int  # Also the paper's [SEP], and the separator between files.
  unk: int
  clm: int  # [CLM], which asks for causal language modelling.
  match: int  # [Match], text-code matching.
  tdec: int  # [TDec], code to text.
  cdec: int  # [CDec], text to code.
  sentinels: tuple[int, ...]  # Sentinel k at index k.

  def sentinel(self, k: int) -> int:
    """Returns the id that hides span k of a row, with k from 0 to 99.

    Raises:
      UserError: There is no sentinel k.
    """
    if not 0 <= k < len(self.sentinels):
      raise errors.UserError(
          f'a row can hide {len(self.sentinels)} spans, but sentinel {k} was '
          'asked for; shorten the rows or hide less of them'
      )
    return self.sentinels[k]


@dataclasses.dataclass(frozen=True)
class ReleasedSpecial:
  """A special token as the released tokenizer finds it in a text."""

  name: str
  lstrip: bool = False  # Whether it swallows the whitespace before it.


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a released vocabulary puts after, and makes of, its trained pieces."""

  vocab_size: int  # Logical number of ids.
  task_tokens: TaskTokens
  special_names: Mapping[int, str]  # How each special id is written.
  whitespace: tuple[str, ...]  # Pieces that follow the trained ones.
  released_specials: tuple[ReleasedSpecial, ...]
  released_adds_ends: bool  # Whether the tokenizer adds <s> and </s>.


def drop_codet5_additions(pieces: Sequence[str]) -> list[str]:
  """Returns a vocabulary's pieces without the sentinels that CodeT5 appends.

  The files published with the checkpoints hold them after the trained pieces,
  and those of the bimodal one may hold its three tokens as well.
  """
  sentinels = SENTINEL_NAMES[::-1]
  for additions in ((*sentinels, *BIMODAL_NAMES), sentinels):
    if tuple(pieces[-len(additions) :]) == additions:
      return list(pieces[: -len(additions)])
  return list(pieces)


def codet5_layout(trained: Sequence[str], bimodal: bool) -> Layout:
  """Returns CodeT5's layout after the trained pieces, 32,000 as released.

  Raises:
    UserError: The pieces do not begin as CodeT5's do.
  """
  found = tuple(trained[: len(_CODET5_SPECIALS)])
  if found != _CODET5_SPECIALS:
    raise errors.UserError(
        f'the vocab.json of CodeT5 should begin with '
        f'{" ".join(_CODET5_SPECIALS)}, but this one begins with '
        f'{" ".join(found)}; give the file of CodeT5'
    )
  misplaced = set(SENTINEL_NAMES + BIMODAL_NAMES) & set(trained)
  if misplaced:
    raise errors.UserError(
        'the vocab.json of CodeT5 should hold all sentinels at its end, from '
        f'{SENTINEL_NAMES[-1]} down, or none, but this one has '
        f'{len(misplaced)} elsewhere; give the file of CodeT5'
    )
  size = len(trained)
  # Descending: <extra_id_99> comes first.
  sentinels = tuple(size + NUM_SENTINELS - 1 - k for k in range(NUM_SENTINELS))
  first_task_token = size + NUM_SENTINELS
  match, tdec, cdec = range(first_task_token, first_task_token + 3)

  special_names = dict(enumerate(_CODET5_SPECIALS))
  special_names |= dict(zip(sentinels, SENTINEL_NAMES))
  released = [ReleasedSpecial(name) for name in _CODET5_SPECIALS[:-1]]
  released.append(ReleasedSpecial('<mask>', lstrip=True))
  if bimodal:
    # The bimodal checkpoint's map of special tokens lists these three and no
    # sentinel: `<extra_id_0>` in a text is not one token to its tokenizer.
    special_names |= dict(zip((match, tdec, cdec), BIMODAL_NAMES))
    released += [ReleasedSpecial(name) for name in BIMODAL_NAMES]
  else:
    # The sentinels were published with lstrip (salesforce/CodeT5 issue 147).
    released += [ReleasedSpecial(name, lstrip=True) for name in SENTINEL_NAMES]
  return Layout(
      vocab_size=first_task_token + (len(BIMODAL_NAMES) if bimodal else 0),
      task_tokens=TaskTokens(
          pad=0,
          bos=1,
          eos=2,
          unk=3,
          clm=3,  # The authors' choice (salesforce/CodeT5 issue 124).
          match=match,
          tdec=tdec,
          cdec=cdec,
          sentinels=sentinels,
      ),
      special_names=special_names,
      whitespace=(),
      released_specials=tuple(released),
      released_adds_ends=True,
  )


def codegen_layout(trained: Sequence[str]) -> Layout:
  """Returns CodeGen's layout after GPT-2's pieces, 50,257 as released.

  Raises:
    UserError: The pieces do not end as GPT-2's do, or are too many.
  """
  end_of_text = len(trained) - 1
  if trained[-1] != END_OF_TEXT:
    raise errors.UserError(
        f'the vocab.json of GPT-2 should end with {END_OF_TEXT}, but this one '
        f'ends with {trained[-1]}; give the file of GPT-2, without the pieces '
        'that CodeGen adds'
    )
  # Rows that the released models never trained serve the tasks.
  clm = len(trained) + len(CODEGEN_WHITESPACE)
  sentinels = tuple(range(clm + 1, clm + 1 + NUM_SENTINELS))
  match, tdec, cdec = range(sentinels[-1] + 1, sentinels[-1] + 4)
  if cdec >= _CODEGEN_VOCAB_SIZE:
    raise errors.UserError(
        f'the vocab.json of GPT-2 should have 50257 pieces, but this one has '
        f'{len(trained)}, which leaves no room in the {_CODEGEN_VOCAB_SIZE} '
        'rows of CodeGen; give the file of GPT-2'
    )

  special_names = {end_of_text: END_OF_TEXT, clm: CLM_NAME}
  special_names |= dict(zip(sentinels, SENTINEL_NAMES))
  special_names |= {match: MATCH_NAME, tdec: TDEC_NAME, cdec: CDEC_NAME}
  return Layout(
      vocab_size=_CODEGEN_VOCAB_SIZE,
      task_tokens=TaskTokens(
          pad=end_of_text,
          bos=None,
          eos=end_of_text,
          unk=end_of_text,
          clm=clm,
          match=match,
          tdec=tdec,
          cdec=cdec,
          sentinels=sentinels,
      ),
      special_names=special_names,
      whitespace=CODEGEN_WHITESPACE,
      released_specials=(ReleasedSpecial(END_OF_TEXT),),
      released_adds_ends=False,
  )
