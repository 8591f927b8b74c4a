import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from codet5p_jax.planning.hlo import collective_bytes, matmul_flops
from codet5p_jax.planning.topology import topology_devices

PROGRAM = '''
HloModule jit_f, entry_computation_layout={(f32[3,5]{1,0})->f32[3,7]{1,0}}

%fused (p.0: f32[3,5], p.1: f32[5,7]) -> f32[3,7] {
  %p.0 = f32[3,5]{1,0} parameter(0)
  %p.1 = f32[5,7]{1,0:T(8,128)} parameter(1)
  ROOT %dot.1 = f32[3,7]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (arg: (s32[], f32[3,7])) -> (s32[], f32[3,7]) {
  %arg = (s32[], /*index=1*/f32[3,7]{1,0}) parameter(0)
  %x = f32[3,5]{1,0} constant({...})
  %k = f32[5,7]{1,0} constant({...})
  %f = f32[3,7]{1,0} fusion(%x, %k), kind=kOutput, calls=%fused
  ROOT %t = (s32[], f32[3,7]{1,0}) tuple(%x, %f)
}

%condition (arg.1: (s32[], f32[3,7])) -> pred[] {
  ROOT %true = pred[] constant(true)
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

ENTRY %main (q: f32[2,3,5]) -> f32[3,7] {
  %q = f32[2,3,5]{2,1,0} parameter(0)
  %r = f32[2,5,11]{2,1,0} constant({...})
  %batched = f32[2,3,11]{2,1,0} dot(f32[2,3,5]{2,1,0:T(8,128)(2,1)} %q, f32[2,5,11]{2,1,0} %r), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
  %loop = (s32[], f32[3,7]{1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"13"},"x":"y"}
  %start = ((f32[3,5]), f32[3,7], s32[]) async-start(%q), calls=%fused
  %done = f32[3,7]{1,0} async-done(%start), calls=%fused
  ROOT %o = f32[3,7]{1,0} reduce(%loop), to_apply=%add
}
'''  # noqa: E501
ONE = 2 * 3 * 5 * 7


def test_products_count_as_often_as_they_run():
  batched = 2 * (2 * 3 * 11) * 5
  # In thirteen rounds of a loop, and once where a start names it.
  assert matmul_flops(PROGRAM) == batched + 13 * ONE + ONE


# As a TPU's compiler leaves it: rounds are counted by element 0, from 2 to 13
# in steps of 3.
COUNTED = (
    PROGRAM.replace(', backend_config={"known_trip_count":{"n":"13"}', ', x={')
    .replace(
        '  ROOT %true = pred[] constant(true)\n',
        '  %arg.1 = (s32[], f32[3,7]{1,0}) parameter(0)\n'
        '  %now = s32[]{:T(128)} get-tuple-element(%arg.1), index=0\n'
        '  %end = s32[]{:T(128)} constant(13)\n'
        '  ROOT %lt = pred[]{:T(512)} compare(%now, %end), direction=LT\n',
    )
    .replace(
        '  ROOT %t = (s32[], f32[3,7]{1,0}) tuple(%x, %f)\n',
        '  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0\n'
        '  %three = s32[]{:T(128)} constant(3)\n'
        '  %next = s32[]{:T(128)} add(%i, %three)\n'
        '  ROOT %t = (s32[], f32[3,7]{1,0}) tuple(%next, %f)\n',
    )
    .replace(
        '  %loop =',
        '  %two = s32[]{:T(128)} constant(2)\n'
        '  %begin = s32[]{:T(128)} copy(%two)\n'
        '  %init = (s32[], f32[3,7]{1,0}) tuple(%begin, %r)\n'
        '  %loop =',
    )
)


def test_rounds_are_read_from_how_a_loop_counts():
  # 2, 5, 8 and 11.
  assert matmul_flops(COUNTED) == 2 * (2 * 3 * 11) * 5 + 4 * ONE + ONE


def test_elements_of_a_tuple_need_no_instruction_of_their_own():
  """As the compiler of JAX 0.12 writes them."""
  program = COUNTED
  for name, element in (('%now', '%arg.1#0'), ('%i', '%arg#0')):
    line = rf'  {name} = .* get-tuple-element.*\n'
    program, count = re.subn(line, '', program)
    assert count == 1
    program = re.sub(rf'{name}\b(?! =)', element, program)
  # A product of an element, [3, 7] by [7, 5], in each round.
  program = program.replace(
      '  %f = f32[3,7]',
      '  %w = f32[7,5]{1,0} constant({...})\n'
      '  %p = f32[3,5]{1,0} dot(%arg#1, %w), lhs_contracting_dims={1}\n'
      '  %f = f32[3,7]',
  )
  more = 4 * 2 * (3 * 5) * 7
  assert matmul_flops(program) == matmul_flops(COUNTED) + more


@pytest.mark.parametrize(
    'change',
    [
        ('direction=LT', 'direction=NE'),
        ('%end = s32[]{:T(128)} constant(13)', '%end = s32[] negate(%now)'),
        ('add(%i, %three)', 'multiply(%i, %three)'),
        ('copy(%two)', 'negate(%two)'),
        ('tuple(%begin, %r)', 'parameter(1)'),
    ],
)
def test_a_loop_of_unknown_length_is_no_guess(change):
  unknown = COUNTED.replace(*change)
  assert unknown != COUNTED
  with pytest.raises(ValueError, match='cannot be told .* body=%body'):
    matmul_flops(unknown)
  # Where it makes no products, it may run as long as it likes.
  harmless = unknown.replace('kind=kOutput, calls=%fused\n', '\n')
  assert matmul_flops(harmless) == 2 * (2 * 3 * 11) * 5 + ONE


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    matmul_flops('%a (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}')


def convolution(left, right, out, attributes):
  def array(sizes):
    return f'f32[{",".join(map(str, sizes))}]'

  return matmul_flops(
      'ENTRY %main (a: f32[]) -> f32[] {\n'
      f'  %a = {array(left)} parameter(0)\n'
      f'  %b = {array(right)} parameter(1)\n'
      f'  ROOT %c = {array(out)} convolution(%a, %b), {attributes}\n'
      '}'
  )


def test_a_convolution_may_be_a_plain_product():
  flops = convolution((3, 5), (5, 7), (3, 7), 'dim_labels=bf_io->bf')
  assert flops == 2 * 3 * 5 * 7


def test_places_of_a_window_without_an_input_are_no_work():
  # Windows of two over two inputs with padding on both sides: they meet one,
  # two and one of them.
  flops = convolution(
      (3, 2, 5), (2, 5, 7), (3, 3, 7),
      'window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=b0f_0io->0bf',
  )  # fmt: skip
  assert flops == 2 * 3 * 5 * 7 * 4
  # The inputs stand apart, as batches do: each window meets one.
  flops = convolution(
      (3, 2, 5), (2, 5, 7), (3, 3, 7),
      'window={size=2 stride=1 pad=0_1 lhs_dilate=2}, dim_labels=b0f_0io->0bf',
  )  # fmt: skip
  assert flops == 2 * 3 * 5 * 7 * 3
  # Without either, every place is work.
  flops = convolution(
      (3, 6, 5), (2, 5, 7), (3, 3, 7),
      'window={size=2 stride=2}, dim_labels=b0f_0io->b0f',
  )  # fmt: skip
  assert flops == 2 * 3 * 5 * 7 * 6


def test_groups_divide_the_work():
  flops = convolution(
      (4, 6), (3, 8), (4, 8), 'dim_labels=bf_io->bf, feature_group_count=2'
  )
  assert flops == 2 * 4 * 3 * 8


def scanned(x, kernels):
  """Five layers, each of one product, and their gradient."""

  def loss(kernels):
    def layer(x, kernel):
      return jnp.tanh(x @ kernel), None

    return jnp.sum(jax.lax.scan(layer, x, kernels)[0])

  return jax.grad(loss)(kernels)


ROWS, WIDTH, LAYERS = 48, 128, 5


def compiled_flops(sharding=None):
  def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=sharding)

  lowered = jax.jit(scanned).lower(
      shape(ROWS, WIDTH), shape(LAYERS, WIDTH, WIDTH)
  )
  return matmul_flops(lowered.compile().as_text())


def test_a_scan_and_its_gradient_are_counted_by_hand_for_the_cpu():
  # Forward and the kernels' gradient for all, the states' too.
  assert compiled_flops() == 3 * LAYERS * 2 * ROWS * WIDTH * WIDTH


@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='the TPU compiler, libtpu, is not installed',
)
def test_a_scan_and_its_gradient_are_counted_by_hand_for_a_tpu():
  [device], _ = topology_devices('v5e:1x1')
  sharding = jax.sharding.SingleDeviceSharding(device)
  assert compiled_flops(sharding) == 3 * LAYERS * 2 * ROWS * WIDTH * WIDTH


EXCHANGES = '''
HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%scatter (p: bf16[64,3]) -> bf16[8,3] {
  %p = bf16[64,3]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %rs = bf16[8,3]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%body (arg: (s32[], f32[3,7])) -> (s32[], f32[3,7]) {
  %arg = (s32[], f32[3,7]{1,0}) parameter(0)
  %x = f32[3,7]{1,0} get-tuple-element(%arg), index=1
  %start = (f32[3,7]{1,0}, f32[24,7]{1,0}) all-gather-start(%x), dimensions={0}
  %done = f32[24,7]{1,0} all-gather-done(%start), dimensions={0}
  ROOT %t = (s32[], f32[3,7]{1,0}) tuple(%x, %x)
}

%condition (arg.1: (s32[], f32[3,7])) -> pred[] {
  ROOT %true = pred[] constant(true)
}

ENTRY %main (q: u16[9]) -> f32[3,7] {
  %q = u16[9]{0} parameter(0)
  %moved = u16[9]{0} collective-permute(%q), channel_id=1
  %both = (f32[5]{0}, pred[6]{0}) all-reduce(%u, %v), to_apply=%add
  %loop = (s32[], f32[3,7]{1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"13"}}
  %begun = ((bf16[64,3]), bf16[8,3], s32[]) async-start(%w), calls=%scatter
  ROOT %ended = bf16[8,3]{1,0} async-done(%begun), calls=%scatter
}
'''  # noqa: E501


def test_exchanged_bytes_are_counted_by_kind_and_round():
  assert collective_bytes(EXCHANGES) == {
      'collective-permute': 9 * 2,
      'all-reduce': 5 * 4 + 6,
      'all-gather': 13 * 24 * 7 * 4,
      'reduce-scatter': 64 * 3 * 2,
  }
  assert collective_bytes(PROGRAM) == {}


def test_a_mean_over_devices_is_an_all_reduce():
  mesh = jax.make_mesh((8,), ('x',))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
  rows = jax.ShapeDtypeStruct((16, 5), jnp.float32, sharding=sharding)
  text = jax.jit(lambda x: x.mean(0)).lower(rows).compile().as_text()
  assert collective_bytes(text) == {'all-reduce': 5 * 4}
