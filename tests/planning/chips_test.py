import importlib.util

import jax
import pytest

from codet5p_jax.planning.chips import peak_flops_per_second
from codet5p_jax.planning.topology import topology_devices

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='the TPU compiler, libtpu, is not installed',
)


@needs_compiler
@pytest.mark.parametrize(
    'topology, tera_flops',
    [('v4:2x2x1', 275), ('v5e:1x1', 197), ('v5p:2x2x1', 459), ('v6e:1x1', 918)],
)
def test_peaks_are_those_published_of_a_chip(topology, tera_flops):
  devices, chips = topology_devices(topology)
  peak = peak_flops_per_second(devices) / chips
  # JAX rounds: it has 920 for v6e.
  assert peak / 1e12 == pytest.approx(tera_flops, rel=0.003)


def test_a_processor_has_no_peak():
  assert peak_flops_per_second(jax.devices('cpu')) is None


@needs_compiler
def test_a_tpu_that_jax_does_not_know_has_no_peak(monkeypatch):
  from jax.experimental.pallas import tpu

  def get_tpu_info():
    raise ValueError('Unsupported TPU device kind: TPU 99')

  monkeypatch.setattr(tpu, 'get_tpu_info', get_tpu_info)
  devices, _ = topology_devices('v5e:1x1')
  assert peak_flops_per_second(devices) is None
