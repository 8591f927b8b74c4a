"""Kinds of damage to a checkpoint, and what is said of each."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from codet5p_jax.training.checkpoints.verify import CHECKSUMS, write_checksums

OLD, NEW = 3, 11


# What there is to damage: a pattern, and the item of arrays if it is of one.
FILES = {
    'arrays': 'trainable/ocdbt.process_0/d/*',
    'optimizer arrays': 'optimizer/ocdbt.process_0/d/*',
    'objective arrays': 'objective_state/ocdbt.process_0/d/*',
    'index of arrays': 'trainable/d/*',
    'manifest': 'trainable/manifest.ocdbt',
    'manifest of a process': 'optimizer/ocdbt.process_0/manifest.ocdbt',
    'tree of an item': 'trainable/_METADATA',
    'shardings': 'trainable/_sharding',
    'shapes of a process': 'optimizer/array_metadatas/process_0',
    'mark of an item': 'trainable/commit_success.txt',
    'mark of a JSON item': 'cursor/commit_success.txt',
    'cursor': 'cursor/metadata',
    'metadata': 'metadata/metadata',
    'checksums': CHECKSUMS,
    'record of the step': '_CHECKPOINT_METADATA',
    'mark of the step': 'commit_success.txt',
}


def largest(step_dir: Path, pattern: str) -> Path:
  return max(step_dir.glob(pattern), key=lambda path: path.stat().st_size)


def truncate(path: Path, pattern: str) -> None:
  os.truncate(path, path.stat().st_size * 2 // 3)


def flip_a_bit(path: Path, pattern: str) -> None:
  damaged = bytearray(path.read_bytes())
  damaged[len(damaged) // 2] ^= 4
  path.write_bytes(damaged)


def delete(path: Path, pattern: str) -> None:
  path.unlink()


def empty(path: Path, pattern: str) -> None:
  path.write_bytes(b'')


def swap(path: Path, pattern: str) -> None:
  """Takes the other step's file, or that of another item if it is equal."""
  new = next(x for x in path.parents if x.name == str(NEW))
  other = 'optimizer' if pattern.startswith('trainable') else 'trainable'
  for step, pattern in (
      (OLD, pattern), (NEW, f'{other}/{pattern.partition("/")[2]}')
  ):
    source = largest(new.with_name(str(step)), pattern).read_bytes()
    if source != path.read_bytes():
      path.write_bytes(source)
      return
  raise AssertionError('there is nothing to swap with')


def delete_folder(name: str) -> Callable[[Path], None]:
  return lambda new: shutil.rmtree(new / name)


def put_file_in_place_of(name: str) -> Callable[[Path], None]:
  def damage(new):
    shutil.rmtree(new / name)
    (new / name).write_text('in the way')

  return damage


def take_from_old(name: str) -> Callable[[Path], None]:
  def damage(new):
    shutil.rmtree(new / name)
    shutil.copytree(new.with_name(str(OLD)) / name, new / name)

  return damage


def exchange_items(new: Path) -> None:
  (new / 'trainable').rename(new / 'kept')
  (new / 'optimizer').rename(new / 'trainable')
  (new / 'kept').rename(new / 'optimizer')


def put_a_folder_in_place_of_a_file(new: Path) -> None:
  (new / 'cursor/metadata').unlink()
  (new / 'cursor/metadata').mkdir()


def link_to_nowhere(new: Path) -> None:
  (new / 'cursor/metadata').unlink()
  (new / 'cursor/metadata').symlink_to('nowhere')


def link_step_to_nowhere(new: Path) -> None:
  shutil.rmtree(new)
  new.symlink_to('nowhere')


def forget_a_checksum(new: Path) -> None:
  text = json.loads((new / CHECKSUMS).read_text())
  del text['files']['cursor/metadata']
  (new / CHECKSUMS).write_text(json.dumps(text))


def name_another_algorithm(new: Path) -> None:
  text = (new / CHECKSUMS).read_text()
  (new / CHECKSUMS).write_text(text.replace('"sha256",', '"sha257",', 1))


# What leaves files and checksums in agreement, as a save that was wrong from
# the start would, or a hand that copies folders.


def signed(damage: Callable[[Path], None]) -> Callable[[Path], None]:
  def damage_and_sign(new):
    damage(new)
    write_checksums(new)

  return damage_and_sign


def damage_file(name: str, damage) -> Callable[[Path], None]:
  return lambda new: damage(largest(new, FILES[name]), FILES[name])


def delete_first_layer(new: Path) -> None:
  path = new / 'trainable/_METADATA'
  tree = json.loads(path.read_text())
  first = next(key for key in tree['tree_metadata'] if 'layers_0' in key)
  del tree['tree_metadata'][first]
  path.write_text(json.dumps(tree))


def edit(name: str, change: Callable[[dict], object]):
  """Changes the content of a JSON file."""

  def damage(new):
    content = json.loads((new / name).read_text())
    change(content)
    (new / name).write_text(json.dumps(content))

  return damage


def be_the_old_one(new: Path) -> None:
  shutil.rmtree(new)
  shutil.copytree(new.with_name(str(OLD)), new)


# {what was done: (how, the words in the line that tell it)}
CASES = {
    f'{damage.__name__} {name}': (
        damage_file(name, damage),
        'checksums.json is' if name == 'checksums' and damage in (
            truncate, delete, empty
        ) else 'is damaged: ' if name == 'checksums' else pattern.rstrip('*'),
    )
    for name, pattern in FILES.items()
    for damage in (truncate, flip_a_bit, delete, empty, swap)
} | {
    **{
        f'no {name}': (delete_folder(name), f'{name}/')
        for name in (
            'trainable', 'optimizer', 'objective_state', 'cursor', 'metadata',
            'trainable/d', 'trainable/ocdbt.process_0',
            'optimizer/array_metadatas',
        )
    },
    **{
        f'a file in place of {name}': (
            put_file_in_place_of(name), f'{name} was not there'
        )
        for name in ('cursor', 'trainable/ocdbt.process_0')
    },
    **{
        f'{name} of the old step': (take_from_old(name), f'{name}/')
        for name in ('trainable', 'objective_state')
    },
    'items exchanged': (exchange_items, 'optimizer/'),
    'a folder in place of a file': (
        put_a_folder_in_place_of_a_file, 'cursor/metadata is missing'
    ),
    'a link to nowhere': (link_to_nowhere, 'cursor/metadata'),
    'one file too many': (
        lambda new: (new / 'trainable/d/more').touch(),
        'trainable/d/more was not there when it was written',
    ),
    'one folder of files too many': (
        lambda new: shutil.copytree(new / 'cursor', new / 'more'),
        'more/commit_success.txt was not there when it was written',
    ),
    'one checksum too few': (
        forget_a_checksum, 'cursor/metadata was not there'
    ),
    'another algorithm': (
        name_another_algorithm, 'checksums.json is unreadable'
    ),
    'an empty folder': (
        lambda new: (shutil.rmtree(new), new.mkdir()),
        'checksums.json is missing, so it is half-written',
    ),
    'a file in place of all': (
        lambda new: (shutil.rmtree(new), new.touch()), 'it is no folder'
    ),
    'a link to nowhere in place of all': (
        link_step_to_nowhere, 'it is no folder'
    ),
    'the old step under the new name': (
        be_the_old_one, f'metadata/metadata is that of step {OLD}'
    ),
    'signed: arrays of the old step': (
        signed(take_from_old('trainable')),
        'trainable/encoder/final_norm/scale has other numbers than were saved',
    ),
    'signed: state of the old step': (
        signed(take_from_old('objective_state')),
        'objective_state/contrastive/queue has other numbers than were saved',
    ),
    # Arrays as small as these stand in the index.
    'signed: a truncated index': (
        signed(damage_file('index of arrays', truncate)),
        'trainable cannot be read (',
    ),
    'signed: a bit of the index': (
        signed(damage_file('index of arrays', flip_a_bit)),
        'trainable cannot be read (',
    ),
    'signed: an empty index': (
        signed(damage_file('index of arrays', empty)),
        'trainable cannot be read (',
    ),
    'signed: a tree that is no JSON': (
        signed(damage_file('tree of an item', truncate)),
        'trainable cannot be read (',
    ),
    'signed: a tree that lacks a layer': (
        signed(delete_first_layer), 'trainable cannot be read ('
    ),
    'signed: no item': (
        signed(delete_folder('optimizer')), 'optimizer cannot be read ('
    ),
    'signed: no cursor': (
        signed(delete_folder('cursor')), 'cursor/metadata is missing'
    ),
    'signed: metadata that are no JSON': (
        signed(damage_file('metadata', truncate)),
        'metadata/metadata is unreadable',
    ),
    'signed: metadata without arrays': (
        signed(edit('metadata/metadata', lambda x: x.pop('arrays'))),
        'metadata/metadata lacks arrays;',
    ),
    'signed: the cursor in place of the metadata': (
        signed(
            lambda new: shutil.copy(
                new / 'cursor/metadata', new / 'metadata/metadata'
            )
        ),
        'metadata/metadata lacks arrays, step;',
    ),
    'signed: the cursor of the old step': (
        signed(edit('cursor/metadata', lambda x: x.update(step=OLD))),
        f'cursor/metadata is that of step {OLD};',
    ),
}
