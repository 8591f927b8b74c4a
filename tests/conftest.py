"""Eight emulated devices, so that any test can build a real mesh."""

import os

# Before anything imports JAX, which reads them once.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join([
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
]).strip()
