import json

import flax.linen as nn
import jax
import pytest

from codet5p_jax import retrieval
from codet5p_jax.corpus.folder import pair_texts
from codet5p_jax.corpus.source_files import SourceFile
from codet5p_jax.errors import UserError
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.main import main
from codet5p_jax.models.bimodal import BimodalConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.runs.evaluate import evaluate
from codet5p_jax.training.batches import evaluation_examples
from codet5p_jax.training.checkpoints.weights import save_weights
from codet5p_jax.training.optimizers import AdamW
from codet5p_jax.training.run_folder import open_run_folder
from codet5p_jax.trained_model import load_trained_model

# The validation split has ten pairs.
POOL_SIZE, RERANK = 9, 3


@pytest.fixture(scope='module')
def pair_corpus(make_small_corpus, tmp_path_factory):
  """Functions that have nothing in common but their form."""
  def function(index):
    noun, verb, other = (f'{name}{index}' for name in ('noun', 'verb', 'other'))
    return (
        f'def {verb}_{noun}({noun}, {other}):\n'
        f'  """Gives the {noun} of {index} and {other}."""\n'
        f'  first{index} = {noun}.take{index}({other})\n'
        f'  second{index} = {other}.put{index}(first{index})\n'
        f'  return second{index}, {index}\n\n\n'
    )

  files = [
      SourceFile(
          text=''.join(function(10 * file + place) for place in range(10)),
          language='python',
          licence='mit',
          origin=f'package-{file}',
          path=f'package_{file}/module.py',
      )
      for file in range(20)
  ]
  folder = tmp_path_factory.mktemp('corpora') / 'pairs'
  make_small_corpus(files, folder, pairs=True)
  return folder


@pytest.fixture(scope='module')
def make_run(pair_corpus, tmp_path_factory):
  """Makes the folder of a run that trained such losses, for no step at all."""
  vocabulary = load_vocabulary(pair_corpus / 'vocabulary')
  ids = vocabulary.task_tokens
  model = BimodalConfig(
      vocab_size=vocabulary.vocab_size,
      emb_dim=24,
      num_heads=2,
      head_dim=5,
      mlp_dim=18,
      num_encoder_layers=1,
      num_decoder_layers=1,
      projection_dim=16,
      match_id=ids.match,
      text_decoder_id=ids.tdec,
      code_decoder_id=ids.cdec,
      initial_temperature=0.07,
  )
  params = nn.unbox(
      jax.jit(model.make_model().init_params)(jax.random.key(0))
  )

  def make(*losses):
    folder = open_run_folder(
        tmp_path_factory.mktemp('runs') / 'run',
        {
            'model': model,
            'objectives': (
                Bimodal(
                    text_length=21, code_length=60, queue_size=8, losses=losses
                ),
            ),
            'optimizer': AdamW(1e-2, 1, 2, 0.1),
            'batch_size': 8,
            'computation': Computation(dtype='float32'),
            'vocabulary_fingerprint': vocabulary.fingerprint,
            'data_dir': str(pair_corpus),
        },
    )
    vocabulary.save(folder.vocabulary)
    save_weights(folder.model, params, {'step': 7}, vocabulary.vocab_size)
    return folder.path

  return make


@pytest.fixture(scope='module')
def matching_run(make_run):
  return make_run('contrastive', 'matching')


def mean(ranks):
  return sum(1 / rank for rank in ranks) / len(ranks)


def test_a_model_that_compares_texts_and_codes_finds_codes(
    matching_run, pair_corpus, capsys
):
  arguments = ['--gin_file=runs/evaluate.gin', f'RUN_DIR={matching_run}']
  assert not main([
      'evaluate', *arguments, f'POOL_SIZE={POOL_SIZE}', f'RERANK={RERANK}'
  ])
  printed = json.loads(capsys.readouterr().out)
  path = matching_run / 'evaluation' / 'validation' / 'metrics.json'
  written = json.loads(path.read_text())
  assert printed.pop('split') == 'validation'
  assert printed.items() <= written.items()
  trained = load_trained_model(str(matching_run))
  [objective] = trained.train_step.config.objectives
  pool = retrieval.choose_pool(
      evaluation_examples(
          objective, str(pair_corpus), 'validation', trained.vocabulary
      ),
      POOL_SIZE,
  )
  ranks, again = retrieval.find_codes(
      trained.train_step, trained.all_params, pool, 16, RERANK
  )
  pairs = pair_texts(pair_corpus, 'validation')
  texts, codes = (
      [pairs[int(index)][side] for index in pool.indices]
      for side in ('text', 'code')
  )
  found = {
      key.removeprefix('bimodal/'): value
      for key, value in written.items()
      if 'mrr' in key or key in ('bimodal/pool_size', 'bimodal/reranked')
  }
  assert found == {
      'pool_size': POOL_SIZE,
      'reranked': RERANK,
      'mrr': pytest.approx(mean(ranks)),
      'mrr_reranked': pytest.approx(mean(again)),
      'mrr_bm25': pytest.approx(mean(retrieval.bm25_ranks(texts, codes))),
      'mrr_chance': pytest.approx(mean(range(1, POOL_SIZE + 1))),
  }
  # The names in these texts stand in their codes alone.
  assert found['mrr_bm25'] == 1
  assert 'bimodal/contrastive_loss' in written


def test_what_is_asked_for_is_there_or_one_clear_line_comes_first(matching_run):
  for settings, message in (
      ({'pool_size': 10**6, 'rerank': 10**5}, 'at most the [0-9]+ codes of'),
      ({'pool_size': 0}, 'expected pool_size to be at least 1'),
      ({'pool_size': 5, 'rerank': 0}, 'expected rerank to be at least 1'),
      ({'pool_size': 5, 'rerank': 6}, 'at most the 5 codes of the pool'),
  ):
    with pytest.raises(UserError, match=message) as error:
      evaluate(str(matching_run), 'test', **settings)
    assert '\n' not in str(error.value)
  assert not (matching_run / 'evaluation' / 'test').exists()


def test_no_codes_are_found_where_none_are_asked_for(matching_run):
  # The queue, which only training has, would not hold batches of this size.
  values = evaluate(
      str(matching_run), 'train', batch_size=24, batch_count=1, pool_size=None
  )
  assert 'bimodal/loss' in values
  assert not any('mrr' in name for name in values)


def test_a_model_that_was_not_trained_to_match_ranks_nothing_again(make_run):
  # No code is ranked again, so it does not matter how many would be.
  values = evaluate(
      str(make_run('contrastive')), pool_size=POOL_SIZE, rerank=POOL_SIZE + 1
  )
  measured = {name for name in values if name.startswith('bimodal/')}
  assert measured >= {
      f'bimodal/{name}' for name in ('mrr', 'mrr_bm25', 'mrr_chance')
  }
  assert measured.isdisjoint({'bimodal/mrr_reranked', 'bimodal/reranked'})


def test_a_model_that_only_writes_finds_no_codes(make_run):
  values = evaluate(str(make_run('code_to_text')), batch_count=1)
  assert not any('mrr' in name for name in values)
