"""How far the training of a run is: its steps and samples, and the training loss of the epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allreduce_sgd.metrics import Totals

__all__ = ["Position", "Progress"]


@dataclass(frozen=True)
class Position:
    """How far training is: optimizer steps, passes over the training set, and samples of all ranks."""

    step: int
    epoch: float
    samples: int


class Progress:
    """Counts the `step`s taken and the `samples` of all ranks; `train_loss` is the mean over the epoch ended last, or
    over what there is of the first. The same on all ranks, which all count alike."""

    def __init__(self, steps_per_epoch: int) -> None:
        self.step = 0
        self.samples = 0
        self.train_loss: float | None = None
        self.steps_per_epoch = steps_per_epoch
        self._epoch_totals = Totals()

    @property
    def position(self) -> Position:
        return Position(self.step, self.step / self.steps_per_epoch, self.samples)

    @property
    def between_epochs(self) -> bool:
        return self.step % self.steps_per_epoch == 0

    def begin_step(self) -> None:
        """Be told that the next step begins."""
        if self.between_epochs:
            self._epoch_totals = Totals()

    def add(self, totals: Totals) -> None:
        """Take in the sums over all ranks of the steps up to this one that have not been taken in yet."""
        self._epoch_totals += totals
        if self.between_epochs or self.train_loss is None or self.step < self.steps_per_epoch:
            self.train_loss = self._epoch_totals.mean_loss

    def state_dict(self) -> dict[str, Any]:
        totals = list(vars(self._epoch_totals).values())
        return {"step": self.step, "samples": self.samples, "epoch_totals": totals, "train_loss": self.train_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.samples, self.train_loss = state["step"], state["samples"], state["train_loss"]
        self._epoch_totals = Totals(*state["epoch_totals"])
