"""Prompts in the form that a model knows, by what it was trained for."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from codet5p_jax.data.vocabularies import Vocabulary
from codet5p_jax.decoding.infilling import (
    gap_answers,
    infilling_source,
    split_at_gaps,
)
from codet5p_jax.errors import UserError
from codet5p_jax.models.bimodal import BimodalConfig
from codet5p_jax.tasks.prompts import Prompt
from codet5p_jax.trained_model import TrainedModel

MODES = (
    'decoder_only',
    'encoder_decoder',
    'encoder_and_decoder',
    'seq2seq_causal_lm',
    'infill',
    'as_released',
    'text_to_code',
    'code_to_text',
)
# In these the completion follows the prompt.
CONTINUING_MODES = (
    'decoder_only', 'encoder_and_decoder', 'seq2seq_causal_lm', 'as_released'
)  # fmt: skip

# What each objective of pre-training teaches.
_MODE_OF = {
    'causal_lm': 'decoder_only',
    'seq2seq_causal_lm': 'seq2seq_causal_lm',
    'span_denoising': 'infill',
}
# What stage 2 teaches, by the names of its losses; and the field of the
# model with the token that the decoder begins with.
_TASK_TOKEN_OF = {
    'text_to_code': 'code_decoder_id',
    'code_to_text': 'text_decoder_id',
}


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt as tokens.

  Attributes:
    prompt_id: what tells it from others; its random numbers follow from it.
    source: encoder input tokens.
    target: decoder input tokens to go on from, one or more.
    render: the text of generated tokens, without an end token.
  """

  prompt_id: str
  source: tuple[int, ...]
  target: tuple[int, ...]
  render: Callable[[Sequence[int]], str]


def check_mode(mode: str | None, prompts: Sequence[Prompt]) -> None:
  """Checks what needs no model to be seen, before one is loaded.

  Raises:
    UserError: there is no such mode, or a prompt for "infill" has no gap.
  """
  if mode is not None and mode not in MODES:
    raise UserError(
        f'expected a mode among {", ".join(MODES)}, found {mode!r}; set MODE'
    )
  if mode == 'infill':
    for prompt in prompts:
      split_at_gaps(prompt.encoder_text)


def choose_mode(
    trained: TrainedModel, mode: str | None, is_benchmark: bool = False
) -> str:
  """The mode asked for, or the first of those that suit a model.

  Args:
    trained: the model.
    mode: asked for; None for what suits it.
    is_benchmark: whether a model that was not trained here is to be asked as
      the released ones were evaluated.

  Raises:
    UserError: the model was not trained to be used so, or has no decoder.
  """
  model = trained.train_step.config.model
  stacks = model.head_counts()
  if 'decoder' not in stacks:
    raise UserError(
        f'expected a model with a decoder, found {type(model).__name__}, which '
        f'has none; give the folder of another'
    )
  objectives = {o.name: o for o in trained.train_step.config.objectives}
  trained_for = list(objectives)
  taught = [m for name, m in _MODE_OF.items() if name in trained_for]
  if 'encoder' not in stacks:
    fitting = ['decoder_only']
  elif model.prompt_to_decoder:
    # The encoder of a released one has never seen a task token.
    fitting = ['encoder_and_decoder', *taught]
  elif 'bimodal' in objectives:
    # What it may have begun with, it has not been trained on since.
    losses = objectives['bimodal'].losses
    fitting = [mode for mode in _TASK_TOKEN_OF if mode in losses] + taught
    if not fitting:
      raise UserError(
          f'expected a model that was trained to write, found one of '
          f'{" and ".join(losses)} alone; give the folder of another'
      )
  elif trained_for == ['sequence_to_sequence']:
    fitting = ['encoder_decoder', *_MODE_OF.values()]
  else:
    fitting = ['decoder_only', 'encoder_decoder', 'seq2seq_causal_lm', 'infill']
    if isinstance(model, BimodalConfig) and not trained_for:  # A released one.
      fitting = [*_TASK_TOKEN_OF, *fitting]
  if 'encoder' in stacks and trained.vocabulary.kind != 'sentencepiece':
    fitting.append('as_released')
  if mode is None:
    is_released = 'as_released' in fitting and not trained_for
    return 'as_released' if is_benchmark and is_released else fitting[0]
  if mode not in fitting:
    raise UserError(
        f'expected MODE={" or ".join(fitting)} for {type(model).__name__} as '
        f'it was trained, found {mode}; set MODE={fitting[0]}'
    )
  return mode


def takes_decoder_prompt(trained: TrainedModel, mode: str) -> bool:
  """Whether a prompt for the decoder alone has any effect."""
  model = trained.train_step.config.model
  return mode != 'infill' and (
      mode != 'as_released' or model.prompt_to_decoder
  )


def make_request(trained: TrainedModel, mode: str, prompt: Prompt) -> Request:
  """Makes tokens of a prompt.

  Args:
    trained: the model.
    mode: "decoder_only" gives the prompt to the decoder, which continues it;
      "seq2seq_causal_lm" gives it to the encoder, and the decoder continues
      it; "encoder_decoder" gives it to the encoder, and the decoder answers;
      "encoder_and_decoder" gives it to both, as models with a frozen decoder
      need it; "infill" fills the gaps of a prompt, marked <extra_id_0>,
      <extra_id_1> and so on; "text_to_code" and "code_to_text" give a bimodal
      model's encoder one side, and its decoder writes the other, told which by
      the token that it begins with. "as_released" gives it as the released
      models were evaluated: to the encoder as their tokenizers encode it, and
      to a frozen decoder too, without a start token (spec 7.1, T14).
    prompt: texts for encoder and decoder. One for the decoder stands before
      what it writes, if the mode `takes_decoder_prompt`; without one, a
      decoder that gets the prompt gets the encoder's.

  Raises:
    UserError: a prompt for "infill" has no gap.
  """
  model, vocabulary = trained.train_step.config.model, trained.vocabulary
  ids, start = vocabulary.task_tokens, model.decoder_start_id
  render = vocabulary.decode
  begin = [] if ids.bos is None else [ids.bos]
  text, forced = prompt.encoder_text, prompt.decoder_text
  continued = text if forced is None else forced
  if mode == 'infill':
    texts = split_at_gaps(text)
    source = infilling_source(texts, vocabulary)
    target = [start, *begin, ids.sentinel(0)]
    render = functools.partial(_fill, texts, vocabulary)
  elif mode == 'as_released':
    source, target = vocabulary.encode_as_released(text), [start]
    if model.prompt_to_decoder:
      target = vocabulary.encode_as_released(continued)
  elif mode == 'decoder_only':
    source, target = [ids.clm], [start, *begin, *vocabulary.encode(continued)]
  elif mode == 'seq2seq_causal_lm':
    source = [ids.clm, *begin, *vocabulary.encode(text)]
    target = [start, *begin, *vocabulary.encode(forced or '')]
  elif mode == 'encoder_decoder' or mode in _TASK_TOKEN_OF:
    source = [*begin, *vocabulary.encode(text), ids.eos]
    if mode in _TASK_TOKEN_OF:
      begin = [getattr(model, _TASK_TOKEN_OF[mode])]
    target = [start, *begin, *vocabulary.encode(forced or '')]
  else:  # As SequenceToSequence trains models that get the prompt twice.
    source = vocabulary.encode(text)
    target = [start, *vocabulary.encode(continued)]
  return Request(prompt.prompt_id, tuple(source), tuple(target), render)


def _fill(
    texts: Sequence[str], vocabulary: Vocabulary, generated: Sequence[int]
) -> str:
  """The prompt with its gaps filled."""
  ids = vocabulary.task_tokens
  answers = gap_answers([ids.sentinel(0), *generated], ids)
  filled = texts[0]
  for gap, text in enumerate(texts[1:]):
    filled += vocabulary.decode(answers.get(gap, [])) + text
  return filled
