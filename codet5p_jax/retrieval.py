"""How well a model finds the code of a text among many (paper, section 5.5).

Codes are ranked by the cosine of their embedding with that of the text. The
first of them may be ranked again by what the decoder says of text and code
together, as the released evaluation does it. Two other rankings of the same
pairs say what that is worth: BM25, which knows no meaning but shares of words,
and chance.

A rank begins with 1, and codes that score as high as the true one stand before
it: a model to which all codes are the same finds nothing.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from codet5p_jax.array_typing import Tree
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.models.bimodal import MATCH
from codet5p_jax.sharding import sharding_activations
from codet5p_jax.training.train_step import TrainStep

_logger = logging.getLogger(__name__)

Scores = Float[np.ndarray, 'texts codes']
Ranks = Int[np.ndarray, 'texts']

# Added to the cosine of codes that are not ranked again, so that they stay
# behind the others in their order. As released they all score just this
# (specification, section 3.2), and stand in whatever order.
_NOT_RERANKED = -100.0

# Of BM25: how soon more of a word is no more, and how much length counts.
_K1, _B = 1.5, 0.75

_WORD = re.compile(r'[^\W_]+')
# Where a hump begins: before "Server" and "Error" in HTTPServerError.
_HUMP = re.compile('(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])')


@dataclasses.dataclass(frozen=True)
class Pool:
  """Texts, and the codes among which each has to find its own.

  Attributes:
    indices: of the pairs in their split.
    text_tokens: as the objective frames them.
    code_tokens: likewise; that of text i is code i.
  """

  indices: Int[np.ndarray, 'pairs']
  text_tokens: Int[np.ndarray, 'pairs text_length']
  code_tokens: Int[np.ndarray, 'pairs code_length']

  def __len__(self) -> int:
    return len(self.indices)


def choose_pool(examples: Any, size: int) -> Pool:
  """Pairs that are spread evenly over a split; neighbours are of one package.

  A pair whose text or code, as the model sees it, was there before is passed
  over: its true code would not be the only right one.

  Args:
    examples: of a split, by index; see `Bimodal.example` among the objectives.
    size: pairs of the pool; all that differ, with a warning, if they are fewer.

  Raises:
    UserError: fewer than one are asked for.
  """
  require_positive(pool_size=size)
  distinct, seen = [], set()
  for index in range(len(examples)):
    example = examples[index]
    sides = {
        (side, example[f'{side}_identities'].tobytes())
        for side in ('text', 'code')
    }
    if seen.isdisjoint(sides):
      seen |= sides
      distinct.append(index)
  if len(distinct) < size:
    _logger.warning(
        'Codes are found among %s pairs instead of %s: the split has no more '
        'that differ.',
        f'{len(distinct):,}',
        f'{size:,}',
    )
    size = len(distinct)
  indices = np.array(distinct)[np.arange(size) * len(distinct) // size]
  rows = [examples[int(index)] for index in indices]
  return Pool(
      indices,
      np.stack([row['text_tokens'] for row in rows]),
      np.stack([row['code_tokens'] for row in rows]),
  )


def check_reranked(num_reranked: int, pool_size: int) -> None:
  """Raises UserError: fewer than one code is ranked again, or not so many."""
  require_positive(rerank=num_reranked)
  if num_reranked > pool_size:
    raise UserError(
        f'expected to rank again at most the {pool_size:,} codes of the pool, '
        f'found {num_reranked:,}; lower RERANK or raise POOL_SIZE'
    )


def find_codes(
    train_step: TrainStep,
    params: Tree,
    pool: Pool,
    batch_size: int,
    num_reranked: int | None = None,
    tell: Callable[[int], None] = lambda count: None,
) -> tuple[Ranks, Ranks | None]:
  """Ranks of the true codes of all texts.

  Args:
    train_step: gives the network and the mesh.
    params: all of them.
    pool: texts and codes.
    batch_size: rows that go through the network at a time; the mesh divides it.
    num_reranked: codes of each text, the first by cosine, that are ranked
      again; None for none.
    tell: is called with numbers of codes that were ranked again since.

  Returns:
    Those by cosine, and those after the first codes were ranked again.

  Raises:
    UserError: a score is NaN; or as `check_reranked`.
  """
  if num_reranked is not None:
    check_reranked(num_reranked, len(pool))
  reader = _Reader(train_step, params, batch_size)
  texts, codes = map(reader.embed, (pool.text_tokens, pool.code_tokens))
  ranks, ranks_again = [], []
  # In parts: of a large pool all scores at once would be too many.
  for first in range(0, len(pool), batch_size):
    rows = np.arange(first, min(first + batch_size, len(pool)))
    cosines = texts[rows] @ codes.T
    ranks.append(true_ranks(cosines, rows))
    if num_reranked is not None:
      chosen = likeliest(cosines, rows, num_reranked)
      logits = reader.match(pool.text_tokens[rows], pool.code_tokens, chosen)
      scores = rerank(cosines, chosen, logits)
      ranks_again.append(true_ranks(scores, rows))
      tell(chosen.size)
  return (
      np.concatenate(ranks),
      np.concatenate(ranks_again) if ranks_again else None,
  )


class _Reader:
  """The network, reading batches of rows on its mesh."""

  def __init__(self, train_step: TrainStep, params: Tree, batch_size: int):
    """Compiles nothing yet."""
    model, mesh = train_step.model, train_step.mesh
    self._params, self._batch_size = params, batch_size
    self._config = model.config
    self._sharding = train_step.evaluation_sharding
    # What the host looks at, every host has.
    everywhere = NamedSharding(mesh, PartitionSpec())

    def compiled(method, sharding):
      def run(params, *inputs):
        return model.apply({'params': params}, *inputs, method=method)

      return jax.jit(
          sharding_activations(mesh, train_step.config.rules, run),
          out_shardings=sharding,
      )

    self._embed = compiled('embed', everywhere)
    self._encode = compiled('encode', self._sharding)
    self._match = compiled('match', everywhere)

  def embed(
      self, tokens: Int[np.ndarray, 'rows length']
  ) -> Float[np.ndarray, 'rows projection']:
    """Embeddings of texts or codes, of norm 1."""
    parts = [
        self._embed(
            self._params, self._batch(tokens[first : first + self._batch_size])
        )
        for first in range(0, len(tokens), self._batch_size)
    ]
    return np.concatenate(jax.device_get(parts))[: len(tokens)]

  def match(
      self,
      texts: Int[np.ndarray, 'texts text_length'],
      codes: Int[np.ndarray, 'codes code_length'],
      chosen: Int[np.ndarray, 'texts reranked'],
  ) -> Float[np.ndarray, 'texts reranked']:
    """Logits that say that text and code are a pair.

    Each text is encoded once. Its codes go through the decoder one after
    another, so that no more rows are there at a time than texts.

    Args:
      texts: at most a batch of them.
      codes: of the pool.
      chosen: which of them each text is matched with.
    """
    rows = np.arange(len(texts))
    text_batch = self._batch(texts)
    encoded = self._encode(self._params, text_batch)
    lengths = _lengths(codes, self._config.pad_id)
    logits = np.empty(chosen.shape, np.float32)
    # By length, so that codes that are read together are of like length.
    for column in np.argsort(lengths[chosen], axis=1).T:
      numbers = chosen[rows, column]
      code_length = _cut_length(lengths[numbers].max(), codes.shape[1])
      read = codes[numbers, :code_length]
      read[:, 0] = self._config.match_id
      verdicts = jax.device_get(
          self._match(self._params, encoded, text_batch, self._batch(read))
      )
      logits[rows, column] = verdicts[: len(texts), MATCH]
    return logits

  def _batch(self, rows: Int[np.ndarray, 'rows length']) -> jax.Array:
    """Rows on the mesh; the last one fills what is missing to a batch."""
    filled = rows[np.minimum(np.arange(self._batch_size), len(rows) - 1)]
    return jax.make_array_from_callback(
        filled.shape, self._sharding, lambda part: filled[part]
    )


def _lengths(
    tokens: Int[np.ndarray, 'rows length'], pad_id: int
) -> Int[np.ndarray, 'rows']:
  """Tokens of each row up to the last that is no padding."""
  backwards = tokens[:, ::-1] != pad_id
  return tokens.shape[1] - np.argmax(backwards, axis=1)


def _cut_length(longest: int | np.integer, length: int) -> int:
  """Where rows are cut: at a half, a quarter or an eighth, if all fit.

  Each length is a program of its own, so there are few.
  """
  return min(length >> n for n in range(4) if length >> n >= longest)


def true_ranks(
    scores: Scores, true_codes: Int[np.ndarray, 'texts']
) -> Ranks:
  """The rank of each text's true code, behind all that score as high.

  >>> scores = np.array([[0.5, 0.9, 0.1], [0.2, 0.2, 0.0]])
  >>> true_ranks(scores, np.array([0, 1])).tolist()
  [2, 2]

  Args:
    scores: the higher the likelier.
    true_codes: the column of each row's true code.

  Raises:
    UserError: a score is NaN, which has no rank.
  """
  if is_damaged := np.isnan(scores).any(axis=1).sum():
    raise UserError(
        f'expected scores of codes that are numbers, found NaN among those of '
        f'{is_damaged} of {len(scores)} texts; the weights are damaged: go '
        f'back to an earlier checkpoint'
    )
  true_scores = np.take_along_axis(scores, true_codes[:, None], axis=1)
  return np.sum(scores >= true_scores, axis=1)


def likeliest(
    scores: Scores, true_codes: Int[np.ndarray, 'texts'], number: int
) -> Int[np.ndarray, 'texts reranked']:
  """The codes with the highest scores; among equals the true one is last."""
  is_true = np.arange(scores.shape[1]) == true_codes[:, None]
  return np.lexsort((is_true, -scores), axis=1)[:, :number]


def rerank(
    scores: Scores,
    chosen: Int[np.ndarray, 'texts reranked'],
    logits: Float[np.ndarray, 'texts reranked'],
) -> Scores:
  """Scores after some codes were looked at again (specification, section 3.2).

  Those get their logit, as it is, and their cosine; all others follow in their
  order.

  Args:
    scores: cosines.
    chosen: columns of `scores`.
    logits: that say that text and code are a pair.
  """
  again = scores + np.float32(_NOT_RERANKED)
  added = logits + np.take_along_axis(scores, chosen, axis=1)
  np.put_along_axis(again, chosen, added, axis=1)
  return again


def mean_reciprocal_rank(ranks: Ranks) -> float:
  """The MRR: 1 where every true code is the first one.

  >>> mean_reciprocal_rank(np.array([1, 2, 4]))
  0.5833333333333334
  """
  return float(np.mean(1 / ranks))


def chance(pool_size: int) -> float:
  """The MRR that is expected of a ranking by chance, H_n / n.

  >>> round(chance(1000), 6)
  0.007485
  """
  return mean_reciprocal_rank(np.arange(1, pool_size + 1))


def bm25_ranks(texts: Sequence[str], codes: Sequence[str]) -> Ranks:
  """Ranks of the true codes by BM25 of the words in text and code.

  The formula is Lucene's, with k1 = 1.5 and b = 0.75 (the defaults of bm25s):
  a word in n of N codes, f times in a code of L words, where the mean is M,
  scores ln(1 + (N - n + 0.5) / (n + 0.5)) f / (f + k1 (1 - b + b L / M)), as
  often as it stands in the text. Words are those of `words_of`, no word is
  left out, and nothing is cut to what a model reads.

  Args:
    texts: what is looked for.
    codes: that of text i is code i.
  """
  import bm25s

  # It logs each step of building an index, whatever was asked for.
  logging.getLogger('bm25s').setLevel(logging.WARNING)
  scorer = bm25s.BM25(k1=_K1, b=_B, method='lucene')
  # No words at all are refused: what has none has an empty one.
  scorer.index([words_of(code) or [''] for code in codes], show_progress=False)
  ranks = []
  for number, text in enumerate(texts):
    scores = scorer.get_scores(words_of(text) or [''])
    ranks.append(true_ranks(scores[None], np.array([number])))
  return np.concatenate(ranks)


def words_of(text: str) -> list[str]:
  """Words in lower case; names are split at underscores and humps.

  >>> words_of('def read_HTTPHeaders2(self, maxSize=1):')
  ['def', 'read', 'http', 'headers2', 'self', 'max', 'size', '1']
  """
  return [
      part.lower()
      for word in _WORD.findall(text)
      for part in _HUMP.split(word)
  ]
