"""Stage 2: text meets code (paper, section 3.2 and appendix B).

A batch of pairs has four losses of equal weight,
L = L_tcc + L_tcm + L_t2c + L_c2t:

  contrastive   text and code of a pair are nearer to each other than to others
  matching      the decoder tells pairs from texts and codes that only seem some
  text_to_code  the decoder writes the code of a text
  code_to_text  the decoder writes the text of a code

Each side is encoded once; the decoder's weights serve three roles, told by the
first token of what it reads or writes. Pairs are compared with the others of
the global batch and with a queue of batches before, embedded by an encoder that
follows the trained one slowly. Where the paper is silent this is as in BLIP,
the code that its authors cite; such things are fields.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from codet5p_jax import contrast
from codet5p_jax.array_typing import PRNGKey, Scalar, Tree
from codet5p_jax.corpus.folder import pair_rows
from codet5p_jax.corpus.token_store import token_dtype
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.losses import cross_entropy
from codet5p_jax.models.bimodal import MATCH, BimodalConfig
from codet5p_jax.models.computation import Pass
from codet5p_jax.sharding import constrain
from codet5p_jax.training import teacher_forcing
from codet5p_jax.training.objective import Axes, Batch, Metrics, ObjectiveOutput

if TYPE_CHECKING:
  from codet5p_jax.corpus.pair_store import PairRows
  from codet5p_jax.data.vocabularies import Vocabulary

LOSSES = ('contrastive', 'matching', 'text_to_code', 'code_to_text')
_SIDES = ('text', 'code')

# What makes an embedding.
_EMBEDDING_PARTS = ('token_embedder', 'encoder', 'projection')


@dataclasses.dataclass(frozen=True)
class Bimodal:
  """Text and code of one function, from the pairs of a corpus folder.

  Attributes:
    text_length: tokens of a text, <s> and </s> included; longer ones are cut.
    code_length: tokens of a code, likewise.
    queue_size: pairs of batches before that a batch is compared with; a
      multiple of its rows (BLIP: 57,600).
    momentum: share of the slow encoder that a step leaves (BLIP: 0.995).
    soft_target_share: of the contrastive targets, what the slow encoder thinks
      of the candidates; the rest is the true pairs'. The paper's formulas have
      none (BLIP: 0.4, which it reaches in its first epoch).
    losses: those of LOSSES that are trained; their weights are equal.
    rate: how often it is drawn, relative to the other objectives.
    first_step: from which on it is drawn.
    batch_scale: rows of its batches, in multiples of the run's.
    loss_tile_length: positions of each row whose logits exist at a time.
  """

  text_length: int = 128
  code_length: int = 420
  queue_size: int = 57600
  momentum: float = 0.995
  soft_target_share: float = 0.0
  losses: Sequence[str] = LOSSES
  rate: float = 1.0
  first_step: int = 0
  batch_scale: int = 1
  loss_tile_length: int = 128

  name = 'bimodal'
  reads = 'pairs'
  accumulates = False

  def __post_init__(self):
    object.__setattr__(self, 'losses', tuple(self.losses))
    teacher_forcing.check_fields(
        self, text_length=self.text_length, code_length=self.code_length
    )
    require_positive(queue_size=self.queue_size)
    for name in ('momentum', 'soft_target_share'):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(
            f'expected {name} of {self.name} from 0 to 1, found '
            f'{getattr(self, name)}; mend OBJECTIVES'
        )
    is_repeated = len(set(self.losses)) < len(self.losses)
    if not self.losses or is_repeated or set(self.losses) - set(LOSSES):
      raise UserError(
          f'expected losses of {self.name} among {", ".join(LOSSES)}, found '
          f'{", ".join(self.losses) or "none"}; set LOSSES'
      )
    if 'matching' in self.losses and 'contrastive' not in self.losses:
      raise UserError(
          'expected matching to be trained with contrastive, whose '
          'similarities choose what is matched, found it alone; add '
          "'contrastive' to LOSSES"
      )

  def check_model(self, model: Any) -> None:
    """Checks that a model has what the losses need.

    Raises:
      UserError: it lacks heads, a decoder, or a temperature.
    """
    found = type(model).__name__
    if not isinstance(model, BimodalConfig):
      raise UserError(
          f'expected a model that embeds and matches to train {self.name}, '
          f'found {found}; choose models/bimodal_220m.gin or another of that '
          f'kind'
      )
    if self.losses != ('contrastive',) and 'decoder' not in model.head_counts():
      raise UserError(
          f'expected a model with a decoder to train {", ".join(self.losses)}, '
          f"found {found}; choose another, or set LOSSES=('contrastive',)"
      )
    if 'contrastive' in self.losses and model.initial_temperature is None:
      raise UserError(
          f'expected a model with a temperature to train {self.name}, found an '
          f'initial_temperature of None; set it to 0.07'
      )

  def rows(
      self, data_dir: str, split: str, vocabulary: 'Vocabulary'
  ) -> 'PairRows':
    """The pairs of a split of a corpus folder, by index."""
    return pair_rows(pathlib.Path(data_dir), vocabulary, split)

  def example(
      self,
      row: Mapping[str, np.ndarray],
      generator: np.random.Generator,
      vocabulary: 'Vocabulary',
  ) -> dict[str, np.ndarray]:
    """Frames both sides by <s> and </s>; equal ones get equal identities.

    >>> import types
    >>> ids = types.SimpleNamespace(pad=0, bos=1, eos=2)
    >>> row = {'text': np.array([7, 8]), 'code': np.array([9, 7, 5, 4])}
    >>> example = Bimodal(5, 4, 1).example(
    ...     row, np.random.default_rng(0),
    ...     types.SimpleNamespace(task_tokens=ids))
    >>> example['text_tokens'].tolist(), example['code_tokens'].tolist()
    ([1, 7, 8, 2, 0], [1, 9, 7, 2])
    """
    del generator  # Nothing is random.
    ids = vocabulary.task_tokens
    made = {'pair_weights': np.ones((), np.float32)}
    for side, length in zip(_SIDES, (self.text_length, self.code_length)):
      kept = row[side][: length - 2]
      if not len(kept):
        raise UserError(
            f'expected a token in the {side} of every pair, found none; '
            f'prepare the corpus with this vocabulary'
        )
      tokens = np.full(length, ids.pad, np.int32)
      tokens[: len(kept) + 2] = [ids.bos, *kept, ids.eos]
      digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
      made[f'{side}_tokens'] = tokens
      made[f'{side}_identities'] = np.frombuffer(digest, '<u4')
    return made

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    def spec(dtype, *shape):
      return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    return {
        'text_tokens': spec(jnp.int32, self.text_length),
        'code_tokens': spec(jnp.int32, self.code_length),
        'text_identities': spec(jnp.uint32, 2),
        'code_identities': spec(jnp.uint32, 2),
        'pair_weights': spec(jnp.float32),
    }

  def passes(self, batch_size: int) -> list[Pass]:
    """See `Objective.passes`; heads and similarities are next to nothing."""
    text, code = self.text_length, self.code_length
    passes = [
        Pass('encoder', batch_size, text), Pass('encoder', batch_size, code)
    ]  # fmt: skip
    if 'contrastive' in self.losses:
      passes += [
          Pass('encoder', batch_size, length, is_trained=False)
          for length in (text, code)
      ]
    if 'matching' in self.losses:
      passes += [
          Pass('encoder', batch_size, text),
          Pass('decoder', 3 * batch_size, code, source_length=text),
      ]
    if 'text_to_code' in self.losses:
      passes.append(Pass('decoder', batch_size, code, text, writes=True))
    if 'code_to_text' in self.losses:
      passes.append(Pass('decoder', batch_size, text, code, writes=True))
    return passes

  def init_state(self, params: Tree, batch_size: int) -> Tree:
    """The slow encoder, a copy of the encoder; and the queue, empty.

    Returns:
      `slow_params`, of frozen parameters copies that do not change,
      `num_batches` that went through the queue, and `queue`,
      {name: [slots, batch, ...]}, of both sides `<side>_embeddings`,
      `<side>_tokens` and `<side>_identities`.

    Raises:
      UserError: the queue is no multiple of the batch.
    """
    if 'contrastive' not in self.losses:
      return {}
    if self.queue_size % batch_size:
      lower = self.queue_size // batch_size * batch_size
      raise UserError(
          f'expected a queue of {self.name} that holds whole batches of '
          f'{batch_size} pairs, found {self.queue_size}; set QUEUE_SIZE='
          f'{max(lower, batch_size)}'
      )
    slots = self.queue_size // batch_size
    dtype = token_dtype(params['token_embedder']['embedding'].shape[0])
    width = params['projection']['bias'].shape[0]
    queue = {}
    for side, length in zip(_SIDES, (self.text_length, self.code_length)):
      shape = (slots, batch_size)
      queue[f'{side}_embeddings'] = jnp.zeros((*shape, width))
      queue[f'{side}_tokens'] = jnp.zeros((*shape, length), dtype)
      queue[f'{side}_identities'] = jnp.zeros((*shape, 2), jnp.uint32)
    return {
        'slow_params': _embedding_parts(params),
        'num_batches': jnp.zeros((), jnp.int32),
        'queue': queue,
    }

  def state_axes(self, parameter_axes: Mapping[str, Axes]) -> Tree:
    if 'contrastive' not in self.losses:
      return {}
    # Slots lie together, their columns as the rows of a batch.
    names = [
        f'{side}_{what}'
        for side in _SIDES
        for what in ('embeddings', 'tokens', 'identities')
    ]
    return {
        'slow_params': _embedding_parts(
            flax.traverse_util.unflatten_dict(dict(parameter_axes), sep='/')
        ),
        'num_batches': (),
        'queue': {name: (None, 'batch', None) for name in names},
    }

  def loss(
      self,
      model: nn.Module,
      params: Tree,
      state: Tree,
      batch: Batch,
      key: PRNGKey | None,
  ) -> tuple[Scalar, ObjectiveOutput]:
    """Number of pairs times the sum of the mean losses.

    In an evaluation pairs are compared with those of their batch alone, and all
    are embedded by the trained encoder.
    """
    network = _Network(model, params, key)
    state = jax.lax.stop_gradient(state)
    encoded = {
        side: network.run('encode', batch[f'{side}_tokens']) for side in _SIDES
    }
    # {loss: (sum, weight)}, and what else is measured.
    sums: Metrics = {}
    metrics: Metrics = {}
    if 'contrastive' in self.losses:
      pairs, state, measured = self._contrast(network, batch, encoded, state)
      sums['contrastive'] = measured.pop('contrastive')
      metrics |= measured
    if 'matching' in self.losses:
      sums['matching'], metrics['matching_accuracy'] = _match(
          network, batch, encoded['text'], pairs
      )
    tokens = jnp.zeros(())
    for name in ('text_to_code', 'code_to_text'):
      if name in self.losses:
        sums[name], metrics[f'{name}_accuracy'] = self._write(
            network, batch, encoded, *name.split('_to_')
        )
        tokens += sums[name][1]
    number = jnp.sum(batch['pair_weights'])
    total = sum(loss / jnp.maximum(n, 1.0) for loss, n in sums.values())
    metrics |= {f'{name}_loss': parts for name, parts in sums.items()}
    return number * total, ObjectiveOutput(
        weight=number, tokens=tokens, metrics=metrics, state=state
    )

  def _contrast(
      self, network: '_Network', batch: Batch, encoded: Tree, state: Tree
  ) -> tuple['_Pairs', Tree, Metrics]:
    """L_tcc: the mean of both directions' cross-entropies (appendix B).

    Returns:
      What the batch was compared with, the new state, and metrics, of which
      `contrastive` is the loss.
    """
    queries = {side: network.head('project', encoded[side]) for side in _SIDES}
    keys, queue, num_batches = queries, {}, jnp.zeros((), jnp.int32)
    if network.trains:
      # The slow encoder moves first and embeds then, as in BLIP.
      slow_params = contrast.moving_average(
          state['slow_params'],
          _embedding_parts(network.params),
          self.momentum,
      )
      keys = {
          side: network.embed(slow_params, batch[f'{side}_tokens'])
          for side in _SIDES
      }
      queue, num_batches = state['queue'], state['num_batches']
    entry = {
        name: value for name, value in batch.items() if name != 'pair_weights'
    } | {f'{side}_embeddings': keys[side] for side in _SIDES}
    entry = jax.lax.stop_gradient(entry)
    weights = batch['pair_weights']
    candidates = contrast.with_queue(entry, queue)
    is_there = contrast.are_there(
        weights, candidates['text_tokens'].shape[0], num_batches
    )
    is_true = contrast.true_pairs(
        batch['text_identities'],
        batch['code_identities'],
        candidates['text_identities'],
        candidates['code_identities'],
    )
    temperature = network.head('similarity_temperature')
    targets = contrast.one_hot_targets(is_true, is_there)
    logits, losses, accuracies = {}, [], []
    for side, other in (_SIDES, _SIDES[::-1]):
      others = candidates[f'{other}_embeddings']
      logits[side] = (
          contrast.similarities(queries[side], others) / temperature
      )
      sought = targets
      if self.soft_target_share and network.trains:
        slow_logits = contrast.similarities(keys[side], others) / temperature
        sought = contrast.softened(
            targets, slow_logits, is_there, self.soft_target_share
        )
      loss, is_found = contrast.contrastive_losses(
          logits[side], jax.lax.stop_gradient(sought), is_true, is_there
      )
      losses.append(jnp.sum(loss * weights))
      accuracies.append(jnp.sum(is_found * weights))
    number = jnp.sum(weights)
    measured = {
        'contrastive': (sum(losses) / 2, number),
        'contrastive_accuracy': (sum(accuracies) / 2, number),
        'temperature': (temperature, jnp.ones(())),
    }
    if network.trains:
      state = {
          'slow_params': slow_params,
          'num_batches': num_batches + 1,
          'queue': contrast.enqueue(queue, entry, num_batches),
      }
    return _Pairs(candidates, logits, is_there & ~is_true), state, measured

  def _write(
      self,
      network: '_Network',
      batch: Batch,
      encoded: Tree,
      source: str,
      target: str,
  ) -> tuple[tuple[Scalar, Scalar], tuple[Scalar, Scalar]]:
    """L_t2c and L_c2t: cross-entropy of one side, given the other.

    The decoder begins with its start token and writes the task token in place
    of <s>. In evaluations that token, always the same, does not count.

    Returns:
      The loss, and the number of tokens that were found likeliest, each with
      the number of all.
    """
    config = network.model.config
    task_token = getattr(config, f'{target}_decoder_id')
    targets = batch[f'{target}_tokens']
    weights = (targets != config.pad_id) * batch['pair_weights'][:, None]
    if not network.trains:
      weights = weights.at[:, 0].set(0.0)
    targets = targets.at[:, 0].set(task_token)
    hidden = network.run(
        'decode',
        encoded[source],
        batch[f'{source}_tokens'],
        teacher_forcing.shift_right(targets, config.decoder_start_id),
    )
    loss, correct = cross_entropy(
        hidden,
        network.head('output_head'),
        targets,
        weights,
        self.loss_tile_length,
        network.model.computation.dtype,
    )
    number = jnp.sum(weights)
    return (loss, number), (correct, number)


@flax.struct.dataclass
class _Pairs:
  """What a batch is compared with.

  Attributes:
    candidates: {name: [slots, columns, ...]}, see `Bimodal.init_state`.
    logits: {side: [batch, slots, columns]}, of each row's text or code with
      the candidates' other side.
    is_negative: bool [batch, slots, columns].
  """

  candidates: Tree
  logits: Tree
  is_negative: jax.Array


class _Network:
  """The model with its parameters, as a step or an evaluation uses it."""

  def __init__(self, model: nn.Module, params: Tree, key: PRNGKey | None):
    """Sets what all uses share; `key` is None in an evaluation."""
    self.model = model
    self.params = params
    self.trains = key is not None
    # In an evaluation the draws are the same each time.
    self._key = jax.random.key(0) if key is None else key
    self._drops = self.trains and model.computation.dropout_rate > 0
    self._uses = 0

  def next_key(self) -> PRNGKey:
    """Another key each time, in the order of the program."""
    self._uses += 1
    return jax.random.fold_in(self._key, self._uses)

  def run(self, method: str, *inputs: jax.Array) -> jax.Array:
    """A pass through a stack, with dropout in training."""
    return self.model.apply(
        {'params': self.params},
        *inputs,
        method=method,
        deterministic=not self._drops,
        rngs={'dropout': self.next_key()} if self._drops else None,
    )

  def embed(self, slow_params: Tree, tokens: jax.Array) -> jax.Array:
    """Embeddings by the slow encoder, without dropout."""
    return self.model.apply({'params': slow_params}, tokens, method='embed')

  def head(self, method: str, *inputs: jax.Array) -> Any:
    """What lies on the stacks, which has no dropout."""
    return self.model.apply({'params': self.params}, *inputs, method=method)


def _match(
    network: _Network, batch: Batch, encoded_text: jax.Array, pairs: _Pairs
) -> tuple[tuple[Scalar, Scalar], tuple[Scalar, Scalar]]:
  """L_tcm: cross-entropy of three texts and codes for each pair.

  The pair itself, its text with another code, and another text with its code;
  the others are drawn by their similarity, and never make a pair. The decoder
  reads the code after [Match], not shifted, see `Bimodal.match` of the model.

  Returns:
    The loss, and the number of right verdicts, each with the number of all.
  """
  others, exist = {}, {}
  for side, other in (_SIDES, _SIDES[::-1]):
    slots, columns, exist[other] = contrast.draw_negatives(
        network.next_key(),
        jax.lax.stop_gradient(pairs.logits[side]),
        pairs.is_negative,
    )
    drawn = pairs.candidates[f'{other}_tokens'][slots, columns]
    others[other] = constrain(drawn.astype(jnp.int32), 'batch', 'act_length')
  text, code = batch['text_tokens'], batch['code_tokens']
  weights = batch['pair_weights']

  def three(*parts):
    # Those of a row stay together: on its device.
    stacked = jnp.stack(parts, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])

  encoded_other = network.run('encode', others['text'])
  codes = three(code, others['code'], code)
  logits = network.run(
      'match',
      three(encoded_text, encoded_text, encoded_other),
      three(text, text, others['text']),
      codes.at[:, 0].set(network.model.config.match_id),
  )
  is_pair = three(*(jnp.full(weights.shape, x) for x in (True, False, False)))
  weights = three(weights, weights * exist['code'], weights * exist['text'])
  labels = jnp.where(is_pair, MATCH, 1 - MATCH)
  log_p = jax.nn.log_softmax(logits)
  losses = -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
  is_right = jnp.argmax(logits, axis=1) == labels
  number = jnp.sum(weights)
  return (
      (jnp.sum(losses * weights), number),
      (jnp.sum(is_right * weights), number),
  )


def _embedding_parts(params: Tree) -> Tree:
  return {name: params[name] for name in _EMBEDDING_PARTS}
