"""Completes prompts, or fills their gaps, with a trained model."""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import tqdm

from codet5p_jax.arguments import did_you_mean
from codet5p_jax.decoding.beam_search import BeamSearch
from codet5p_jax.decoding.sampling import Sampling
from codet5p_jax.errors import UserError
from codet5p_jax.generation import (
    Completion,
    GenerationSettings,
    Generator,
)
from codet5p_jax.generation_requests import (
    CONTINUING_MODES,
    check_mode,
    choose_mode,
    make_request,
    takes_decoder_prompt,
)
from codet5p_jax.sample_file import open_sample_file
from codet5p_jax.tasks.by_name import task_name
from codet5p_jax.tasks.problem_files import read_rows
from codet5p_jax.tasks.prompts import Prompt, Task
from codet5p_jax.training.run_folder import read_metrics, write_result
from codet5p_jax.trained_model import TrainedModel, load_trained_model

_logger = logging.getLogger(__name__)

_PROMPT_FIELDS = ('prompt', 'prompt_id', 'decoder_prompt')


def generate(
    prompts: Sequence[str],
    run_dir: str,
    prompts_file: str | None = None,
    task: Task | None = None,
    problems: str | None = None,
    output: str | None = None,
    mode: str | None = None,
    num_samples: int = 1,
    temperature: float = 0.0,
    top_k: int = 50,
    top_p: float = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    max_new_tokens: int | None = 64,
    max_length: int | None = None,
    stop_strings: Sequence[str] = (),
    batch_size: int = 32,
    seed: int = 0,
    mesh_shape: Sequence[int] = (1, -1, 1),
    dtype: str | None = None,
    init_from: Sequence[Any] | None = None,
    operative_config: Callable[[], str] | None = None,
) -> list[Completion]:
  """Writes completions of prompts, one JSON object a line.

  Prompts come from the command line, from a file, or from a task's problems.

  Those of the command line are printed with their completions, and these go to
  `generation/outputs.jsonl` in the run's folder, which holds the newest call of
  each mode.

  Otherwise they go to `output`, batch by batch. The same command goes on where
  it was stopped: the file ends up as if it never had been, whatever stopped it.

  A row holds `prompt_id`, `prompt`, `decoder_prompt` (what the decoder was made
  to begin with, if anything), `mode`, `sample` (from 0 on), `completion`,
  `log_probability` (of the completion, natural logarithm), `num_tokens`,
  `ended` ("eos", "stop_string" or "length"), `step` (updates that the weights
  had seen) and `settings` (all that the completion depends on).

  Args:
    prompts: texts.
    run_dir: the folder of a trained run, or of a converted model.
    prompts_file: JSON lines or a JSON array, also gzipped; in each row
      `prompt`, and if wanted `prompt_id` (its number, from 0 on, otherwise) and
      `decoder_prompt`, what the decoder is made to begin with (see
      `make_request` in generation_requests.py).
    task: what makes prompts of `problems`.
    problems: a file of the task's problems.
    output: the file of samples.
    mode: the form of the prompts, see `make_request` in generation_requests.py;
      by default what suits the model, and "as_released" where a task is given
      to one that was converted.
    num_samples: completions of each prompt; of a beam search, the best ones.
    temperature: see `Sampling` in decoding/sampling.py; 0 takes the likeliest
      token each time.
    top_k: likewise.
    top_p: likewise.
    num_beams: more than 1 searches, see `BeamSearch` in
      decoding/beam_search.py, and draws nothing.
    length_penalty: likewise.
    early_stopping: likewise.
    max_new_tokens: tokens of a completion at most; of "infill", those of all
      gaps together. None for as many as other limits allow.
    max_length: of the decoder's prompt and completion together; None for none.
    stop_strings: a completion ends before the first of them that comes.
    batch_size: completions that grow at once.
    seed: of the random numbers.
    mesh_shape: (replica, data, model).
    dtype: of the computation; see `load_trained_model`.
    init_from: where frozen weights lie now; see `load_trained_model`.
    operative_config: gives the configuration that replays this run.

  Returns:
    The completions made in this call. Of "infill" they are the prompts with
    their gaps filled.

  Raises:
    UserError: there is no prompt, or one that is not what the mode needs, or
      the run folder or the output is not what it should be.
  """
  settings = GenerationSettings(
      num_samples=num_samples,
      sampling=Sampling(temperature, top_k, top_p),
      beam_search=(
          BeamSearch(num_beams, length_penalty, early_stopping)
          if num_beams != 1
          else None
      ),
      max_new_tokens=max_new_tokens,
      max_length=max_length,
      stop_strings=stop_strings,
      seed=seed,
  )
  given = _gather_prompts(prompts, prompts_file, task, problems, output)
  check_mode(mode, given)
  trained = load_trained_model(
      run_dir, mesh_shape, dtype=dtype, init_from=init_from, to_generate=True
  )
  mode = choose_mode(trained, mode, is_benchmark=task is not None)
  if mode == 'infill' and stop_strings:
    raise UserError(
        'expected no STOP_STRINGS where gaps are filled, whose texts end where '
        'the next gap begins, found some; leave them out'
    )
  if prompts_file and not takes_decoder_prompt(trained, mode):
    for prompt in given:
      if prompt.decoder_text is not None:
        raise UserError(
            f'expected no decoder_prompt in {mode}, where the decoder begins '
            f'by itself, found one of prompt {prompt.prompt_id}; leave it out '
            f'or set MODE'
        )
  requests = [make_request(trained, mode, prompt) for prompt in given]
  generator = Generator(trained, settings, requests, batch_size)
  told = _describe(trained, settings, given, mode, batch_size, task)
  rows = _Rows(trained, mode, {p.prompt_id: p for p in given}, told)
  if output is None:
    completions = _print(generator, rows)
    if operative_config is not None:
      folder = trained.folder.path / 'generation'
      write_result(folder / 'operative_config.gin', operative_config())
  else:
    completions = _write(generator, rows, output)
  _logger.info('Weights of step %d of %s.', trained.step, run_dir)
  return completions


def _gather_prompts(
    prompts: Sequence[str],
    prompts_file: str | None,
    task: Task | None,
    problems: str | None,
    output: str | None,
) -> list[Prompt]:
  """The prompts, from wherever they come."""
  if task is not None and not problems:
    raise UserError(
        'expected a file of problems for the task, found none; set PROBLEMS, '
        'or leave out the gin file of the task'
    )
  sources = [
      name
      for name, given in (
          ('words after the command', prompts),
          ('PROMPTS', prompts_file),
          ('PROBLEMS', problems),
      )
      if given
  ]
  if len(sources) != 1:
    raise UserError(
        f'expected prompts from one place, found {" and ".join(sources)}; '
        f'give one of them'
        if sources
        else 'expected a prompt, found none; write it after the command, as in '
        "codet5p generate 'def fibonacci(n):' ..., or set PROMPTS to a file"
    )
  if problems and task is None:
    raise UserError(
        'expected a task that makes prompts of PROBLEMS, found none; add its '
        'gin file, such as --gin_file=tasks/humaneval.gin'
    )
  if prompts:
    if output is not None:
      raise UserError(
          f'expected no OUTPUT for prompts after the command, which go into '
          f'the folder of the run, found {output}; put them in a file and set '
          f'PROMPTS'
      )
    if not all(prompts):
      raise UserError(
          'expected a prompt, found an empty one; write something in it'
      )
    return [Prompt(str(i), text) for i, text in enumerate(prompts)]
  if output is None:
    raise UserError(
        'expected a file for the samples, found none; set OUTPUT to one, such '
        'as OUTPUT=samples.jsonl'
    )
  if prompts_file:
    return _read_prompts(prompts_file)
  return [task.prompt(problem) for problem in task.read_problems(problems)]


def _read_prompts(path: str) -> list[Prompt]:
  """The prompts of a file; see `generate`."""
  prompts: dict[str, Prompt] = {}
  for number, row in enumerate(read_rows(path)):
    prompt_id = str(number)
    if 'prompt_id' in row.fields:
      prompt_id = str(row.field('prompt_id', str, int))
    if prompt_id in prompts:
      raise UserError(
          f'expected every prompt_id once in {path}, found {prompt_id} again '
          f'in {row.place}; give it another'
      )
    if not row.text('prompt'):
      raise UserError(
          f'expected a prompt, found an empty one in {row.place}; write '
          f'something in it or remove the row'
      )
    # Others are as their owner likes, but for those that mean one of these.
    missing = [name for name in _PROMPT_FIELDS if name not in row.fields]
    for name in row.fields.keys() - set(_PROMPT_FIELDS):
      if meant := did_you_mean(name, missing):
        raise UserError(
            f'expected the fields {", ".join(_PROMPT_FIELDS)}, found {name} in '
            f'{row.place}{meant}'
        )
    decoder_text = None
    if 'decoder_prompt' in row.fields:
      decoder_text = row.text('decoder_prompt')
      if not decoder_text:
        raise UserError(
            f'expected a decoder_prompt, found an empty one in {row.place}; '
            f'write something in it or leave it out'
        )
    prompts[prompt_id] = Prompt(prompt_id, row.text('prompt'), decoder_text)
  return list(prompts.values())


def _describe(
    trained: TrainedModel,
    settings: GenerationSettings,
    prompts: Sequence[Prompt],
    mode: str,
    batch_size: int,
    task: Task | None,
) -> dict[str, Any]:
  """All that completions depend on, in JSON values."""
  texts = json.dumps([dataclasses.astuple(prompt) for prompt in prompts])
  return {
      **dataclasses.asdict(settings),
      'mode': mode,
      'batch_size': batch_size,
      'mesh_shape': list(trained.train_step.mesh.shape.values()),
      'dtype': trained.train_step.config.computation.dtype,
      'backend': jax.default_backend(),
      'jax_version': jax.__version__,
      'run_dir': str(trained.folder.path.resolve()),
      'step': trained.step,
      'prompts': hashlib.sha256(texts.encode()).hexdigest()[:16],
      # So that `postprocess` need not be told again.
      'task': task and {'name': task_name(task), **dataclasses.asdict(task)},
  }


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Makes rows of completions."""

  trained: TrainedModel
  mode: str
  prompts: dict[str, Prompt]
  settings: dict[str, Any]

  def row(self, completion: Completion) -> dict[str, Any]:
    values = dataclasses.asdict(completion)
    prompt = self.prompts[completion.prompt_id]
    forced = {'decoder_prompt': prompt.decoder_text}
    return {
        'prompt_id': values.pop('prompt_id'),
        'prompt': prompt.encoder_text,
        **(forced if prompt.decoder_text is not None else {}),
        'mode': self.mode,
        'sample': values.pop('sample'),
        'completion': values.pop('text'),
        **values,
        'step': self.trained.step,
        'settings': self.settings,
    }


def _print(generator: Generator, rows: _Rows) -> list[Completion]:
  """Prints prompts with their completions, and keeps them."""
  completions = []
  for made in _complete(generator, 0):
    for completion in made:
      prompt = rows.prompts[completion.prompt_id].encoder_text
      is_continued = rows.mode in CONTINUING_MODES
      print((prompt if is_continued else '') + completion.text)
      print()
    completions += made
  path = rows.trained.folder.path / 'generation' / 'outputs.jsonl'
  kept = [
      row
      for row in read_metrics(path)
      if row['mode'] != rows.mode and 'settings' in row
  ]
  kept += [rows.row(completion) for completion in completions]
  write_result(path, ''.join(f'{json.dumps(row)}\n' for row in kept))
  _logger.info('Kept in %s, in place of the last %s.', path, rows.mode)
  return completions


def _write(
    generator: Generator, rows: _Rows, output: str
) -> list[Completion]:
  """Adds to the file of samples what is missing in it."""
  completions = []
  names = [batch.names() for batch in generator.batches]
  with open_sample_file(output, names, rows.settings) as file:
    if file.batches_done:
      done = sum(map(len, names[: file.batches_done]))
      total = sum(map(len, names))
      if done < total:
        _logger.info('Going on after %d of %d samples.', done, total)
      else:
        _logger.info('All of the %d samples are there.', total)
    for made in _complete(generator, file.batches_done):
      file.append([rows.row(completion) for completion in made])
      completions += made
  _logger.info('Samples in %s.', output)
  return completions


def _complete(
    generator: Generator, batches_done: int
) -> Iterator[list[Completion]]:
  """Yields the completions of each further batch; shows how fast they come."""
  sizes = [len(batch.names()) for batch in generator.batches]
  count, began = 0, time.monotonic()
  with tqdm.tqdm(
      total=sum(sizes),
      initial=sum(sizes[:batches_done]),
      desc='generating',
      unit='sample',
      delay=2.0,  # A few prompts of a small model need no bar.
      miniters=0,  # Speed is told amid a sample, too.
  ) as progress:

    def tell(tokens: int) -> None:
      nonlocal count
      count += tokens
      speed = count / max(time.monotonic() - began, 1e-9)
      progress.set_postfix_str(f'{speed:,.0f} tokens/s', refresh=False)
      progress.update(0)

    for batch in generator.batches[batches_done:]:
      made = generator.complete(batch, tell)
      yield made
      progress.update(len(made))
