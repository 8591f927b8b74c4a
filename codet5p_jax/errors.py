"""The one exception for what a user can cause and mend."""


class UserError(Exception):
  """A mistake in what the user gave: printed as one line, without traceback.

  The message says what was expected, what was found, and what to do.
  """


def require_positive(**sizes: int | None) -> None:
  """Checks sizes and counts; None, for no limit, passes.

  Args:
    **sizes: by the name of the parameter.

  Raises:
    UserError: one is less than 1.
  """
  for name, size in sizes.items():
    if size is not None and size < 1:
      raise UserError(
          f'expected {name} to be at least 1, found {size}; give a larger one'
      )
