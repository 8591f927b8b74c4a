"""What chips can do at most, from JAX's own table."""

from collections.abc import Sequence

import jax


def peak_flops_per_second(devices: Sequence[jax.Device]) -> float | None:
  """The peak bfloat16 FLOP/s of devices together, or None if it is unknown.

  JAX's table is per core. A device is a chip (v5e, v6e; v5p joins two cores to
  one device), or half of one where each core is a device (v2, v3).

  Args:
    devices: of one kind. None is returned for CPUs, GPUs and TPUs that JAX
      does not know.
  """
  device = devices[0]
  if device.platform != 'tpu':
    return None
  from jax.experimental.pallas import tpu

  with jax.default_device(device):
    try:
      core = tpu.get_tpu_info()
    except ValueError:  # A chip that this JAX does not know.
      return None
  return float(core.bf16_ops_per_second * core.num_cores * len(devices))
