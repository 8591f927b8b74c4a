"""The one exception for what a user can cause and mend."""


class UserError(Exception):
  """A mistake in what the user gave: printed as one line, without traceback.

  The message says what was expected, what was found, and what to do.
  """
