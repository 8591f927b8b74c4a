"""TPU topologies that need not be there: the compiler's view of a pod."""

import os
import re
from collections.abc import Sequence

import jax

from codet5p_jax.errors import UserError


def topology_devices(name: str) -> tuple[Sequence[jax.Device], int]:
  """Devices of a TPU topology, for ahead-of-time compilation.

  Args:
    name: JAX's name of the topology, such as "v5e:4x4"; "v5e:1x1" and
      "v6e:1x1" are a single chip.

  Returns:
    The devices and the number of chips. Where a chip shows as two devices,
    there are twice as many devices as chips.

  Raises:
    UserError: the TPU compiler is not installed, or knows no such topology.
  """
  if not re.fullmatch(r'v\w+:\d+(x\d+)*', name):
    raise UserError(
        f'expected a topology such as v5e:4x4, found {name!r}; set TOPOLOGY'
    )
  # Set before libtpu starts: it would ask the cloud for the machine's TPU, and
  # allow one process on the machine.
  for name_of_setting, value in {
      'TPU_SKIP_MDS_QUERY': '1',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      # It complains at length where these are unknown, and does not use them.
      'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
      'TPU_WORKER_HOSTNAMES': 'localhost',
  }.items():
    os.environ.setdefault(name_of_setting, value)
  from jax.experimental import topologies

  options = {}
  if name.endswith(':1x1'):
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise UserError(
        'expected the TPU compiler, found no libtpu; install it with pip '
        "install 'codet5p_jax[tpu]'"
    ) from error
  try:
    topology = topologies.get_topology_desc(
        platform='tpu', topology_name=name, **options
    )
  except (RuntimeError, ValueError, NotImplementedError) as error:
    reason = str(error).strip().splitlines()[0]
    raise UserError(
        f'expected a topology the TPU compiler knows, found {name!r}: '
        f'{reason}; set TOPOLOGY, for instance to v5e:4x4'
    ) from error
  devices = topology.devices
  chips = len({tuple(device.coords) for device in devices})
  return devices, chips
