"""The source files of a corpus as a TensorFlow Datasets dataset.

Stored as ArrayRecord, which neither writing nor reading needs TensorFlow for;
the one module of this floor that imports tensorflow_datasets.
"""

import contextlib
import io
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import tensorflow_datasets as tfds

from codet5p_jax.corpus.source_files import SourceFile

NAME = 'source_files'


def write_files(
    folder: pathlib.Path, files: Mapping[str, Sequence[SourceFile]]
) -> None:
  """Writes {split: files} below `folder`."""

  # Registered, the name could be defined only once in a process.
  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Files of source code; a split holds whole origins."""

    name = NAME
    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES = {'1.0.0': 'text, language, licence, origin, path, hash'}
    pkg_dir_path = pathlib.Path(__file__).parent

    def _info(self) -> tfds.core.DatasetInfo:
      features = ('text', 'language', 'licence', 'origin', 'path', 'hash')
      return tfds.core.DatasetInfo(
          builder=self,
          description='Source files of a corpus, split by origin.',
          features=tfds.features.FeaturesDict(
              {feature: tfds.features.Text() for feature in features}
          ),
      )

    def _split_generators(self, dl_manager):
      del dl_manager  # Nothing is downloaded.
      return {
          split: self._generate_examples(rows) for split, rows in files.items()
      }

    def _generate_examples(self, rows):
      for file in rows:
        yield file.hash, {
            'text': file.text,
            'language': file.language,
            'licence': file.licence,
            'origin': file.origin,
            'path': file.path,
            'hash': file.hash,
        }

  # TFDS would draw a progress bar for each of its inner steps.
  tfds.disable_progress_bar()
  builder = Builder(
      data_dir=os.fspath(folder),
      file_format=tfds.core.FileFormat.ARRAY_RECORD,
  )
  # TFDS reports a preparation on the standard output; ours is reported by us.
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare()
  shutil.rmtree(folder / 'downloads', ignore_errors=True)


def read_files(
    folder: pathlib.Path, split: str
) -> Sequence[Mapping[str, bytes]]:
  """The files of a split, by index, as {feature: UTF-8 bytes}."""
  [version] = (folder / NAME).glob('*')
  return tfds.builder_from_directory(version).as_data_source(split)
