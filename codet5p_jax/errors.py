"""What ends a run short of a bug, and the exit statuses that say so."""

# The run was saved and goes on when the same command is given again: what a
# launcher restarts at once. (sysexits.h: EX_TEMPFAIL.)
PREEMPTED_STATUS = 75
# What a run needs is not there yet, and may come by itself: a launcher tries
# again for as long as it takes. (EX_UNAVAILABLE.)
UNAVAILABLE_STATUS = 69
# The watchdog ended a process that stood still. (EX_SOFTWARE.)
HUNG_STATUS = 70


class UserError(Exception):
  """A mistake in what the user gave: printed as one line, without traceback.

  The message says what was expected, what was found, and what to do.
  """


class Unavailable(UserError):
  """What a run needs is not there, but may come without a change of its own.

  Another host, a folder that another run is about to leave, a file system that
  is late.
  """


class Preempted(Exception):
  """The machine is about to be taken away; all that matters is saved.

  The message is one line, for the user.
  """


def require_positive(**sizes: int | float | None) -> None:
  """Checks sizes, counts and seconds; None, for no limit, passes.

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
