import math
import types

import jax
import numpy as np
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.models.bimodal import MATCH, BimodalConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.retrieval import (
    bm25_ranks,
    chance,
    choose_pool,
    find_codes,
    likeliest,
    mean_reciprocal_rank,
    rerank,
    true_ranks,
    words_of,
)
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.optimizers import SGD
from codet5p_jax.training.train_step import StepConfig, make_train_step

MODEL = BimodalConfig(
    vocab_size=131,
    emb_dim=24,
    num_heads=8,
    head_dim=4,
    mlp_dim=40,
    num_encoder_layers=2,
    num_decoder_layers=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    projection_dim=16,
    match_id=128,
)
OBJECTIVE = Bimodal(text_length=9, code_length=22, queue_size=1)
VOCABULARY = types.SimpleNamespace(
    task_tokens=types.SimpleNamespace(pad=0, bos=1, eos=2)
)
POOL_SIZE, RERANKED = 37, 15


def example(text, code):
  row = {'text': np.array(text), 'code': np.array(code)}
  return OBJECTIVE.example(row, np.random.default_rng(0), VOCABULARY)


def draw_examples(number, seed=0):
  """Texts and codes of random tokens and lengths, some of them cut."""
  numbers = np.random.default_rng(seed)
  return [
      example(
          numbers.integers(4, 127, numbers.integers(1, 12)),
          numbers.integers(4, 127, numbers.integers(1, 30)),
      )
      for _ in range(number)
  ]


@pytest.fixture(scope='module')
def pool():
  return choose_pool(draw_examples(50), POOL_SIZE)


def make_step(mesh_shape, num_devices):
  config = StepConfig(
      model=MODEL,
      objectives=(),
      optimizer=SGD(1.0),
      batch_size=8,
      computation=Computation(dtype='float32'),
  )
  mesh = make_mesh(mesh_shape, jax.devices()[:num_devices])
  return make_train_step(config, mesh)


def on_mesh(train_step, params):
  return jax.tree.map(
      lambda x, like: jax.device_put(x, like.sharding),
      params,
      train_step.abstract_state.params,
  )


@pytest.fixture(scope='module')
def params(random_parameters):
  return random_parameters(MODEL.make_model())


@pytest.fixture(scope='module')
def found(params, pool):
  """Ranks on eight devices, 16 rows at a time: two batches and a part."""
  step = make_step((1, 4, 2), 8)
  told = []
  ranks = find_codes(
      step, on_mesh(step, params), pool, 16, RERANKED, told.append
  )
  assert told == [16 * RERANKED, 16 * RERANKED, 5 * RERANKED]
  return ranks


def twin_ranks(params, pool, num_reranked):
  """The same with neither batches nor cut codes nor a mesh."""
  model = MODEL.make_model(Computation(dtype='float32'))
  apply = jax.jit(model.apply, static_argnames='method')

  def run(method, *inputs):
    return np.asarray(apply({'params': params}, *inputs, method=method))

  texts, codes = run('embed', pool.text_tokens), run('embed', pool.code_tokens)
  read = pool.code_tokens.copy()
  read[:, 0] = MODEL.match_id
  ranks, ranks_again = [], []
  for number in range(len(pool)):
    cosines = [float(texts[number] @ code) for code in codes]
    first = sorted(range(len(pool)), key=lambda code: -cosines[code])
    ranks.append(1 + first.index(number))
    chosen = first[:num_reranked]
    text = np.repeat(pool.text_tokens[number][None], num_reranked, axis=0)
    logits = run('match', run('encode', text), text, read[chosen])[:, MATCH]
    scores = [float(cosine) - 100 for cosine in cosines]
    for code, logit in zip(chosen, logits, strict=True):
      scores[code] = float(logit) + cosines[code]
    ranks_again.append(sum(score >= scores[number] for score in scores))
  return ranks, ranks_again


def test_ranks_are_those_of_a_plain_twin(params, pool, found):
  for ours, theirs in zip(found, twin_ranks(params, pool, RERANKED)):
    np.testing.assert_array_equal(ours, theirs)
  # Neither all alike nor all right, or a mistake could hide.
  assert len(set(found[0])) > 10 and len(set(found[1])) > 3
  is_behind = found[0] > RERANKED
  assert is_behind.any() and not is_behind.all()
  np.testing.assert_array_equal(found[1][is_behind], found[0][is_behind])
  assert np.all(found[1][~is_behind] <= RERANKED)


def test_one_device_finds_what_eight_find(params, pool, found):
  step = make_step((1, 1, 1), 1)
  ranks = find_codes(step, on_mesh(step, params), pool, 7, RERANKED)
  for one, eight in zip(ranks, found):
    np.testing.assert_array_equal(one, eight)


def test_nothing_is_ranked_again_unless_asked_for(params, pool, found):
  step = make_step((1, 1, 1), 1)
  ranks, again = find_codes(step, on_mesh(step, params), pool, 20)
  np.testing.assert_array_equal(ranks, found[0])
  assert again is None


def test_weights_that_are_no_numbers_are_one_clear_line(params, pool):
  step = make_step((1, 1, 1), 1)
  broken = jax.tree.map(lambda x: x * float('nan'), params)
  with pytest.raises(UserError, match='found NaN among those of 7 of 7') as e:
    find_codes(step, on_mesh(step, broken), pool, 7)
  assert '\n' not in str(e.value)


def test_a_logit_that_is_no_number_is_not_ranked():
  scores = np.array([[0.5, 0.25, 0.125]], np.float32)
  again = rerank(scores, np.array([[0, 1]]), np.array([[2.0, np.nan]]))
  with pytest.raises(UserError, match='found NaN'):
    true_ranks(again, np.array([0]))


def test_ranks_count_what_scores_as_high_or_higher():
  scores = np.array([
      [0.9, 0.1, 0.2, 0.3],
      [0.4, 0.4, 0.4, 0.1],
      [0.8, 0.7, -0.5, 0.6],
      [-1.0, -1.0, -1.0, -1.0],
  ])
  ranks = true_ranks(scores, np.arange(4))
  assert ranks.tolist() == [1, 3, 4, 4]
  assert mean_reciprocal_rank(ranks) == (1 + 1 / 3 + 1 / 4 + 1 / 4) / 4


def test_among_equals_the_true_code_is_chosen_last():
  scores = np.array([[0.5, 0.5, 0.1, 0.5], [0.2, 0.6, 0.2, 0.2]])
  chosen = likeliest(scores, np.array([0, 2]), 3)
  assert chosen.tolist() == [[1, 3, 0], [1, 0, 3]]


def test_scores_of_those_ranked_again_are_logit_and_cosine():
  scores = np.array([[0.5, 0.25, 0.75], [0.125, 0.25, 0.5]], np.float32)
  chosen = np.array([[2, 0], [2, 1]])
  logits = np.array([[-3.0, 4.0], [1.0, 2.0]], np.float32)
  again = rerank(scores, chosen, logits)
  assert again.tolist() == [[4.5, -99.75, -2.25], [-99.875, 2.25, 1.5]]
  # A true code that was not chosen stands behind those that were.
  assert true_ranks(again, np.array([1, 0])).tolist() == [3, 3]


def test_chance_is_what_random_scores_find():
  size, texts = 40, 20_000
  scores = np.random.default_rng(5).random((texts, size))
  ranks = true_ranks(scores, np.zeros(texts, int))
  found = mean_reciprocal_rank(ranks)
  deviation = np.std(1 / ranks) / math.sqrt(texts)
  assert abs(found - chance(size)) < 4 * deviation < 0.1 * chance(size)
  assert chance(1) == 1 and chance(3) == (1 + 1 / 2 + 1 / 3) / 3


def test_a_pool_is_spread_evenly_over_its_split():
  examples = draw_examples(11)
  pool = choose_pool(examples, 4)
  assert pool.indices.tolist() == [0, 2, 5, 8] and len(pool) == 4
  for place, index in enumerate(pool.indices):
    for side in ('text', 'code'):
      np.testing.assert_array_equal(
          getattr(pool, f'{side}_tokens')[place],
          examples[index][f'{side}_tokens'],
      )


def test_pairs_with_a_text_or_code_that_was_there_are_passed_over(caplog):
  long = [*range(10, 30)]
  examples = [
      example([5, 6], [7]),
      example([5, 6], [8]),  # The text of the first.
      example([9], [7]),  # Its code.
      example([7], [5, 6]),  # Another: texts are no codes.
      example(long, [10]),
      example([*long, 31], [11]),  # The same, as far as it is read.
      example([12], [8]),  # The code of one that is not there.
  ]
  assert choose_pool(examples, 4).indices.tolist() == [0, 3, 4, 6]
  pool = choose_pool(examples, 5)
  assert pool.indices.tolist() == [0, 3, 4, 6]
  assert 'among 4 pairs instead of 5: the split has no more' in caplog.text


def test_pools_and_numbers_that_make_no_sense_are_refused(params, pool):
  step = make_step((1, 1, 1), 1)
  with pytest.raises(UserError, match='expected pool_size to be at least 1'):
    choose_pool(draw_examples(3), 0)
  with pytest.raises(UserError, match='expected rerank to be at least 1'):
    find_codes(step, params, pool, 8, 0)
  with pytest.raises(UserError, match='at most the 37 codes .*, found 38'):
    find_codes(step, params, pool, 8, 38)


def plain_bm25(query, document, documents):
  """The formula as it stands in books, with Lucene's logarithm."""
  mean = sum(map(len, documents)) / len(documents)
  score = 0.0
  for word in query:
    having = sum(word in other for other in documents)
    idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
    count = document.count(word)
    norm = 1.5 * (1 - 0.75 + 0.75 * len(document) / mean)
    score += idf * count / (count + norm)
  return score


def test_bm25_ranks_as_its_formula():
  codes = [
      'def readFile(path): return open(path).read()',
      'def write_file(path, text): open(path, "w").write(text)',
      'def mean(values): return sum(values) / len(values)',
      'x = 1',
  ]
  texts = [
      'Write the text of a file to a path.',
      'Write a file, write it all.',
      'The mean of values.',
      'Reads nothing at all.',
  ]
  documents = [words_of(code) for code in codes]
  expected = []
  for number, text in enumerate(texts):
    scores = [plain_bm25(words_of(text), d, documents) for d in documents]
    expected.append(sum(score >= scores[number] - 1e-6 for score in scores))
  assert bm25_ranks(texts, codes).tolist() == expected
  # Its own words are the first one's; the third finds it; the last has none.
  assert expected == [2, 1, 1, 4]


def test_bm25_takes_texts_and_codes_without_words(capfd):
  assert bm25_ranks(['?', 'sum'], ['sum(x)', '+']).tolist() == [2, 2]
  assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize(
    'text, words',
    [
        ('parse_URLString', ['parse', 'url', 'string']),
        ('__init__', ['init']),
        ('maxValue2d', ['max', 'value2d']),
        ('größe übrig', ['größe', 'übrig']),
        ('a.b->c', ['a', 'b', 'c']),
        ('', []),
    ],
)
def test_names_are_split_where_people_split_them(text, words):
  assert words_of(text) == words
