"""Prompts to completions, in batches, with a model that was trained.

What a completion is depends on the model, the settings, its prompt and its
number alone: random numbers are keyed by prompt and sample, and what shares a
batch is a function of the prompts and settings, so that even the last digit of
a probability is the same when a batch is made again.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codet5p_jax.decoding.beam_search import BeamSearch, BeamSearcher
from codet5p_jax.decoding.prefill import Prompts
from codet5p_jax.decoding.sampler import Sampler, row_keys
from codet5p_jax.decoding.sampling import Sampling
from codet5p_jax.decoding.stopping import cut_at_stop, tokens_until_stop
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.generation_requests import Request
from codet5p_jax.sharding import batch_axes_size
from codet5p_jax.tasks.prompts import check_stop_strings
from codet5p_jax.trained_model import TrainedModel

# Kept, so that what they compiled serves who asks for the same again.
_make_sampler = functools.lru_cache(maxsize=8)(Sampler)
_make_searcher = functools.lru_cache(maxsize=8)(BeamSearcher)

# How often the text so far is looked at: to find stop strings, and to tell.
_TOKENS_AT_ONCE = 32

_BUCKET = 16

# CPUs say it, other devices have a word for it.
_OUT_OF_MEMORY = re.compile('out of memory|RESOURCE_EXHAUSTED', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
  """How prompts are completed.

  Attributes:
    num_samples: completions of each prompt; with `beam_search` the best ones.
    sampling: how tokens are drawn.
    beam_search: to search instead of drawing.
    max_new_tokens: of a completion; None for no limit but the next one.
    max_length: of the decoder's prompt and completion together, in tokens, the
      start token included; None for no limit.
    stop_strings: a completion ends before the first of them that comes.
    seed: of the random numbers.

  Raises:
    UserError: a value is none that makes sense.
  """

  num_samples: int = 1
  sampling: Sampling = Sampling(temperature=0.0)
  beam_search: BeamSearch | None = None
  max_new_tokens: int | None = 64
  max_length: int | None = None
  stop_strings: Sequence[str] = ()
  seed: int = 0

  def __post_init__(self):
    require_positive(
        num_samples=self.num_samples,
        max_new_tokens=self.max_new_tokens,
        max_length=self.max_length,
    )
    if self.max_new_tokens is None and self.max_length is None:
      raise UserError(
          'expected a limit to the tokens of a completion, found none; set '
          'MAX_NEW_TOKENS or MAX_LENGTH'
      )
    check_stop_strings(self.stop_strings)
    object.__setattr__(self, 'stop_strings', tuple(self.stop_strings))
    if self.beam_search is not None:  # Which draws nothing.
      object.__setattr__(self, 'sampling', Sampling(temperature=0.0))
    beams = self.beam_search and self.beam_search.num_beams
    if beams and self.num_samples > beams:
      raise UserError(
          f'expected as many samples as beams or fewer, found '
          f'{self.num_samples} samples of {beams} beams; set NUM_SAMPLES or '
          f'NUM_BEAMS'
      )
    if not beams and not self.sampling.temperature and self.num_samples > 1:
      raise UserError(
          f'expected a temperature above 0 to draw {self.num_samples} samples '
          f'of a prompt, which would all be the same; set TEMPERATURE or '
          f'NUM_SAMPLES'
      )


@dataclasses.dataclass(frozen=True)
class Completion:
  """What was generated from a prompt.

  Attributes:
    prompt_id: of the prompt.
    sample: its number among those of the prompt, from 0 on; of beam search the
      rank.
    text: up to a stop string.
    ended: "eos", "stop_string" or "length".
    num_tokens: generated, an end token and those of a stop string included.
    log_probability: of these together, in the model's own distribution,
      natural logarithm; of beam search, of all that was searched, whatever
      a stop string cut.
  """

  prompt_id: str
  sample: int
  text: str
  ended: str
  num_tokens: int
  log_probability: float


@dataclasses.dataclass(frozen=True)
class Batch:
  """What is generated at once: the same samples of some prompts.

  Where a prompt has more samples than one batch takes, its batches follow one
  another, and it is read once for all of them.

  Attributes:
    requests: the prompts.
    first_sample: number of the first sample of each.
    num_samples: of each.
  """

  requests: tuple[Request, ...]
  first_sample: int
  num_samples: int

  def names(self) -> list[tuple[str, int]]:
    """Prompt and sample of each completion, in order."""
    samples = range(self.first_sample, self.first_sample + self.num_samples)
    return [(r.prompt_id, sample) for r in self.requests for sample in samples]


class Generator:
  """A trained model that completes prompts.

  Args:
    trained: loaded to generate.
    settings: how.
    requests: the prompts.
    batch_size: completions that grow at once, or beams; more where one prompt
      or the mesh needs more.

  Attributes:
    batches: what `complete` takes, in the order of the prompts.

  Raises:
    UserError: a prompt leaves no room for a completion.
  """

  def __init__(
      self,
      trained: TrainedModel,
      settings: GenerationSettings,
      requests: Sequence[Request],
      batch_size: int,
  ):
    require_positive(batch_size=batch_size)
    self._trained, self._settings = trained, settings
    self._limits = {r.prompt_id: self._limit(r) for r in requests}
    step = trained.train_step
    model, mesh = step.model, step.mesh
    self._params = trained.all_params
    eos_id = trained.vocabulary.task_tokens.eos
    search = settings.beam_search
    if search is None:
      calls = -(-settings.num_samples // batch_size)
      self._rows = -(-settings.num_samples // calls)
      self._sampler = _make_sampler(model, settings.sampling, eos_id, mesh)
      self._reading = None
    else:
      self._rows = search.num_beams
      self._searcher = _make_searcher(model, search, eos_id, mesh)
    # Prompts are spread over the mesh, each with all of its rows.
    shards = batch_axes_size(mesh)
    prompts = min(batch_size // self._rows, len(requests))
    self._prompts = max(-(-prompts // shards), 1) * shards
    at_once = settings.num_samples if search else self._rows
    self.batches = [
        Batch(
            tuple(requests[first : first + self._prompts]),
            sample,
            min(at_once, settings.num_samples - sample),
        )
        for first in range(0, len(requests), self._prompts)
        for sample in range(0, settings.num_samples, at_once)
    ]

  def complete(
      self, batch: Batch, tell: Callable[[int], None] = lambda count: None
  ) -> list[Completion]:
    """Generates the completions of a batch, in the order of its names.

    Args:
      batch: one of `batches`.
      tell: is called now and then with the number of tokens generated since.

    Raises:
      UserError: the memory is too small.
    """
    prompts, limits = self._arrange(batch.requests)
    try:
      if self._settings.beam_search is not None:
        rows = self._search(batch, prompts, limits)
        tell(sum(len(tokens) for tokens, _ in rows))
      else:
        rows = self._sample(batch, prompts, limits, tell)
    except jax.errors.JaxRuntimeError as error:
      if not _OUT_OF_MEMORY.search(str(error)):
        raise
      longest = max(
          batch.requests, key=lambda r: max(len(r.source), len(r.target))
      )
      raise UserError(
          f'expected a batch that fits the memory, found {self._prompts} '
          f'prompts with {self._rows} completions each, the longest of '
          f'{max(len(longest.source), len(longest.target))} tokens (prompt '
          f'{longest.prompt_id}); lower BATCH_SIZE or MAX_NEW_TOKENS, or '
          f'shorten it'
      ) from error
    requests = [r for r in batch.requests for _ in range(batch.num_samples)]
    return [
        self._finish(request, sample, tokens, log_probabilities)
        for request, (_, sample), (tokens, log_probabilities) in zip(
            requests, batch.names(), rows, strict=True
        )
    ]

  def _arrange(
      self, requests: Sequence[Request]
  ) -> tuple[Prompts, np.ndarray]:
    """Pads prompts to a shape that other batches have too.

    Returns:
      The prompts, as many as this generates from at once, and the tokens that
      the rows of each may have.
    """
    model = self._trained.train_step.config.model
    limits = [self._limits[request.prompt_id] for request in requests]
    # In places of prompts that are missing, one token is generated.
    missing = self._prompts - len(requests)
    requests = [*requests, *missing * requests[-1:]]
    limits += [1] * missing

    def pad(rows: list[tuple[int, ...]]) -> np.ndarray:
      padded = np.full(
          (len(rows), _bucket(max(map(len, rows)))), model.pad_id, np.int32
      )
      for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
      return padded

    targets = [request.target for request in requests]
    sources = [request.source for request in requests]
    has_encoder = 'encoder' in model.head_counts()
    prompts = Prompts(
        pad(sources) if has_encoder else np.array(sources, np.int32),
        pad(targets),
        np.array([len(target) for target in targets], np.int32),
    )
    return prompts, np.array(limits, np.int32)

  def _limit(self, request: Request) -> int:
    """Tokens that each completion of a prompt may have."""
    settings = self._settings
    limits = []
    if settings.max_new_tokens is not None:
      limits.append(settings.max_new_tokens)
    of_model = self._trained.train_step.config.model.max_length
    for length, name in ((settings.max_length, 'MAX_LENGTH'),
                         (of_model, 'the model')):  # fmt: skip
      if length is None:
        continue
      if len(request.target) >= length:
        raise UserError(
            f'expected a prompt of fewer tokens than the {length} that {name} '
            f'allows with its completion, found {len(request.target)} in '
            f'prompt {request.prompt_id}; shorten it'
        )
      limits.append(length - len(request.target))
    if of_model is not None and len(request.source) > of_model:
      raise UserError(
          f'expected a prompt of at most the {of_model} tokens that the model '
          f'allows, found {len(request.source)} in prompt '
          f'{request.prompt_id}; shorten it'
      )
    return min(limits)

  def _sample(
      self,
      batch: Batch,
      prompts: Prompts,
      limits: np.ndarray,
      tell: Callable[[int], None],
  ) -> list[tuple[list[int], list[float]]]:
    """Tokens of each completion, and their log-probabilities."""
    numbers = [prompt_number(r.prompt_id) for r in batch.requests]
    numbers += [0] * (self._prompts - len(numbers))
    keys = row_keys(
        jax.random.key(self._settings.seed),
        jnp.array(numbers, jnp.uint32),
        batch.first_sample,
        self._rows,
    )
    max_new_tokens = _bucket(int(limits.max()))
    samples = self._sampler.begin(
        *self._read(batch, prompts), keys, limits, max_new_tokens=max_new_tokens
    )
    wanted = [
        prompt * self._rows + sample
        for prompt in range(len(batch.requests))
        for sample in range(batch.num_samples)
    ]
    told = until = 0
    while True:
      until = min(until + _TOKENS_AT_ONCE, max_new_tokens)
      samples = self._sampler.go_on(self._params, samples, until)
      tokens, is_done = jax.device_get((samples.tokens, samples.is_done))
      count = int(np.sum(tokens[wanted] >= 0))
      tell(count - told)
      told = count
      is_done = is_done | self._has_stop(batch, tokens, is_done)
      if is_done.all():
        break
      # Where it was, lest another program be compiled.
      samples = samples.replace(
          is_done=jax.device_put(is_done, samples.is_done.sharding)
      )
    log_probabilities = jax.device_get(samples.log_probabilities)
    rows = []
    for row in wanted:
      count = int(np.sum(tokens[row] >= 0))
      rows.append((
          tokens[row, :count].tolist(), log_probabilities[row, :count].tolist()
      ))
    return rows

  def _read(self, batch: Batch, prompts: Prompts) -> tuple[Any, Any]:
    """What the model makes of prompts; kept until their last samples."""
    if self._reading is None or self._reading[0] != batch.requests:
      self._reading = None  # Before the next is made, lest both are held.
      self._reading = (
          batch.requests, self._sampler.read(self._params, prompts)
      )
    _, reading = self._reading
    if batch.first_sample + batch.num_samples == self._settings.num_samples:
      self._reading = None
    return reading

  def _has_stop(
      self, batch: Batch, tokens: np.ndarray, is_done: np.ndarray
  ) -> np.ndarray:
    """Which rows have come to a stop string, or are of no use."""
    found = np.zeros(len(tokens), bool)
    for row, row_tokens in enumerate(tokens):
      prompt, sample = divmod(row, self._rows)
      if prompt >= len(batch.requests) or sample >= batch.num_samples:
        found[row] = True
      elif self._settings.stop_strings and not is_done[row]:
        generated = row_tokens[row_tokens >= 0].tolist()
        text = batch.requests[prompt].render(generated)
        stop = cut_at_stop(text, self._settings.stop_strings)
        found[row] = stop is not None
    return found

  def _search(
      self, batch: Batch, prompts: Prompts, limits: np.ndarray
  ) -> list[tuple[list[int], list[float]]]:
    """Tokens of each completion, and the log-probability of all together."""
    tokens, scores = jax.device_get(
        self._searcher.find(
            self._params,
            prompts,
            limits,
            max_new_tokens=_bucket(int(limits.max())),
        )
    )
    penalty = self._settings.beam_search.length_penalty
    rows = []
    for prompt in range(len(batch.requests)):
      for rank in range(batch.num_samples):
        row = tokens[prompt, rank]
        row = row[row >= 0].tolist()
        rows.append((row, [float(scores[prompt, rank]) * len(row) ** penalty]))
    return rows

  def _finish(
      self,
      request: Request,
      sample: int,
      tokens: list[int],
      log_probabilities: list[float],
  ) -> Completion:
    eos_id = self._trained.vocabulary.task_tokens.eos
    has_end = tokens[-1] == eos_id
    body = tokens[:-1] if has_end else tokens
    stops = self._settings.stop_strings
    count = tokens_until_stop(body, request.render, stops)
    if count is None:
      ended, count = 'eos' if has_end else 'length', len(tokens)
      text = request.render(body)
    else:
      ended, text = 'stop_string', cut_at_stop(request.render(body), stops)
    if self._settings.beam_search is None:
      log_probabilities = log_probabilities[:count]
    return Completion(
        request.prompt_id, sample, text, ended, count, sum(log_probabilities)
    )


def prompt_number(prompt_id: str) -> int:
  """A number of 32 bits that tells a prompt from others."""
  # JSON may name a prompt by half of a surrogate pair.
  name = prompt_id.encode(errors='surrogatepass')
  return int.from_bytes(hashlib.sha256(name).digest()[:4], 'big')


def _bucket(length: int) -> int:
  """The next of 16, 24, 32, 48, 64, 96, ...: few shapes, little padding."""
  size = _BUCKET
  while size < length:
    if size * 3 // 2 >= length:
      return size * 3 // 2
    size *= 2
  return size
