"""One of two processes that replay a step; one of them computes otherwise.

Arguments: the address of process 0, this process's id, the folder of the run.
"""

import dataclasses
import functools
import hashlib
import os
import platform
import sys

from codet5p_jax import main
from codet5p_jax.runs import replay
from tests.runs.replay_test import with_bit_flipped

fault, calls = '', 0


def make_patched(make, process):
  """Makes steps whose second gradients this process gets wrong."""

  def make_train_step(*arguments):
    train_step = make(*arguments)

    def gradients(state, batch):
      global calls
      calls += 1
      now = calls == 2 and process == 1
      if now and fault == 'batch':
        path = 'causal_lm/decoder_target_tokens'
        batch = with_bit_flipped(batch, path)
      grads, metrics = train_step.gradients(state, batch)
      if now and fault == 'gradients':
        grads = with_bit_flipped(grads, 'encoder/layers/mlp/wo/kernel')
      return grads, metrics

    return dataclasses.replace(train_step, gradients=gradients)

  return make_train_step


def telling(digest_shards):
  """Prints a digest of each table of digests."""

  def digest_and_tell(*arguments):
    table = digest_shards(*arguments)
    print('table', hashlib.sha256(table).hexdigest(), file=sys.stderr)
    return table

  return digest_and_tell


def run(address, process, run_dir, step, planted):
  """Replays a step with a fault planted; returns the status."""
  global fault, calls
  fault, calls = planted, 0
  return main.main([
      'replay', f'--run_dir={run_dir}', f'--step={step}',
      f'--coordinator_address={address}', '--num_processes=2',
      f'--process_id={process}',
  ])  # fmt: skip


if __name__ == '__main__':
  address, process_id, run_dir = sys.argv[1:]
  process = int(process_id)
  # Gloo tells of its peers in pieces, amid our lines.
  sys.stdout = os.fdopen(os.dup(1), 'w')
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  platform.node = lambda: ('north', 'south')[process]
  replay.make_train_step = make_patched(
      functools.cache(replay.make_train_step), process
  )
  replay.digest_shards = telling(replay.digest_shards)
  for planted in ('', 'gradients', 'batch'):
    assert run(address, process, run_dir, 3, planted) == 0
  sys.exit(run(address, process, run_dir, 3 + process, ''))
