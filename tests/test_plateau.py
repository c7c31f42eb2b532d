"""The learning rate that falls where the loss does not: torch's rule, on top of the schedule."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.optim.plateau import Plateau, build_plateau, set_rate
from allreduce_sgd.optim.schedule import build_schedule

LOSSES = [3.0, 2.0, 2.0, 1.9999, 2.5, float("nan"), 1.0, 1.1, 1.2, 1.3, 1.4, 0.9999, 1.0, 1.0, 1.0]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)


def schedule_of(made: torch.optim.Optimizer, warmup_steps: int = 0) -> LambdaLR:
    options = OptimizerOptions(lr=0.4, lr_schedule="plateau", warmup_steps=warmup_steps)
    return build_schedule(options, made, 100)


def rate(made: torch.optim.Optimizer) -> float:
    return float(made.param_groups[0]["lr"])


def test_rates_are_those_of_torchs_class() -> None:
    theirs, ours = optimizer(), optimizer()
    reference = ReduceLROnPlateau(theirs, factor=0.5, patience=1)
    schedule = schedule_of(ours)
    plateau = Plateau(schedule, 0.5, 1)
    fell = []
    for loss in LOSSES:
        ours.step()
        schedule.step()
        reference.step(loss)
        fell.append(plateau.look(loss))
        assert rate(ours) == rate(theirs)
    assert sum(fell) == 6
    assert plateau.factor == 0.5**6


def test_it_falls_at_once_and_multiplies_with_the_warm_up() -> None:
    made = optimizer()
    schedule = schedule_of(made, warmup_steps=4)
    plateau = Plateau(schedule, 0.1, 0)
    assert rate(made) == 0.1
    assert not plateau.look(1.0)
    assert plateau.look(1.0)
    assert abs(rate(made) - 0.01) < 1e-12
    rates = []
    for _ in range(4):
        made.step()
        schedule.step()
        rates.append(round(rate(made), 12))
    assert rates == [0.02, 0.03, 0.04, 0.04]
    set_rate(schedule, 1)
    assert abs(rate(made) - 0.02) < 1e-12


def test_it_goes_on_from_its_state() -> None:
    made = optimizer()
    schedule = schedule_of(made)
    plateau = Plateau(schedule, 0.5, 1)
    for loss in LOSSES[:6]:
        plateau.look(loss)
    other = optimizer()
    other_schedule = schedule_of(other)
    resumed = Plateau(other_schedule, 0.5, 1)
    other_schedule.load_state_dict(schedule.state_dict())
    resumed.load_state_dict(plateau.state_dict())
    set_rate(other_schedule, other_schedule.last_epoch)
    assert rate(other) == rate(made) < 0.4
    for loss in LOSSES[6:]:
        assert resumed.look(loss) == plateau.look(loss)
        assert rate(other) == rate(made)


def test_other_schedules_have_none() -> None:
    made = optimizer()
    assert build_plateau(OptimizerOptions(), schedule_of(made)) is None
    built = build_plateau(OptimizerOptions(lr_schedule="plateau"), schedule_of(made))
    assert built is not None
    assert [built.look(1.0) for _ in range(7)] == [False] * 6 + [True]
    assert built.factor == 0.1
