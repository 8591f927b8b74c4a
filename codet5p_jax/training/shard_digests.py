"""Digests of what each device holds of some arrays, compared bit by bit."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Words of 32 bits of a digest: JAX exchanges no longer ones.
_WORDS = 4


@dataclasses.dataclass(frozen=True)
class Difference:
  """Where bits differ that should be the same.

  Attributes:
    time: of which computation, from 0 on.
    leaf: the first one that differs, by number.
    devices: those that differ, by number.
    is_copy: they hold the same part of an array as other devices, and differ
      from these; otherwise they differ from what they held the first time.
  """

  time: int
  leaf: int
  devices: tuple[int, ...]
  is_copy: bool


def by_process(devices: Sequence[Any]) -> list[Any]:
  """The devices in the order in which `digest_shards` counts them."""
  return sorted(devices, key=lambda device: device.process_index)


def digest_shards(
    leaves: Mapping[str, jax.Array], devices: Sequence[jax.Device]
) -> np.ndarray:
  """Digests every device's part of every array, and exchanges the digests.

  All processes call it together, and all have equally many of the devices.

  Args:
    leaves: arrays by path, on these devices.
    devices: of the mesh.

  Returns:
    uint32 [devices, leaves, words], the devices as in `by_process`; the same on
    all processes.
  """
  own = [d for d in devices if d.process_index == jax.process_index()]
  table = np.zeros((len(own), len(leaves), _WORDS), np.uint32)
  for number, leaf in enumerate(leaves.values()):
    for shard in leaf.addressable_shards:
      table[own.index(shard.device), number] = _digest(shard.data)
  return multihost_utils.process_allgather(table, tiled=True)


def number_shards(
    leaves: Mapping[str, jax.Array], devices: Sequence[jax.Device]
) -> np.ndarray:
  """Tells which devices hold the same part of an array.

  Returns:
    int [devices, leaves], the devices as in `by_process`: equal numbers in a
    column stand for the same part.
  """
  columns = []
  for leaf in leaves.values():
    places = leaf.sharding.devices_indices_map(leaf.shape)
    parts = [str(places[device]) for device in by_process(devices)]
    columns.append([parts.index(part) for part in parts])
  return np.array(columns).T


def find_difference(
    tables: np.ndarray, shards: np.ndarray
) -> Difference | None:
  """Finds where repeated computations, or copies of one array, differ.

  Repetitions come first: they tell surely who changed. Of copies, those are
  named that fewer devices hold; where both are held equally often, all.

  Args:
    tables: [times, devices, leaves, words], each of `digest_shards`.
    shards: of `number_shards`.

  Returns:
    The first difference, None if there is none.
  """
  for time, table in enumerate(tables):
    differs = np.any(table != tables[0], axis=-1)  # [devices, leaves]
    if np.any(differs):
      leaf = int(np.argmax(np.any(differs, axis=0)))
      devices = np.flatnonzero(np.any(differs, axis=1))
      return Difference(time, leaf, tuple(devices.tolist()), is_copy=False)
  for time, table in enumerate(tables):
    for leaf in range(shards.shape[1]):
      for shard in np.unique(shards[:, leaf]):
        holders = np.flatnonzero(shards[:, leaf] == shard)
        _, versions, counts = np.unique(
            table[holders, leaf], axis=0, return_inverse=True,
            return_counts=True,
        )  # fmt: skip
        if len(counts) > 1:
          is_usual = (counts == counts.max()) & (
              np.sum(counts == counts.max()) == 1
          )
          unusual = holders[~is_usual[versions.reshape(-1)]]
          return Difference(time, leaf, tuple(unusual.tolist()), is_copy=True)
  return None


def _digest(part: Any) -> np.ndarray:
  content = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
  digest = hashlib.blake2b(content, digest_size=4 * _WORDS).digest()
  return np.frombuffer(digest, np.uint32)
