"""Stage 2 in plain NumPy, one pair at a time, after the paper's equations.

The twin takes from the network only what its stacks give; all that is added to
them is computed here: heads, losses, draws, queue and slow encoder.
"""

import jax
import numpy as np

SIDES = ('text', 'code')
OTHER = {'text': 'code', 'code': 'text'}


def softmax(logits):
  shifted = np.exp(logits - np.max(logits))
  return shifted / np.sum(shifted)


def log_softmax(logits):
  top = np.max(logits)
  return logits - top - np.log(np.sum(np.exp(logits - top)))


class Twin:
  """One run of the objective."""

  def __init__(self, objective, model, params, batch_size):
    """Begins as the paper does: the slow encoder is the encoder."""
    self.objective = objective
    self.model = model
    self._apply = jax.jit(model.apply, static_argnames='method')
    self.slow = {
        name: params[name]
        for name in ('token_embedder', 'encoder', 'projection')
    }
    # Slots are filled in turn and then again from the first.
    self.slots = [None] * (objective.queue_size // batch_size)
    self.batches = 0
    # Of soft targets; None for that of the parameters.
    self.target_temperature = None

  def run(self, params, method, *inputs):
    """A stack's states, in float64."""
    states = self._apply({'params': params}, *inputs, method=method)
    return np.asarray(states, np.float64)

  def embed(self, params, encoded):
    head = params['projection']
    x = encoded[:, 0] @ np.float64(head['kernel']) + np.float64(head['bias'])
    return x / np.sqrt(np.sum(x * x, axis=1, keepdims=True))

  def step(self, params, batch, key):
    """The losses and accuracies of a step, and the renewed queue."""
    n = len(batch['text_tokens'])
    encoded = {
        side: self.run(params, 'encode', batch[f'{side}_tokens'])
        for side in SIDES
    }
    queries = {side: self.embed(params, encoded[side]) for side in SIDES}
    m = self.objective.momentum
    self.slow = jax.tree.map(
        lambda old, new: (m * np.float64(old) + (1 - m) * np.float64(new)
                          ).astype(np.float32),
        self.slow,
        {name: params[name] for name in self.slow},
    )  # fmt: skip
    keys = {
        side: self.embed(
            self.slow, self.run(self.slow, 'encode', batch[f'{side}_tokens'])
        )
        for side in SIDES
    }
    own = {
        'identities': [
            tuple(
                tuple(batch[f'{side}_identities'][i].tolist())
                for side in SIDES
            )
            for i in range(n)
        ],
        'tokens': {side: batch[f'{side}_tokens'] for side in SIDES},
        'embeddings': keys,
    }
    candidates = [own, *self.slots]
    temperature = float(np.clip(params['temperature']['value'], 0.001, 0.5))
    losses = {'contrastive': [], 'matching': []}
    drawn = {}
    for number, side in enumerate(SIDES):
      # The keys of the two draws are the first of the step.
      noise = np.asarray(
          jax.random.gumbel(
              jax.random.fold_in(key, number + 1), (n, len(candidates), n)
          )
      )
      drawn[OTHER[side]] = []
      for i in range(n):
        loss, negative = self.contrast(
            i, side, queries, keys, candidates, temperature, noise[i]
        )
        losses['contrastive'].append(loss)
        drawn[OTHER[side]].append(negative)
    values = {'contrastive_loss': np.mean(losses['contrastive'])}
    values |= self.match(params, batch, drawn)
    for source, target in (('text', 'code'), ('code', 'text')):
      values |= self.write(params, batch, encoded, source, target)
    values['loss'] = sum(
        values[f'{name}_loss']
        for name in ('contrastive', 'matching', 'text_to_code', 'code_to_text')
    )
    values['temperature'] = temperature
    self.drawn = drawn
    if self.slots:
      self.slots[self.batches % len(self.slots)] = own
    self.batches += 1
    return values

  def contrast(self, i, side, queries, keys, candidates, temperature, noise):
    """The loss of one row in one direction, and the negative it draws."""
    mine = candidates[0]['identities'][i]
    logits, slow_logits, is_true, places, scores = [], [], [], [], []
    for slot, held in enumerate(candidates):
      if held is None:
        continue
      for column, theirs in enumerate(held['identities']):
        other = held['embeddings'][OTHER[side]][column]
        logits.append(queries[side][i] @ other / temperature)
        slow_logits.append(
            keys[side][i] @ other / (self.target_temperature or temperature)
        )
        is_true.append(mine[0] == theirs[0] or mine[1] == theirs[1])
        places.append((slot, column))
        scores.append(logits[-1] + noise[slot, column])
    targets = np.array(is_true) / np.sum(is_true)
    share = self.objective.soft_target_share
    targets = (1 - share) * targets + share * softmax(np.array(slow_logits))
    loss = -np.sum(targets * log_softmax(np.array(logits)))
    scores = np.where(is_true, -np.inf, scores)
    if np.all(is_true):
      return loss, None
    slot, column = places[int(np.argmax(scores))]
    return loss, candidates[slot]['tokens'][OTHER[side]][column]

  def match(self, params, batch, drawn):
    """The matching loss over pairs and what only seems to be one."""
    config = self.model.config
    head = jax.tree.map(np.float64, params['matching_head'])
    tried = []
    for i, (text, code) in enumerate(
        zip(batch['text_tokens'], batch['code_tokens'], strict=True)
    ):
      tried += [
          (text, code, 1),
          (text, drawn['code'][i], 0),
          (drawn['text'][i], code, 0),
      ]
    tried = [each for each in tried if each[0] is not None is not each[1]]
    texts = np.stack([text for text, _, _ in tried]).astype(np.int32)
    read = np.stack([code for _, code, _ in tried]).astype(np.int32)
    read[:, 0] = config.match_id
    encoded = self.run(params, 'encode', texts).astype(np.float32)
    hidden = self.run(params, 'decode', encoded, texts, read)
    losses, right = [], []
    for states, tokens, (_, _, label) in zip(hidden, read, tried, strict=True):
      last = int(np.flatnonzero(tokens == config.eos_id)[-1])
      logits = states[last] @ head['kernel'] + head['bias']
      losses.append(-log_softmax(logits)[label])
      right.append(int(np.argmax(logits)) == label)
    return {
        'matching_loss': np.mean(losses), 'matching_accuracy': np.mean(right)
    }  # fmt: skip

  def write(self, params, batch, encoded, source, target):
    """The loss of writing one side, given the other."""
    config = self.model.config
    table = np.float64(params['token_embedder']['embedding'])
    tokens = np.array(batch[f'{target}_tokens'], np.int32)
    tokens[:, 0] = getattr(config, f'{target}_decoder_id')
    read = np.full_like(tokens, config.decoder_start_id)
    read[:, 1:] = tokens[:, :-1]
    hidden = self.run(
        params,
        'decode',
        encoded[source].astype(np.float32),
        batch[f'{source}_tokens'],
        read,
    )
    losses, right = [], []
    for states, row in zip(hidden, tokens, strict=True):
      logits = states * config.emb_dim**-0.5 @ table[: config.vocab_size].T
      for position in np.flatnonzero(row):
        losses.append(-log_softmax(logits[position])[row[position]])
        right.append(int(np.argmax(logits[position])) == row[position])
    name = f'{source}_to_{target}'
    return {f'{name}_loss': np.mean(losses), f'{name}_accuracy': np.mean(right)}
