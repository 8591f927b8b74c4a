"""Tests of the PyTorch class of the composite that exported folders carry."""

import itertools
import json
import shutil

import numpy as np
import pytest

from codet5p_jax.conversion.remote_code import find_remote_code
from tests.conversion import composite_twin

for name in ('torch', 'transformers'):
  pytest.importorskip(name)

from tests.conversion.exported_folders import (  # noqa: E402
    BATCH,
    SOURCE_LENGTH,
    TARGET_LENGTH,
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

NUM_POSITIONS = 19
START = 90
ENCODER = {
    'vocab_size': 101,
    'n_embd': 24,
    'n_layer': 2,
    'n_head': 4,
    'rotary_dim': 4,
}
# Heads of 5, the square root of which is no round number in any dtype.
DECODER = {
    'vocab_size': 103,
    'n_embd': 40,
    'n_layer': 3,
    'n_head': 8,
    'rotary_dim': 2,
    'n_inner': 72,
}


def stack_config(sizes, is_decoder, **fields):
  """A stack's part of config.json, with all fields of the released ones."""
  return {
      'activation_function': 'gelu_new',
      'add_cross_attention': is_decoder,
      'attn_pdrop': 0.0,
      'bos_token_id': 1,
      'cross_attention_hidden_size': None,
      'decoder_start_token_id': None,
      'embd_pdrop': 0.0,
      'eos_token_id': sizes['vocab_size'] - 3,
      'initializer_range': 0.02,
      'is_decoder': is_decoder,
      'layer_norm_epsilon': 1e-05,
      'model_type': 'codet5p_module',
      'n_ctx': NUM_POSITIONS,
      'n_inner': None,
      'n_positions': NUM_POSITIONS,
      'pad_token_id': None,
      'resid_pdrop': 0.0,
      'scale_attn_weights': True,
      'tie_word_embeddings': False,
      'use_cache': True,
      **sizes,
      **fields,
  }


def composite_config(**decoder_fields):
  return {
      'is_encoder_decoder': True,
      'encoder': stack_config(ENCODER, False),
      'decoder': stack_config(DECODER, True, **decoder_fields),
  }


CONFIG = composite_config(decoder_start_token_id=START)


def stack_shapes(prefix, config, has_cross_attention):
  size, inner = config['n_embd'], config['n_inner'] or 4 * config['n_embd']
  mask = (1, 1, config['n_positions'], config['n_positions'])
  shapes = {
      'wte.weight': (config['vocab_size'], size),
      'ln_f.weight': (size,),
      'ln_f.bias': (size,),
  }
  for layer in range(config['n_layer']):
    shapes |= {
        f'h.{layer}.ln_1.weight': (size,),
        f'h.{layer}.ln_1.bias': (size,),
        f'h.{layer}.attn.causal_mask': mask,
        f'h.{layer}.attn.qkv_proj.weight': (3 * size, size),
        f'h.{layer}.attn.out_proj.weight': (size, size),
        f'h.{layer}.mlp.fc_in.weight': (inner, size),
        f'h.{layer}.mlp.fc_in.bias': (inner,),
        f'h.{layer}.mlp.fc_out.weight': (size, inner),
        f'h.{layer}.mlp.fc_out.bias': (size,),
    }
  if has_cross_attention:
    shapes |= {
        f'h.{layer}.crossattention.causal_mask': mask,
        f'h.{layer}.crossattention.q_attn.weight': (size, size),
        f'h.{layer}.crossattention.qkv_proj.weight': (2 * size, size),
        f'h.{layer}.crossattention.out_proj.weight': (size, size),
    }
  return {f'{prefix}.{name}': shape for name, shape in shapes.items()}


def composite_shapes(config):
  """Section 2.2 of the specification: {name: shape}."""
  encoder, decoder = config['encoder'], config['decoder']
  return {
      **stack_shapes('encoder', encoder, False),
      'enc_to_dec_proj.weight': (decoder['n_embd'], encoder['n_embd']),
      'enc_to_dec_proj.bias': (decoder['n_embd'],),
      **stack_shapes('decoder.transformer', decoder, True),
      'decoder.lm_head.weight': (decoder['vocab_size'], decoder['n_embd']),
      'decoder.lm_head.bias': (decoder['vocab_size'],),
  }


@pytest.fixture(scope='module', autouse=True)
def code_cache(tmp_path_factory):
  with code_kept_in(tmp_path_factory.mktemp('modules')):
    yield


@pytest.fixture(scope='module')
def tensors():
  return draw(composite_shapes(CONFIG))


@pytest.fixture(scope='module')
def folder(tensors, tmp_path_factory):
  folder = tmp_path_factory.mktemp('folders') / 'composite'
  return write_folder(folder, 'codet5p', CONFIG, tensors)


@pytest.fixture(scope='module')
def model(folder):
  return load('AutoModelForSeq2SeqLM', folder)


def test_logits_equal_the_twin_in_float64(model, tensors):
  batch = make_batch()
  logits = run(model, batch).logits
  assert logits.shape == (BATCH, TARGET_LENGTH, DECODER['vocab_size'])
  for row in range(BATCH):
    twin = composite_twin.run_composite(
        tensors,
        CONFIG,
        *(
            batch[name][row].numpy()
            for name in (
                'input_ids',
                'attention_mask',
                'decoder_input_ids',
                'decoder_attention_mask',
            )
        ),
    )
    np.testing.assert_allclose(logits[row], twin, rtol=0, atol=1e-5)


def test_without_cross_attention_the_decoder_is_the_codegen_of_transformers(
    tensors, tmp_path
):
  muted = dict(tensors)
  last = f'decoder.transformer.h.{DECODER["n_layer"] - 1}.crossattention'
  muted[f'{last}.out_proj.weight'] = np.zeros_like(
      tensors[f'{last}.out_proj.weight']
  )
  model = load(
      'AutoModelForSeq2SeqLM',
      write_folder(tmp_path / 'muted', 'codet5p', CONFIG, muted),
  )
  fields = dict(CONFIG['decoder'])
  del fields['model_type']
  codegen = transformers.CodeGenForCausalLM(
      transformers.CodeGenConfig(**fields)
  ).eval()
  codegen.load_state_dict({
      name.removeprefix('decoder.'): torch.from_numpy(tensor)
      for name, tensor in tensors.items()
      if name.startswith('decoder.')
      and 'crossattention' not in name
      and 'causal_mask' not in name
  })
  batch = make_batch()
  expected = codegen(
      input_ids=batch['decoder_input_ids'],
      attention_mask=batch['decoder_attention_mask'],
  ).logits.detach()
  np.testing.assert_allclose(
      run(model, batch).logits, expected, rtol=0, atol=1e-5
  )


def test_the_encoder_looks_both_ways_and_the_decoder_back(model):
  batch = {
      name: ids for name, ids in make_batch().items() if name.endswith('ids')
  }
  before = run(model, batch)
  batch['input_ids'][:, -1] += 1
  changed = run(model, batch)
  difference = changed.encoder_last_hidden_state - before[
      'encoder_last_hidden_state'
  ]
  assert (difference[:, 0].abs().amax(-1) > 1e-3).all()
  assert ((changed.logits - before.logits).abs().amax(-1) > 1e-4).all()
  batch['decoder_input_ids'][:, -1] += 1
  later = run(model, batch)
  assert torch.equal(later.logits[:, :-1], changed.logits[:, :-1])
  assert not torch.equal(later.logits[:, -1], changed.logits[:, -1])


def test_padding_changes_nothing(model):
  batch = make_batch()
  logits = run(model, batch).logits
  for row in range(BATCH):
    source = int(batch['attention_mask'][row].sum())
    target = int(batch['decoder_attention_mask'][row].sum())
    alone = {
        'input_ids': batch['input_ids'][row : row + 1, :source],
        'decoder_input_ids': batch['decoder_input_ids'][row : row + 1, :target],
    }
    np.testing.assert_allclose(
        logits[row, :target], run(model, alone).logits[0], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_cached_steps_equal_one_pass(folder, dtype):
  model = load('AutoModelForSeq2SeqLM', folder, dtype=dtype)
  batch = make_batch()
  ids = batch['decoder_input_ids']
  expected = run(model, batch).logits
  steps, cache, begin = [], None, 0
  for end in (2, 3, TARGET_LENGTH):
    output = run(
        model,
        batch,
        decoder_input_ids=ids[:, begin:end],
        decoder_attention_mask=batch['decoder_attention_mask'][:, :end],
        past_key_values=cache,
        use_cache=True,
    )
    steps.append(output.logits)
    cache, begin = output.past_key_values, end
  tolerance = {'float32': 1e-5, 'float16': 2e-2}[dtype]
  np.testing.assert_allclose(
      torch.cat(steps, 1), expected, rtol=0, atol=tolerance
  )
  # The keys and values of the encoder's states are computed once.
  last = DECODER['n_layer'] - 1
  assert cache.cross_attention_cache.get_seq_length(last) == SOURCE_LENGTH


def generate(model, **options):
  torch.manual_seed(0)
  batch = make_batch()
  settings = {'max_length': NUM_POSITIONS, 'pad_token_id': 0}
  settings |= {
      name: batch[name] for name in ('input_ids', 'attention_mask')
  }
  return model.generate(**(settings | options))


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'num_beams': 3},
        {'num_beams': 4, 'num_return_sequences': 2},
        {'do_sample': True, 'top_k': 50, 'top_p': 0.95, 'temperature': 0.8},
    ],
    ids=['greedy', 'beams', 'two_beams', 'sampling'],
)
def test_generation_is_the_same_with_and_without_a_cache(model, options):
  cached, uncached = (
      generate(model, use_cache=use_cache, **options)
      for use_cache in (True, False)
  )
  assert torch.equal(cached, uncached)
  assert cached.shape[0] == BATCH * options.get('num_return_sequences', 1)
  assert (cached[:, 0] == START).all()
  assert len({tuple(row) for row in cached.tolist()}) == len(cached)


def test_greedy_generation_takes_the_best_token_each_time(model):
  ids = generate(model)
  batch = make_batch()
  for end in range(1, ids.shape[1]):
    best = run(
        model,
        {name: batch[name] for name in ('input_ids', 'attention_mask')},
        decoder_input_ids=ids[:, :end],
    ).logits[:, -1].argmax(-1)
    running = ~(ids[:, :end] == model.generation_config.eos_token_id).any(1)
    assert torch.equal(ids[running, end], best[running])


def test_a_prompt_is_used_as_it_is(model):
  prompt = make_batch()['decoder_input_ids']
  ids = generate(model, decoder_input_ids=prompt)
  assert torch.equal(ids[:, :TARGET_LENGTH], prompt)
  best = run(
      model, make_batch(), decoder_attention_mask=None
  ).logits[:, -1].argmax(-1)
  assert torch.equal(ids[:, TARGET_LENGTH], best)


def test_the_loss_takes_labels_as_they_stand(model):
  batch = make_batch()
  labels = torch.from_numpy(
      np.random.default_rng(3).integers(0, 100, (BATCH, TARGET_LENGTH))
  )
  labels[0, 1:3] = -100
  output = run(model, batch, labels=labels)
  scores = output.logits.double().log_softmax(-1).numpy()
  losses = [
      -scores[row, place, labels[row, place]]
      for row, place in itertools.product(range(BATCH), range(TARGET_LENGTH))
      if labels[row, place] != -100
  ]
  assert len(losses) == BATCH * TARGET_LENGTH - 2
  assert output.loss.item() == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    'config, pad',
    [
        (CONFIG, CONFIG['decoder']['eos_token_id']),
        # As the exporter writes it.
        (
            composite_config(decoder_start_token_id=60)
            | {'decoder_start_token_id': START, 'pad_token_id': 77},
            77,
        ),
    ],
    ids=['as_released', 'as_exported'],
)
def test_labels_alone_are_shifted_behind_the_start(
    config, pad, tensors, tmp_path
):
  folder = write_folder(tmp_path / 'shifted', 'codet5p', config, tensors)
  model = load('AutoModelForSeq2SeqLM', folder)
  source = {'input_ids': make_batch()['input_ids']}
  labels = torch.tensor([[5, 6, 7], [8, -100, 9], [10, 11, -100]])
  shifted = torch.tensor([[START, 5, 6], [START, 8, pad], [START, 10, 11]])
  alone = run(model, source, labels=labels)
  given = run(model, source, labels=labels, decoder_input_ids=shifted)
  assert torch.equal(alone.logits, given.logits)
  assert torch.equal(alone.loss, given.loss)
  assert (generate(model)[:, 0] == START).all()


def test_without_a_start_token_labels_and_generation_ask_for_one(
    tensors, tmp_path
):
  model = load(
      'AutoModelForSeq2SeqLM',
      write_folder(tmp_path / '16b', 'codet5p', composite_config(), tensors),
  )
  batch = make_batch()
  source, prompt = batch['input_ids'], batch['decoder_input_ids']
  with pytest.raises(ValueError, match='decoder_start_token_id, found neither'):
    model(input_ids=source, labels=prompt)
  with pytest.raises(ValueError, match='decoder_start_token_id, found neither'):
    generate(model)
  with pytest.raises(ValueError, match='decoder_input_ids or labels'):
    model(input_ids=source)
  started = generate(model, decoder_start_token_id=START)
  assert (started[:, 0] == START).all()
  prompted = generate(model, decoder_input_ids=prompt)
  assert torch.equal(prompted[:, :TARGET_LENGTH], prompt)


def test_states_of_the_encoder_can_be_given(model):
  batch = make_batch()
  full = run(model, batch, output_hidden_states=True)
  assert len(full.encoder_hidden_states) == ENCODER['n_layer'] + 1
  assert len(full.decoder_hidden_states) == DECODER['n_layer'] + 1
  assert torch.equal(
      full.encoder_hidden_states[-1], full.encoder_last_hidden_state
  )
  del batch['input_ids']
  for given in (
      model.get_encoder()(
          make_batch()['input_ids'], batch['attention_mask']
      ),
      (full.encoder_last_hidden_state,),
  ):
    logits, states = run(
        model, batch, encoder_outputs=given, return_dict=False, logits_to_keep=2
    )
    np.testing.assert_allclose(logits, full.logits[:, -2:], rtol=0, atol=1e-5)
    assert torch.equal(states, full.encoder_last_hidden_state)
  with pytest.raises(ValueError, match='no attention weights'):
    model(**batch, encoder_outputs=given, output_attentions=True)


def test_saving_gives_the_same_tensors_and_code(model, tensors, tmp_path):
  model.save_pretrained(tmp_path / 'saved')
  saved = safetensors_numpy.load_file(tmp_path / 'saved/model.safetensors')
  assert saved.keys() == tensors.keys()
  for name, tensor in saved.items():
    assert tensor.dtype == tensors[name].dtype
    np.testing.assert_array_equal(tensor, tensors[name])
  for file in find_remote_code('codet5p').files:
    assert (tmp_path / 'saved' / file.name).read_text() == file.read_text()
  again = load('AutoModelForSeq2SeqLM', tmp_path / 'saved')
  batch = make_batch()
  assert torch.equal(run(again, batch).logits, run(model, batch).logits)


def test_masks_may_be_absent_and_float16_stays(tensors, tmp_path):
  halved = {
      name: tensor.astype(np.float16)
      for name, tensor in tensors.items()
      if not name.endswith('causal_mask')
  }
  folder = tmp_path / 'halved'
  write_folder(folder, 'codet5p', CONFIG | {'torch_dtype': 'float16'}, halved)
  model = load('AutoModel', folder)
  state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  assert state.keys() == tensors.keys()
  for name, tensor in state.items():
    expected = halved.get(name, tensors[name])
    assert tensor.dtype == expected.dtype
    np.testing.assert_array_equal(tensor, expected)
  logits = run(model, make_batch()).logits
  assert logits.dtype == torch.float32
  exact = run(load('AutoModel', folder, dtype='float32'), make_batch()).logits
  np.testing.assert_allclose(logits, exact, rtol=0, atol=0.05)


def test_a_number_of_heads_that_four_does_not_divide_is_refused(model):
  config = type(model.config)(
      encoder=CONFIG['encoder'], decoder=CONFIG['decoder'] | {'n_head': 5}
  )
  with pytest.raises(ValueError, match='multiple of 4 .*found n_head=5'):
    type(model)(config)


RELEASED = {
    '2b': (2560, 32, 32, 64, 482, 3_112_427_008, 6_447_152_128),
    '6b': (4096, 33, 16, 64, 491, 7_439_753_216, 15_105_998_848),
    '16b': (6144, 34, 24, 64, 500, 16_493_680_640, 33_218_048_000),
}


def released_config(size):
  """config.json of a released model, with what transformers 4.21 adds."""
  width, layers, heads, rotary, *_ = RELEASED[size]
  positions = {'n_ctx': 2048, 'n_positions': 2048, 'vocab_size': 51200}
  old = {
      '_name_or_path': 'codegen',
      'diversity_penalty': 0.0,
      'do_sample': False,
      'early_stopping': False,
      'id2label': {'0': 'LABEL_0', '1': 'LABEL_1'},
      'label2id': {'LABEL_0': 0, 'LABEL_1': 1},
      'num_beams': 1,
      'output_attentions': False,
      'output_hidden_states': False,
      'pruned_heads': {},
      'return_dict': True,
      'temperature': 1.0,
      'tie_encoder_decoder': False,
      'tokenizer_class': 'GPT2Tokenizer',
      'top_k': 50,
      'torch_dtype': 'float16',
      'torchscript': False,
      'transformers_version': '4.21.3',
      'use_bfloat16': False,
      'eos_token_id': 50256,
  }
  encoder = {'n_embd': 1024, 'n_layer': 20, 'n_head': 16, 'rotary_dim': 32}
  decoder = {'n_embd': width, 'n_layer': layers, 'n_head': heads}
  start = 50256 if size == '2b' else None
  return {
      '_name_or_path': f'codet5p-{size}',
      'architectures': ['CodeT5pEncoderDecoderModel'],
      'auto_map': {
          'AutoConfig': 'configuration_codet5p.CodeT5pConfig',
          'AutoModel': 'modeling_codet5p.CodeGenModel',
          'AutoModelForSeq2SeqLM': (
              'modeling_codet5p.CodeT5pEncoderDecoderModel'
          ),
      },
      'encoder': stack_config(encoder | positions, False, **old),
      'decoder': stack_config(
          decoder | positions | {'rotary_dim': rotary},
          True,
          **old,
          decoder_start_token_id=start,
      ),
      'is_encoder_decoder': True,
      'model_type': 'codet5p',
      'torch_dtype': 'float16',
      'transformers_version': None,
  }


@pytest.mark.parametrize('size', RELEASED)
def test_released_configurations_load_and_have_the_released_tensors(
    size, tmp_path
):
  *_, num_names, num_parameters, num_bytes = RELEASED[size]
  written = released_config(size)
  (tmp_path / 'config.json').write_text(json.dumps(written))
  for file in find_remote_code('codet5p').files:
    shutil.copy(file, tmp_path)
  config = transformers.AutoConfig.from_pretrained(
      tmp_path, trust_remote_code=True
  )
  for stack in ('encoder', 'decoder'):
    for name in stack_config(ENCODER, False):
      assert getattr(getattr(config, stack), name) == written[stack][name]
  with torch.device('meta'):
    model = transformers.AutoModelForSeq2SeqLM.from_config(
        config, trust_remote_code=True, dtype=torch.float16
    )
  state = model.state_dict()
  shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
  assert shapes == composite_shapes(written)
  assert len(shapes) == num_names
  for name, tensor in state.items():
    is_mask = name.endswith('causal_mask')
    assert tensor.dtype == (torch.uint8 if is_mask else torch.float16)
  assert sum(x.numel() for x in model.parameters()) == num_parameters
  assert sum(x.nbytes for x in state.values()) == num_bytes
