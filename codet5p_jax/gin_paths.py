"""Where gin files are found. Needs no gin, so that help texts can list them."""

import pathlib

from codet5p_jax import arguments
from codet5p_jax import errors


def gin_folder() -> pathlib.Path:
  """The folder of the gin files that come with the package.

  A wheel carries them in `codet5p_jax/gin_files`; in a checkout they are in
  `gin` beside the package.
  """
  package = pathlib.Path(__file__).resolve().parent
  installed = package / 'gin_files'
  return installed if installed.is_dir() else package.parent / 'gin'


def shipped() -> list[str]:
  """The gin files that come with the package, as `runs/pretrain.gin`."""
  folder = gin_folder()
  return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*.gin'))


def find(name: str) -> pathlib.Path | None:
  """The path of a gin file: as named from here, else in gin_folder()."""
  paths = (pathlib.Path(name), gin_folder() / name)
  return next((path for path in paths if path.is_file()), None)


def locate(name: str, place: str = '') -> pathlib.Path:
  """The path of a gin file, looked up as by `find`.

  Args:
    name: the file, as `runs/pretrain.gin`.
    place: the beginning of the error message: where the file is asked for.

  Raises:
    UserError: there is no such file; names the nearest one.
  """
  path = find(name)
  if path is None:
    beside = [str(path) for path in pathlib.Path(name).parent.glob('*.gin')]
    raise errors.UserError(
        f'{place}found no gin file {name} here or in {gin_folder()}'
        f'{arguments.nearest(name, [*beside, *shipped()])}')
  return path
