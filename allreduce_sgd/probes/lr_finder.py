"""The learning-rate finder: how the loss goes while the rate rises exponentially, and which rates that suggests.

Smith, "Cyclical learning rates for training neural networks", WACV 2017, arXiv 1506.01186, section 3.3, with the
exponential sweep and the smoothing that the fastai library made common. In step i of n the rate is r_i = a (b / a)^(i /
(n − 1)). The losses of the mini-batches are smoothed, s_i = (1 − β) Σ β^(i−j) l_j / (1 − β^(i+1)) with β = 0.9. The
sweep ends where the loss is not finite, or the smoothed one four times its lowest.

Two suggestions, both of the smoothed loss up to its lowest: the rate at which it falls most steeply over log r, and a
tenth of the rate at which it is lowest.

All ranks take the steps together, by the strategy and on the mini-batches of the run, and come to the same losses.
Those that go at their own pace otherwise meet after every step, so that each rate has its own loss. Momentum, clipping
and weight decay are those of the run; its schedule is left out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from allreduce_sgd.display import Display
from allreduce_sgd.metrics import Totals
from allreduce_sgd.stepper import Stepper

__all__ = ["STEPS", "Sweep", "find_learning_rate", "rates"]

STEPS = 100
_LOWEST, _HIGHEST = 1e-6, 10.0
_SMOOTHING = 0.9
_DIVERGED = 4.0


@dataclass(frozen=True)
class Sweep:
    """The rates tried and the losses met, one of each per step; the last loss may be NaN or infinite."""

    rates: Sequence[float]
    losses: Sequence[float]
    diverged: bool

    @property
    def smoothed(self) -> list[float]:
        return smoothed(self.losses)

    @property
    def steepest(self) -> float | None:
        """The rate at which the smoothed loss falls most steeply over the logarithm of the rate; None: nowhere."""
        curve = self._falling()
        if len(curve) < 2:
            return None
        slopes = np.gradient(curve, np.log(self.rates[: len(curve)]))
        place = int(slopes.argmin())
        return self.rates[place] if slopes[place] < 0 else None

    @property
    def tenth_of_lowest(self) -> float | None:
        """A tenth of the rate at which the smoothed loss is lowest; None where it never fell."""
        curve = self._falling()
        return self.rates[len(curve) - 1] / 10 if len(curve) > 1 else None

    def figures(self) -> dict[str, Any]:
        """Return what lr-finder.json has."""
        return {
            "suggestions": {"steepest": self.steepest, "tenth_of_lowest": self.tenth_of_lowest},
            "diverged": self.diverged,
            "rates": list(self.rates),
            "losses": list(self.losses),
            "smoothed_losses": self.smoothed,
        }

    def _falling(self) -> list[float]:
        """Return the smoothed loss up to its lowest."""
        curve = [loss for loss in self.smoothed if math.isfinite(loss)]
        return curve[: 1 + int(np.argmin(curve))] if curve else []


def rates(steps: int) -> list[float]:
    """Return the rates of so many steps, at least two, from the lowest to the highest."""
    return [_LOWEST * (_HIGHEST / _LOWEST) ** (step / (steps - 1)) for step in range(steps)]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the exponential moving average of the losses, free of the bias of its start."""
    average, values = 0.0, []
    for step, loss in enumerate(losses, 1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        values.append(average / (1 - _SMOOTHING**step))
    return values


def find_learning_rate(stepper: Stepper, steps: int, stop_asked: Callable[[], bool]) -> Sweep:
    """Take up to `steps` steps, at least two, with rising rates. All ranks that train must call; all get the same.

    The model is of no use afterwards. Ranks that serve are told so.
    """
    strategy, comm = stepper.strategy, stepper.strategy.comm
    strategy.model.train()
    planned, losses, lowest, diverged = rates(steps), list[float](), math.inf, False
    with Display(comm.rank == 0, steps, 0) as display:
        for step, rate in enumerate(planned):
            for group in strategy.optimizer.param_groups:
                group["lr"] = rate
            totals, stop = _step(stepper, step, stop_asked)
            losses.append(math.nan if totals.mean_loss is None else totals.mean_loss)
            display.step(1)
            latest = smoothed(losses)[-1]
            display.figures(step + 1, losses[-1], totals.accuracy, 0.0)
            lowest = min(lowest, latest)
            diverged = not math.isfinite(latest) or latest > _DIVERGED * lowest > 0
            if diverged or stop:
                break
    strategy.finish()
    return Sweep(planned[: len(losses)], losses, diverged)


def _step(stepper: Stepper, step: int, stop_asked: Callable[[], bool]) -> tuple[Totals, bool]:
    """Take one step; return its sums over all ranks, and whether any of them was asked to stop."""
    strategy = stepper.strategy
    if strategy.pace is None:
        stepper.take(step)
        # A sixth number beside the sums of the losses, so that all stop together.
        totals, asked = stepper.feed.tally.reduce(strategy.comm, {"asked": float(stop_asked())})
        return totals, asked["asked"] > 0
    strategy.pace.open(step, step + 1)
    for ticket in stepper.tickets(strategy.pace, stop_asked):
        stepper.take_ticket(ticket)
    strategy.pace.close()
    return Totals.of(strategy.pace.totals)
