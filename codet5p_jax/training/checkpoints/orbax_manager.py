"""Orbax's manager of checkpoints, as runs need it."""

from collections.abc import Callable
from pathlib import Path

import orbax.checkpoint as ocp

# Of a save, for processes that wait for one another: the first one reads
# everything again and signs it. A process that fails does not wait so long.
_SAVE_SECONDS = 6 * 3600


class Manager(ocp.CheckpointManager):
  """Orbax's, but it leaves preemptions to the loop and faults to who asks.

  JAX counts the calls of all processes to agree when to stop. Orbax would tell
  it numbers of steps among the numbers of calls that preemption.py tells it,
  and a notice that came amid a save might then wait for a number that is never
  called, or for one that is far away.

  Attributes:
    fault: what went wrong in the background, None so far. Where there are
      several processes Orbax raises it only once it has waited for all of
      them, 20 minutes for those that the fault has stopped.
  """

  fault: Exception | None = None

  def reached_preemption(self, step: int) -> bool:
    return False

  def _wait_for_checkpointers(self) -> None:
    # Private: of what the public methods raise, they forget that it happened,
    # and then the step counts as saved.
    try:
      super()._wait_for_checkpointers()
    except Exception as error:
      self.fault = error
      raise


def open_manager(
    folder: Path,
    max_to_keep: int | None,
    keep_every: int | None,
    before_commit: Callable[[], None],
) -> Manager:
  """Opens a folder to save in; removes what killed saves left.

  Args:
    folder: of all steps.
    max_to_keep: newest steps that a save leaves; None keeps all.
    keep_every: steps that are multiples of it are kept for good.
    before_commit: called on process 0 when all items of a step are written.
  """
  policies = [ocp.checkpoint_managers.LatestN(n=max_to_keep)]
  if keep_every is not None:
    policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
  return Manager(
      folder,
      options=ocp.CheckpointManagerOptions(
          preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(
              policies
          ),
          cleanup_tmp_directories=True,
          async_options=ocp.options.AsyncOptions(
              timeout_secs=_SAVE_SECONDS,
              post_finalization_callback=before_commit,
          ),
      ),
  )
