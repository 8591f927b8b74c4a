"""Continues prompts, or fills their gaps, with a trained model."""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from codet5p_jax.decoding.greedy import greedy_decode
from codet5p_jax.decoding.infilling import (
    gap_answers,
    infilling_source,
    split_at_gaps,
)
from codet5p_jax.errors import UserError
from codet5p_jax.training.run_folder import read_metrics, write_result
from codet5p_jax.trained_model import TrainedModel, load_trained_model

_logger = logging.getLogger(__name__)

MODES = (
    'decoder_only',
    'encoder_decoder',
    'encoder_and_decoder',
    'seq2seq_causal_lm',
    'infill',
)
# What each objective of pre-training teaches.
_MODE_OF = {
    'causal_lm': 'decoder_only',
    'seq2seq_causal_lm': 'seq2seq_causal_lm',
    'span_denoising': 'infill',
}
# In these the text follows the prompt.
_CONTINUING_MODES = (
    'decoder_only', 'encoder_and_decoder', 'seq2seq_causal_lm'
)  # fmt: skip


def generate(
    prompts: Sequence[str],
    run_dir: str,
    mode: str | None = None,
    max_new_tokens: int = 64,
    mesh_shape: Sequence[int] = (1, -1, 1),
    dtype: str | None = None,
    init_from: Sequence[Any] | None = None,
    operative_config: Callable[[], str] | None = None,
) -> list[str]:
  """Prints the likeliest text for each prompt, token by token.

  The texts also go to `generation/outputs.jsonl` in the run's folder, a JSON
  object a line: `prompt`, `mode`, `text` as returned, and `step`, the updates
  that the weights had seen. It holds the newest call of each mode.

  Args:
    prompts: texts.
    run_dir: the folder of a trained run, or of a converted model.
    mode: "decoder_only" gives the prompt to the decoder, which continues it;
      "seq2seq_causal_lm" gives it to the encoder, and the decoder continues
      it; "encoder_decoder" gives it to the encoder, and the decoder answers;
      "encoder_and_decoder" gives it to both, as models with a frozen decoder
      need it;
      "infill" fills the gaps of a prompt, marked <extra_id_0>, <extra_id_1>
      and so on. A model does well in the forms that it was trained on. By
      default "encoder_and_decoder" for models that need it,
      "encoder_decoder" for others that were trained on pairs alone, else
      "decoder_only".
    max_new_tokens: tokens to generate at most, those of all gaps together.
    mesh_shape: (replica, data, model).
    dtype: of the computation; see `load_trained_model`.
    init_from: where frozen weights lie now; see `load_trained_model`.
    operative_config: gives the configuration that replays this run.

  Returns:
    The generated texts: without the prompts, but of "infill" the prompts with
    their gaps filled.

  Raises:
    UserError: there is no prompt, or one without a gap to fill, or the run
      folder is not what it should be.
  """
  if not prompts or not all(prompts):
    raise UserError(
        'expected a prompt, found none; write it after the command: codet5p '
        "generate 'def fibonacci(n):' ..."
    )
  if mode is not None and mode not in MODES:
    raise UserError(
        f'expected a mode among {", ".join(MODES)}, found {mode!r}; set MODE'
    )
  if max_new_tokens < 1:
    raise UserError(
        f'expected to generate at least one token, found {max_new_tokens}; set '
        f'MAX_NEW_TOKENS'
    )
  if mode == 'infill':
    for prompt in prompts:
      split_at_gaps(prompt)  # A prompt without a gap is told before all else.
  trained = load_trained_model(
      run_dir, mesh_shape, dtype=dtype, init_from=init_from
  )
  mode = _mode_for(trained, mode)
  texts = []
  for prompt in prompts:
    if mode == 'infill':
      text = _fill(trained, prompt, max_new_tokens)
    else:
      text = _continue(trained, prompt, mode, max_new_tokens)
    texts.append(text)
    print(prompt + text if mode in _CONTINUING_MODES else text)
    print()
  _write_outputs(trained, prompts, mode, texts)
  if operative_config is not None:
    folder = trained.folder.path / 'generation'
    write_result(folder / 'operative_config.gin', operative_config())
  _logger.info('Weights of step %d of %s.', trained.step, run_dir)
  return texts


def _mode_for(trained: TrainedModel, mode: str | None) -> str:
  """The mode asked for, or the first of those that suit a model.

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
  trained_for = [o.name for o in trained.train_step.config.objectives]
  if 'encoder' not in stacks:
    fitting = ['decoder_only']
  elif model.prompt_to_decoder:
    # The encoder of a released one has never seen a task token.
    fitting = ['encoder_and_decoder']
    fitting += [m for name, m in _MODE_OF.items() if name in trained_for]
  else:
    answers = trained_for == ['sequence_to_sequence']
    default = 'encoder_decoder' if answers else 'decoder_only'
    aside = (default, 'encoder_and_decoder')
    fitting = [default, *(m for m in MODES if m not in aside)]
  if mode is None:
    return fitting[0]
  if mode not in fitting:
    raise UserError(
        f'expected MODE={" or ".join(fitting)} for {type(model).__name__} as '
        f'it was trained, found {mode}; set MODE={fitting[0]}'
    )
  return mode


def _continue(
    trained: TrainedModel, prompt: str, mode: str, max_new_tokens: int
) -> str:
  task_tokens = trained.vocabulary.task_tokens
  tokens = trained.vocabulary.encode(prompt)
  begin = [] if task_tokens.bos is None else [task_tokens.bos]
  source, target = {
      'decoder_only': ([task_tokens.clm], [*begin, *tokens]),
      'seq2seq_causal_lm': ([task_tokens.clm, *begin, *tokens], begin),
      'encoder_decoder': ([*begin, *tokens, task_tokens.eos], begin),
      'encoder_and_decoder': (tokens, tokens),  # As SequenceToSequence trains.
  }[mode]
  generated = _generate(trained, source, target, max_new_tokens)
  return trained.vocabulary.decode(generated)


def _fill(trained: TrainedModel, prompt: str, max_new_tokens: int) -> str:
  vocabulary = trained.vocabulary
  task_tokens = vocabulary.task_tokens
  texts = split_at_gaps(prompt)
  begin = [] if task_tokens.bos is None else [task_tokens.bos]
  first = task_tokens.sentinel(0)
  source = infilling_source(texts, vocabulary)
  generated = _generate(trained, source, [*begin, first], max_new_tokens)
  answers = gap_answers([first, *generated], task_tokens)
  filled = texts[0]
  for gap, text in enumerate(texts[1:]):
    filled += vocabulary.decode(answers.get(gap, [])) + text
  return filled


def _generate(
    trained: TrainedModel,
    source: Sequence[int],
    target: Sequence[int],
    max_new_tokens: int,
) -> list[int]:
  """Tokens that follow the beginning of a target, the end token included."""
  model = trained.train_step.model
  given = [model.config.decoder_start_id, *target]
  row = np.full((1, len(given) + max_new_tokens), -1, np.int32)
  row[0, : len(given)] = given
  decoded = greedy_decode(
      model,
      trained.all_params,
      np.array([source], np.int32),
      row,
      trained.vocabulary.task_tokens.eos,
  )
  return [int(t) for t in np.asarray(decoded)[0, len(given) :] if t >= 0]


def _write_outputs(
    trained: TrainedModel,
    prompts: Sequence[str],
    mode: str,
    texts: Sequence[str],
) -> None:
  path = trained.folder.path / 'generation' / 'outputs.jsonl'
  rows = [row for row in read_metrics(path) if row['mode'] != mode]
  rows += [
      {'prompt': prompt, 'mode': mode, 'text': text, 'step': trained.step}
      for prompt, text in zip(prompts, texts, strict=True)
  ]
  write_result(path, ''.join(f'{json.dumps(row)}\n' for row in rows))
