"""The source files of a corpus as a TensorFlow Datasets dataset.

Stored as ArrayRecord, which neither writing nor reading needs TensorFlow for;
the one module of this floor that imports tensorflow_datasets. The shards are
written one by one, wherever their files are at hand, and put together by name.
"""

import pathlib
from collections.abc import Mapping, Sequence

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from codet5p_jax.corpus.source_files import SourceFile

NAME = 'source_files'
_VERSION = '1.0.0'
_FEATURES = ('text', 'language', 'licence', 'origin', 'path', 'hash')
_FORMAT = 'array_record'


def serialise(file: SourceFile) -> bytes:
  """A file as a record of a shard: a tf.train.Example."""
  # As the serializer of TFDS, in a tenth of the time.
  example = tf_example_pb2.Example()
  for name in _FEATURES:
    feature = example.features.feature[name]
    feature.bytes_list.value.append(getattr(file, name).encode())
  # Otherwise the order of the features depends on the process.
  return example.SerializeToString(deterministic=True)


def gather_shards(
    folder: pathlib.Path,
    shards: Mapping[str, Sequence[tuple[pathlib.Path, int]]],
) -> None:
  """Makes a dataset of shards, which are moved.

  Args:
    folder: where `read_files` will find it.
    shards: (path, number of files) of the shards of each split, in order.
  """
  version = folder / NAME / _VERSION
  version.mkdir(parents=True, exist_ok=True)
  template = tfds.core.ShardedFileTemplate(
      dataset_name=NAME, data_dir=version, filetype_suffix=_FORMAT
  )
  splits = []
  for split, parts in shards.items():
    sizes = []
    for index, (path, _) in enumerate(parts):
      name = f'{NAME}-{split}.{_FORMAT}-{index:05d}-of-{len(parts):05d}'
      # A run that was stopped here moved some.
      if path.exists():
        path.rename(version / name)
      sizes.append((version / name).stat().st_size)
    splits.append(
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[number for _, number in parts],
            num_bytes=sum(sizes),
            filename_template=template,
        )
    )
  tfds.folder_dataset.write_metadata(
      data_dir=version,
      features=tfds.features.FeaturesDict(
          {feature: tfds.features.Text() for feature in _FEATURES}
      ),
      split_infos=splits,
      filename_template=template,
      description='Source files of a corpus, split by origin.',
      check_data=False,
  )


def read_files(
    folder: pathlib.Path, split: str
) -> Sequence[Mapping[str, bytes]]:
  """The files of a split, by index, as {feature: UTF-8 bytes}."""
  [version] = (folder / NAME).glob('*')
  return tfds.builder_from_directory(version).as_data_source(split)
