"""When ranks that step alone exchange: the period H as a function of the step.

An exchange at step t (counted from 1; 0 is the beginning) is followed by one at step t + H(t), so that the first one
comes exactly at step H(0). Few exchanges late or early in the run: `rising` and `falling` (how often to average is
best a matter of the learning rate and the distance of the ranks: Wang and Joshi, "Adaptive communication strategies",
MLSys 2019, arXiv 1810.08313; here it is a schedule, which needs no measurement). One exchange a step up to a switch:
post-local SGD (Lin et al. 2018, arXiv 1808.07217).

Pure functions of the step: a run that goes on from a checkpoint has the same H.
"""

from collections.abc import Callable
from dataclasses import dataclass

from allreduce_sgd.errors import ConfigError, counted
from allreduce_sgd.strategies.options import PERIOD_SCHEDULES, StrategyOptions

__all__ = ["Period", "build_period", "switch_step"]

_SWITCHES = "choose step:N, epoch:N (N from 0 on) or lr-drop"


@dataclass(frozen=True)
class Period:
    """How many steps lie between two exchanges: at most `longest`, one up to step `switch`.

    From there to the end, at `total_steps`, `schedule` says how: "constant", "rising" linearly from 1 to `longest`, or
    "falling" from `longest` to 1. `total_steps` counts only for the last two. Raises ValueError for other values.
    """

    longest: int
    schedule: str = "constant"
    total_steps: int = 0
    switch: int = 0

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ValueError(f"longest is {self.longest}, allowed are 1 and more")
        if self.schedule not in PERIOD_SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, allowed are {', '.join(PERIOD_SCHEDULES)}")

    @property
    def shortest(self) -> int:
        """The fewest steps between two exchanges, over the whole run."""
        return self.longest if self.switch == 0 and self.schedule == "constant" else 1

    def at(self, step: int) -> int:
        """Return H at `step`: the number of steps from an exchange there, or from the beginning, to the next one."""
        if step < self.switch:
            return 1
        if self.schedule == "constant":
            return self.longest
        run = max(1, self.total_steps - self.switch)
        done = min(step - self.switch, run)
        # (longest - 1) done / run, rounded half up, in whole numbers.
        grown = (2 * (self.longest - 1) * done + run) // (2 * run)
        return 1 + grown if self.schedule == "rising" else self.longest - grown


def build_period(
    options: StrategyOptions, total_steps: int, steps_per_epoch: int, factor: Callable[[int], float]
) -> Period:
    """Return the period that the options ask for, in a run of `total_steps` optimizer steps.

    `factor` gives what the learning rate is multiplied by at a step, counted from 0. Raises ConfigError where the
    period is longer than the run, or where the switch is none.
    """
    longest = options.steps_between
    if longest > total_steps:
        steps = counted(total_steps, "step")
        raise ConfigError(f"--period {longest}: the run has only {steps}; choose 1 to {total_steps}, or a longer run")
    switch = 0
    if options.strategy == "post-local":
        switch = switch_step(options.switch, total_steps, steps_per_epoch, factor)
    return Period(longest, options.period_schedule, total_steps, switch)


def switch_step(text: str | None, total_steps: int, steps_per_epoch: int, factor: Callable[[int], float]) -> int:
    """Return the number of steps before the switch that --switch names; None: half the run.

    `lr-drop` switches where the learning rate is first lower than in the step before. Raises ConfigError for a text
    that is no switch, or none within the run.
    """
    if text is None:
        return total_steps // 2
    if text.lower() == "lr-drop":
        for step in range(1, total_steps):
            if factor(step) < factor(step - 1):
                return step
        raise ConfigError(
            f"--switch {text}: the learning rate never falls in the {total_steps} steps of this run; choose step:N or "
            f"epoch:N, or a --lr-schedule that falls"
        )
    unit, _, number = text.lower().partition(":")
    if unit not in ("step", "epoch") or not (number.isascii() and number.isdecimal()):
        raise ConfigError(f"--switch {text}: not a switch; {_SWITCHES}")
    step = int(number) * (steps_per_epoch if unit == "epoch" else 1)
    if step > total_steps:
        raise ConfigError(f"--switch {text}: this is step {step}, and the run has only {total_steps}; {_SWITCHES}")
    return step
