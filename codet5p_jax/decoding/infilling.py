"""Prompts with gaps, in the form of span denoising (paper, section 3.1).

The source holds a sentinel for each gap; the target names each sentinel and
then gives the text of its gap. `vocabulary.encode` never yields a special id,
so the markers of a prompt are found here.
"""

import re
from collections.abc import Mapping, Sequence

from codet5p_jax.data.task_tokens import TaskTokens
from codet5p_jax.data.vocabularies import Vocabulary
from codet5p_jax.errors import UserError

_MARKER = re.compile(r'<extra_id_(\d+)>')


def split_at_gaps(prompt: str) -> list[str]:
  """The texts before, between and after the gaps of a prompt.

  >>> split_at_gaps('a = <extra_id_0> + <extra_id_1>')
  ['a = ', ' + ', '']

  Raises:
    UserError: there is no gap, or they are not numbered 0, 1, 2, ... in order.
  """
  texts, numbers = _MARKER.split(prompt)[::2], _MARKER.findall(prompt)
  if not numbers:
    raise UserError(
        f'expected <extra_id_0> in the prompt where text is missing, found '
        f'none in {prompt[:40]!r}; put it there, and <extra_id_1> and so on '
        f'at further gaps'
    )
  if numbers != [str(k) for k in range(len(numbers))]:
    raise UserError(
        f'expected the gaps of a prompt to be numbered from <extra_id_0> on, '
        f'found {", ".join(f"<extra_id_{n}>" for n in numbers)}; number them '
        f'in order, each once'
    )
  return texts


def infilling_source(
    texts: Sequence[str], vocabulary: Vocabulary
) -> list[int]:
  """Encoder tokens of the texts around gaps, a sentinel in each gap.

  Args:
    texts: see `split_at_gaps`.
    vocabulary: of the model.

  Raises:
    UserError: there are more gaps than sentinels.
  """
  task_tokens = vocabulary.task_tokens
  source = [] if task_tokens.bos is None else [task_tokens.bos]
  source += vocabulary.encode(texts[0])
  for gap, text in enumerate(texts[1:]):
    source += [task_tokens.sentinel(gap), *vocabulary.encode(text)]
  return [*source, task_tokens.eos]


def gap_answers(
    target: Sequence[int], task_tokens: TaskTokens
) -> Mapping[int, list[int]]:
  """The tokens for each gap, cut at the sentinels and at the end token.

  >>> ids = TaskTokens(pad=0, bos=1, eos=2, unk=3, clm=3, match=4, tdec=5,
  ...                  cdec=6, sentinels=(99, 98, 97))
  >>> gap_answers([99, 17, 18, 98, 19, 2], ids)
  {0: [17, 18], 1: [19]}

  Args:
    target: what the decoder made, sentinel 0 first. A gap that it answers
      twice keeps the first answer.
    task_tokens: ids by role.
  """
  gaps = {token: gap for gap, token in enumerate(task_tokens.sentinels)}
  answers: dict[int, list[int]] = {}
  answer: list[int] = []
  for token in target:
    if token == task_tokens.eos:
      break
    if token in gaps:
      answer = []
      answers.setdefault(gaps[token], answer)
    else:
      answer.append(token)
  return answers
