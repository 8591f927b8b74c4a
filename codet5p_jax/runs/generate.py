"""Continues prompts with a trained model."""

import logging
from collections.abc import Callable, Sequence

import numpy as np

from codet5p_jax.decoding.greedy import greedy_decode
from codet5p_jax.errors import UserError
from codet5p_jax.training.run_folder import write_result
from codet5p_jax.training.trained_model import TrainedModel, load_trained_model

_logger = logging.getLogger(__name__)

MODES = ('decoder_only', 'encoder_decoder')


def generate(
    prompts: Sequence[str],
    run_dir: str,
    mode: str = 'decoder_only',
    max_new_tokens: int = 64,
    mesh_shape: Sequence[int] = (1, -1, 1),
    operative_config: Callable[[], str] | None = None,
) -> list[str]:
  """Prints the likeliest continuation of each prompt, token by token.

  Args:
    prompts: texts.
    run_dir: the folder of a trained run.
    mode: "decoder_only" gives the prompt to the decoder, which continues it;
      "encoder_decoder" gives it to the encoder, and the decoder answers.
    max_new_tokens: tokens to generate at most.
    mesh_shape: (replica, data, model).
    operative_config: gives the configuration that replays this run.

  Returns:
    The generated texts, without the prompts.

  Raises:
    UserError: there is no prompt, or the run folder is not what it should be.
  """
  if not prompts or not all(prompts):
    raise UserError(
        'expected a prompt, found none; write it after the command: codet5p '
        "generate 'def fibonacci(n):' ..."
    )
  if mode not in MODES:
    raise UserError(
        f'expected a mode among {", ".join(MODES)}, found {mode!r}; set MODE'
    )
  if max_new_tokens < 1:
    raise UserError(
        f'expected to generate at least one token, found {max_new_tokens}; set '
        f'MAX_NEW_TOKENS'
    )
  trained = load_trained_model(run_dir, mesh_shape)
  texts = []
  for prompt in prompts:
    text = _continue(trained, prompt, mode, max_new_tokens)
    texts.append(text)
    print(prompt + text if mode == 'decoder_only' else text)
    print()
  if operative_config is not None:
    folder = trained.folder.path / 'generation'
    write_result(folder / 'operative_config.gin', operative_config())
  _logger.info('Weights of step %d of %s.', trained.step, run_dir)
  return texts


def _continue(
    trained: TrainedModel, prompt: str, mode: str, max_new_tokens: int
) -> str:
  task_tokens = trained.vocabulary.task_tokens
  model = trained.train_step.model
  tokens = trained.vocabulary.encode(prompt)
  before = [] if task_tokens.bos is None else [task_tokens.bos]
  if mode == 'decoder_only':
    source = [task_tokens.clm]
    given = [model.config.decoder_start_id, *before, *tokens]
  else:
    source = [*before, *tokens, task_tokens.eos]
    given = [model.config.decoder_start_id, *before]
  row = np.full((1, len(given) + max_new_tokens), -1, np.int32)
  row[0, : len(given)] = given
  decoded = greedy_decode(
      model,
      trained.all_params,
      np.array([source], np.int32),
      row,
      task_tokens.eos,
  )
  generated = [int(t) for t in np.asarray(decoded)[0, len(given) :] if t >= 0]
  return trained.vocabulary.decode(generated)
