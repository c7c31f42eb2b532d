"""Who takes which part of which mini-batch, where ranks do not wait for one another.

The samples of a run are those of the synchronous one: step s of it has a mini-batch cut into as many parts as there
are ranks that train. Ranks in step take each their own part. Ranks that go at their own speed take *tickets*, part
after part in the order of the steps, so that a slow rank delays nobody and no sample is visited twice. A stretch of
steps is opened by all ranks together, up to the next point where all of them are needed (an evaluation, a checkpoint,
the end); whoever gets no ticket any more waits there.

With its request a rank reports what it has measured since the last one; the sums of all ranks come back with the
ticket, so that logging needs no collective.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["REPORTED", "Pace", "Ticket"]

REPORTED = 5
"""How many numbers a report has: loss, samples, right predictions, predictions, and whether the rank asks to stop."""


class Ticket(NamedTuple):
    step: int
    """The optimizer step, counted from 0 over the whole run."""
    part: int
    """Which of the parts of its mini-batch."""


class Pace(ABC):
    """Hands out tickets to the ranks that train."""

    totals: Sequence[float] = (0.0,) * REPORTED
    """The sums of all ranks' reports since `open`, as far as they were known when this rank last called `take`."""

    @abstractmethod
    def open(self, first: int, until: int) -> None:
        """Begin the stretch of the steps `first` to `until` - 1. All ranks that train must call."""

    @abstractmethod
    def take(self, report: Sequence[float]) -> Ticket | None:
        """Return the next ticket; None where the stretch has ended. Where a rank asks to stop, it ends with this step.

        `report`: REPORTED numbers, this rank's sums since it called last. Raises CommunicationTimeout at the deadline.
        """

    @abstractmethod
    def close(self) -> int:
        """End the stretch, once all ranks got None, and return the step that training stands at.

        All ranks that train must call; afterwards `totals` are complete on all of them.
        """
