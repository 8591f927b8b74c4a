import dataclasses
import pathlib

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from codet5p_jax.layers import quantization
from codet5p_jax.models.codegen import CodeGenConfig
from codet5p_jax.models.computation import Computation
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.sharding import DEFAULT_RULES, make_mesh, partition_spec
from codet5p_jax.training.evaluation import entropy
from codet5p_jax.training.optimizers import AdamW
from codet5p_jax.training.train_step import StepConfig, make_train_step

LAYERS, EMBED, HEADS, KV, MLP, VOCAB = 3, 10, 2, 7, 13, 17
SIZES = {
    'layers': LAYERS,
    'embed': EMBED,
    'decoder_embed': 11,
    'heads': HEADS,
    'kv': KV,
    'mlp': MLP,
    'vocab': VOCAB,
}
# Axes of each kernel, and an equation of the product with it: what is summed
# over stands in no result.
KERNELS = {
    ('embed', 'heads', 'kv'): 'be,ehk->bhk',
    ('heads', 'kv', 'embed'): 'bhk,hke->be',
    ('embed', 'mlp'): 'be,em->bm',
    ('mlp', 'embed'): 'bm,me->be',
    ('embed', 'decoder_embed'): 'be,ed->bd',
    ('vocab', 'embed'): 'be,ve->bv',
}
NUMBERS = np.random.default_rng(0)


def draw(names):
  """Channels whose sizes differ by orders of magnitude."""
  shape = tuple(SIZES[name] for name in names)
  values = NUMBERS.normal(size=shape) * 10 ** NUMBERS.normal(size=shape)
  return values.astype(np.float32)


@pytest.mark.parametrize('names', KERNELS, ids='-'.join)
def test_a_product_moves_by_at_most_half_a_scale_per_unit_of_input(names):
  kernel = draw(names)
  equation = KERNELS[names]
  inputs = equation.split(',')[0]
  letters = {'b': 5, 'e': EMBED, 'h': HEADS, 'k': KV, 'm': MLP}
  x = NUMBERS.normal(size=[letters[letter] for letter in inputs])
  steps, scale = quantization.quantize(kernel, names)
  assert steps.dtype == np.int8 and scale.dtype == np.float32
  exact = np.einsum(equation, x, np.float64(kernel))
  ours = np.einsum(equation, x, np.float64(steps)) * np.float64(scale)
  norm = np.abs(x).sum(axis=tuple(range(1, x.ndim)))
  bound = norm.reshape(-1, *[1] * scale.ndim) * scale / 2
  error = np.abs(ours - exact)
  assert np.all(error <= bound * (1 + 1e-6))
  # The bound is no idle one: some result comes within a tenth of it.
  assert np.max(error / bound) > 0.1


@pytest.mark.parametrize('names', KERNELS, ids='-'.join)
def test_scanned_layers_are_quantised_each_by_itself(names):
  kernel = draw(('layers', *names))
  steps, scale = quantization.quantize(kernel, ('layers', *names))
  assert scale.shape[0] == LAYERS
  for layer in range(LAYERS):
    alone = quantization.quantize(kernel[layer], names)
    np.testing.assert_array_equal(steps[layer], alone[0])
    np.testing.assert_array_equal(scale[layer], alone[1])


@pytest.mark.parametrize('dtype', [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize('names', KERNELS, ids='-'.join)
def test_host_and_device_agree(names, dtype):
  kernel = draw(names).astype(dtype)
  host = quantization.quantize(kernel, names)
  assert all(isinstance(array, np.ndarray) for array in host)
  device = jax.jit(lambda x: quantization.quantize(x, names))(kernel)
  np.testing.assert_allclose(device[1], host[1], rtol=1e-6)
  # A value between two steps may go either way.
  assert np.max(np.abs(np.int32(device[0]) - np.int32(host[0]))) <= 1
  assert np.mean(np.asarray(device[0]) != host[0]) < 0.01


@given(
    st_numpy.arrays(
        np.float32,
        (4, 6),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
def test_any_finite_kernel_comes_back_within_half_a_step(kernel):
  steps, scale = quantization.quantize(kernel, ('embed', 'mlp'))
  assert np.all(np.isfinite(scale)) and np.all(scale > 0)
  assert steps.min() >= -127
  error = np.abs(np.float64(steps) * scale - kernel)
  assert np.all(error <= np.float64(scale) / 2 * (1 + 1e-4) + 1e-38)


def test_the_largest_of_a_channel_is_exact_and_zeros_stay_zeros():
  kernel = np.float32([[0, 5, -1], [0, -20, 0.25]])
  steps, scale = quantization.quantize(kernel, ('embed', 'mlp'))
  assert steps.tolist() == [[0, 32, -127], [0, -127, 32]]
  np.testing.assert_allclose(scale[1:], [20 / 127, 1 / 127], rtol=1e-6)
  assert scale[0] > 0


@pytest.mark.parametrize(
    'names', [(None,), ('norm',), ('mlp',), ('buckets', 'heads'), ('layers',)]
)
def test_what_is_no_kernel_becomes_bfloat16(names):
  assert quantization.input_axes(names) is None
  leaf = np.ones([3] * len(names), np.float32)
  assert quantization.stored_names('a/b', names, 'int8') == {'a/b': names}
  [(path, stored)] = quantization.store('a/b', leaf, names, 'int8').items()
  assert (path, stored.dtype) == ('a/b', jnp.bfloat16)


@pytest.mark.parametrize('names', KERNELS, ids='-'.join)
@pytest.mark.parametrize('stack', [(), ('layers',)], ids=['one', 'stack'])
def test_what_is_stored_has_the_names_that_are_told(stack, names):
  names = (*stack, *names)
  leaf = draw(names)
  for dtype in quantization.FROZEN_DTYPES:
    stored = quantization.store('decoder/kernel', leaf, names, dtype)
    told = quantization.stored_names('decoder/kernel', names, dtype)
    assert stored.keys() == told.keys()
    for path, array in stored.items():
      assert array.ndim == len(told[path])
    assert stored['decoder/kernel'].dtype == jnp.dtype(dtype)
    if dtype == 'int8':
      assert stored['decoder/kernel_scale'].dtype == np.float32
      # Each has a rule of sharding, and is never cut where a product sums.
      spec = partition_spec(told['decoder/kernel_scale'], DEFAULT_RULES)
      assert 'data' not in jax.tree.leaves(tuple(spec))


LENGTH, BATCH, STEPS = 64, 16, 150
# Tokens are the bytes of our own source; CodeGen looks at no source.
CONFIG = StepConfig(
    model=CodeGenConfig(
        vocab_size=256,
        emb_dim=48,
        num_layers=2,
        num_heads=4,
        head_dim=12,
        rotary_dim=8,
        mlp_dim=160,
        decoder_start_id=0,
    ),
    objectives=(CausalLM(target_length=LENGTH),),
    optimizer=AdamW(1e-2, 20, STEPS, 0.1),
    batch_size=BATCH,
    computation=Computation(dtype='float32'),
    mesh_shape=(1, 1, 1),
)


def rows_of_our_source():
  """All of layers/ and models/ as rows of bytes, shuffled."""
  package = pathlib.Path(quantization.__file__).parents[1]
  files = sorted([*package.glob('layers/*.py'), *package.glob('models/*.py')])
  text = b''.join(path.read_bytes() for path in files)
  rows = np.frombuffer(text, np.uint8)[: len(text) // LENGTH * LENGTH]
  rows = rows.reshape(-1, LENGTH).astype(np.int32)
  return np.random.default_rng(0).permutation(rows)


def batch_of(targets):
  return {
      'encoder_input_tokens': np.zeros((len(targets), 1), np.int32),
      'decoder_target_tokens': targets,
      'decoder_loss_weights': np.ones(targets.shape, np.float32),
  }


def test_int8_moves_the_loss_of_a_trained_decoder_by_half_a_percent_at_most():
  mesh = make_mesh((1, 1, 1), jax.devices()[:1])
  rows = rows_of_our_source()
  validation = batch_of(rows[:256])
  train_step = make_train_step(CONFIG, mesh)
  state = train_step.init()
  numbers = np.random.default_rng(0)
  for _ in range(STEPS):
    chosen = rows[numbers.integers(256, len(rows), BATCH)]
    batch = jax.tree.map(lambda x: x[None], batch_of(chosen))
    state, _ = train_step.step(state, {'causal_lm': batch})
  trained = flax.traverse_util.flatten_dict(state.params, sep='/')

  def validation_loss(frozen_dtype):
    config = dataclasses.replace(
        CONFIG,
        # Something must be; all else is frozen.
        trainable=('decoder/final_layer_norm/.*',),
        frozen_dtype=frozen_dtype,
    )
    step = make_train_step(config, mesh)
    names = flax.traverse_util.flatten_dict(
        nn.get_partition_spec(
            jax.eval_shape(step.model.init_params, jax.random.key(0))
        ),
        sep='/',
    )
    given = {}
    for path, leaf in trained.items():
      is_frozen = not path.startswith('decoder/final_layer_norm')
      dtype = frozen_dtype if is_frozen else 'float32'
      axes = tuple(names[path])
      given |= quantization.store(path, jnp.array(leaf), axes, dtype)
    state = step.init(given)
    [objective] = config.objectives
    metrics = step.evaluate(
        state.params, state.frozen_params, validation, objective
    )
    total, weight = metrics['loss']
    return float(total / weight)

  before = validation_loss('float32')
  # It has learned much more than how often each byte occurs.
  assert before < 0.8 * entropy(np.bincount(rows[:256].reshape(-1)))
  assert abs(validation_loss('int8') / before - 1) < 0.005
