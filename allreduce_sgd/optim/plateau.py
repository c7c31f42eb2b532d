"""Lowering the learning rate where the loss no longer falls.

The rule is that of torch's ReduceLROnPlateau: where the loss has not been lower, by 0.01 %, than its lowest for more
than `patience` looks in a row, the rate is multiplied by a factor, and counting starts anew. What it lowers are the
base rates of the schedule, which goes on with its warm-up, so that both multiply.

All ranks look at the same loss, bit for bit, and so lower the rate at the same step. Parameter servers hear of the rate
with every gradient that is pushed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from allreduce_sgd.optim.options import OptimizerOptions

__all__ = ["Plateau", "build_plateau", "set_rate"]

_DECAY = 0.1
_PATIENCE = 5
_REMEMBERED = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class Plateau:
    """Lowers the rates of `schedule` by the factor `decay`, which is below 1; `patience` is in looks."""

    def __init__(self, schedule: LambdaLR, decay: float, patience: int) -> None:
        self._schedule = schedule
        # Its rate is the product of all factors so far: torch's class sees that, so that it does not meet the warm-up.
        self._product = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        self._rule = ReduceLROnPlateau(self._product, factor=decay, patience=patience)

    @property
    def factor(self) -> float:
        """The product of all factors by which the rate has fallen."""
        return float(self._product.param_groups[0]["lr"])

    def look(self, loss: float) -> bool:
        """Take in a loss, and say whether the rate has fallen: at once, and for the steps to come."""
        before = self.factor
        self._rule.step(loss)
        if self.factor == before:
            return False
        self._schedule.base_lrs = [base * self.factor / before for base in self._schedule.base_lrs]
        set_rate(self._schedule, self._schedule.last_epoch)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return what the schedule's own state, which has the lowered rates, does not."""
        return {"factor": self.factor, **{name: getattr(self._rule, name) for name in _REMEMBERED}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._product.param_groups[0]["lr"] = state["factor"]
        for name in _REMEMBERED:
            setattr(self._rule, name, state[name])


def build_plateau(options: OptimizerOptions, schedule: LambdaLR) -> Plateau | None:
    """Build what --lr-schedule plateau needs beside the schedule; None for other schedules."""
    if options.lr_schedule != "plateau":
        return None
    decay, patience = options.lr_decay, options.plateau_patience
    return Plateau(schedule, _DECAY if decay is None else decay, _PATIENCE if patience is None else patience)


def set_rate(schedule: LambdaLR, step: int) -> None:
    """Make the learning rate that of this step, whichever came before."""
    schedule.last_epoch = step
    rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, (base, factor) in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = base * factor(step)
