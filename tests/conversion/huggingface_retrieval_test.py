"""Tests of the PyTorch classes of the embedding and the bimodal model."""

import json
import math
import shutil

import numpy as np
import pytest

from codet5p_jax.conversion.remote_code import find_remote_code

for name in ('torch', 'transformers'):
  pytest.importorskip(name)

from tests.conversion.exported_folders import (  # noqa: E402
    BATCH,
    code_kept_in,
    draw,
    load,
    make_batch,
    run,
    safetensors_numpy,
    torch,
    transformers,
    write_folder,
)

T5 = {
    'vocab_size': 83,
    'd_model': 20,
    'd_kv': 6,
    'd_ff': 28,
    # Not fewer than in the decoder: transformers' cache has room for no more.
    'num_layers': 3,
    'num_decoder_layers': 2,
    'num_heads': 4,
    'feed_forward_proj': 'relu',
    'relative_attention_num_buckets': 8,
    'relative_attention_max_distance': 12,
    'pad_token_id': 0,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'decoder_start_token_id': 0,
    'embed_dim': 11,
    'match_token_id': 71,
}


@pytest.fixture(scope='module', autouse=True)
def code_cache(tmp_path_factory):
  with code_kept_in(tmp_path_factory.mktemp('modules')):
    yield


def t5_tensors(with_decoder):
  """Weights by the names of section 2.1, one name a tensor."""
  with torch.device('meta'):
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5)
    )
  shapes = {
      name: tuple(parameter.shape)
      for name, parameter in model.named_parameters()
      if with_decoder or not name.startswith('decoder.')
  }
  assert 'shared.weight' in shapes and 'lm_head.weight' not in shapes
  heads = {'proj.weight': (T5['embed_dim'], T5['d_model'])}
  heads['proj.bias'] = (T5['embed_dim'],)
  if with_decoder:
    heads |= {'itm_head.weight': (2, T5['d_model']), 'itm_head.bias': (2,)}
  return draw(shapes | heads, seed=5)


def reference_t5(tensors):
  """transformers' own T5 with the weights of a bimodal model."""
  reference = transformers.T5ForConditionalGeneration(
      transformers.T5Config(**T5)
  ).eval()
  kept = {
      name: torch.from_numpy(tensor)
      for name, tensor in tensors.items()
      if not name.startswith(('proj.', 'itm_head.'))
  }
  missing, unexpected = reference.load_state_dict(kept, strict=False)
  assert not unexpected
  assert set(missing) == {
      'lm_head.weight', 'encoder.embed_tokens.weight',
      'decoder.embed_tokens.weight',
  }
  return reference


@pytest.fixture(scope='module')
def bimodal_tensors():
  return t5_tensors(with_decoder=True)


@pytest.fixture(scope='module')
def bimodal(bimodal_tensors, tmp_path_factory):
  folder = tmp_path_factory.mktemp('folders') / 'bimodal'
  config = T5 | {'is_encoder_decoder': True}
  write_folder(folder, 'codet5p_bimodal', config, bimodal_tensors)
  return load('AutoModel', folder)


def expected_embeddings(tensors, batch):
  states = reference_t5(tensors).encoder(
      batch['input_ids'], attention_mask=batch['attention_mask']
  ).last_hidden_state.detach().double().numpy()
  projected = states[:, 0] @ tensors['proj.weight'].T + tensors['proj.bias']
  return projected / np.sqrt((projected**2).sum(-1, keepdims=True))


def test_embeddings_are_the_first_state_projected(bimodal_tensors, tmp_path):
  tensors = {
      name: tensor
      for name, tensor in bimodal_tensors.items()
      if not name.startswith(('decoder.', 'itm_head.'))
  }
  folder = write_folder(
      tmp_path / 'embedding',
      'codet5p_embedding',
      T5 | {'is_encoder_decoder': False},
      tensors,
  )
  model = load('AutoModel', folder)
  batch = make_batch()
  with torch.no_grad():
    embeddings = model(batch['input_ids'], batch['attention_mask'])
  assert embeddings.shape == (BATCH, T5['embed_dim'])
  np.testing.assert_allclose(embeddings.norm(dim=-1), 1, rtol=1e-6)
  np.testing.assert_allclose(
      embeddings,
      expected_embeddings(bimodal_tensors, batch),
      rtol=0,
      atol=1e-6,
  )
  model.save_pretrained(tmp_path / 'saved')
  saved = safetensors_numpy.load_file(tmp_path / 'saved/model.safetensors')
  assert saved.keys() == tensors.keys()


def test_the_bimodal_model_embeds_and_generates_as_t5(
    bimodal, bimodal_tensors
):
  batch = make_batch()
  source = {name: batch[name] for name in ('input_ids', 'attention_mask')}
  with torch.no_grad():
    embeddings = bimodal.embed(**source)
  np.testing.assert_allclose(
      embeddings,
      expected_embeddings(bimodal_tensors, batch),
      rtol=0,
      atol=1e-6,
  )
  reference = reference_t5(bimodal_tensors)
  reference.generation_config = bimodal.generation_config
  assert torch.equal(run(bimodal, batch).logits, run(reference, batch).logits)
  for options in ({}, {'num_beams': 3}):
    ours, theirs = (
        model.generate(**source, max_new_tokens=8, **options)
        for model in (bimodal, reference)
    )
    assert torch.equal(ours, theirs)


def test_matching_reads_the_last_end_of_the_code(bimodal, bimodal_tensors):
  match, end = T5['match_token_id'], T5['eos_token_id']
  batch = make_batch()
  lengths = batch['decoder_attention_mask'].sum(1)
  code = batch['decoder_input_ids'] * batch['decoder_attention_mask']
  code[torch.arange(BATCH), lengths - 1] = end
  code[1, 2] = end  # An earlier one, to be passed over.
  given = code.clone()
  with torch.no_grad():
    logits = bimodal.match_logits(
        batch['input_ids'],
        batch['attention_mask'],
        given,
        batch['decoder_attention_mask'],
    )
  assert torch.equal(given, code)
  code[:, 0] = match
  states = reference_t5(bimodal_tensors)(
      **(batch | {'decoder_input_ids': code}), output_hidden_states=True
  ).decoder_hidden_states[-1].detach().double().numpy()
  vectors = states[np.arange(BATCH), lengths - 1]
  expected = vectors @ bimodal_tensors['itm_head.weight'].T
  expected = expected + bimodal_tensors['itm_head.bias']
  assert logits.shape == (BATCH, 2)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
  given[2] = 7
  with pytest.raises(ValueError, match='found a row without one'):
    bimodal.match_logits(
        batch['input_ids'],
        batch['attention_mask'],
        given,
        batch['decoder_attention_mask'],
    )


@pytest.mark.parametrize('model_type', ['codet5p_embedding', 'codet5p_bimodal'])
def test_released_sizes_of_the_t5_family_have_the_released_counts(
    model_type, tmp_path
):
  config = {
      'vocab_size': 32103, 'd_model': 768, 'd_kv': 64, 'num_heads': 12,
      'd_ff': 3072, 'num_layers': 12, 'num_decoder_layers': 12,
      'model_type': model_type,
      'auto_map': find_remote_code(model_type).auto_map,
  }
  (tmp_path / 'config.json').write_text(json.dumps(config))
  for file in find_remote_code(model_type).files:
    shutil.copy(file, tmp_path)
  config = transformers.AutoConfig.from_pretrained(
      tmp_path, trust_remote_code=True
  )
  assert config.embed_dim == 256
  with torch.device('meta'):
    model = transformers.AutoModel.from_config(config, trust_remote_code=True)
  shapes = {name: x.shape for name, x in model.named_parameters()}
  expected = {
      'codet5p_embedding': (101, 109_806_208),
      'codet5p_bimodal': (261, 223_082_754),
  }[model_type]
  assert (len(shapes), sum(map(math.prod, shapes.values()))) == expected
