"""Optimizers by name with the options they have, and the course of the learning rate."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.optim.build import build_optimizer, check_takes_sparse, needs_closure, optimizer_names
from allreduce_sgd.optim.options import LR_SCHEDULES, OptimizerOptions
from allreduce_sgd.optim.schedule import batch_factor, build_schedule, factor


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2))]


def test_every_optimizer_is_built_by_its_name() -> None:
    assert {"sgd", "adam", "adamw", "lbfgs", "rmsprop", "adagrad", "adadelta"} <= set(optimizer_names())
    assert {"heavy-ball", "nesterov", "amsgrad", "lars", "lamb", "newton"} <= set(optimizer_names())
    for name, kind in optimizer_names().items():
        assert type(build_optimizer(OptimizerOptions(optimizer=name.upper()), parameters())) is kind


def test_options_reach_the_optimizer_and_defaults_are_its_own() -> None:
    sgd = build_optimizer(OptimizerOptions(), parameters()).param_groups[0]
    assert (sgd["lr"], sgd["momentum"]) == (0.05, 0.9)
    adam = build_optimizer(OptimizerOptions(optimizer="adam", beta2=0.95, eps=1e-6), parameters()).param_groups[0]
    assert (adam["lr"], adam["betas"], adam["eps"]) == (1e-3, (0.9, 0.95), 1e-6)
    assert build_optimizer(OptimizerOptions(optimizer="adam", beta1=0.0), parameters()).defaults["betas"] == (
        0.0,
        0.999,
    )
    nesterov = build_optimizer(OptimizerOptions(nesterov=True, weight_decay=0.1), parameters()).defaults
    assert nesterov["nesterov"]
    assert nesterov["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (OptimizerOptions(optimizer="sdg"), "--optimizer: unknown optimizer 'sdg'; choose from .*sgd"),
        (OptimizerOptions(optimizer="adam", momentum=0.9), "--momentum: Adam has no such option"),
        (OptimizerOptions(beta1=0.9), "--beta1, --beta2: SGD has no betas"),
        (OptimizerOptions(momentum=0.0, nesterov=True), "--optimizer sgd: Nesterov"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(options: OptimizerOptions, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        build_optimizer(options, parameters())
    assert "\n" not in str(caught.value)


def test_lbfgs_and_newton_alone_need_a_closure() -> None:
    needing = [
        name
        for name in optimizer_names()
        if needs_closure(build_optimizer(OptimizerOptions(optimizer=name), parameters()))
    ]
    assert needing == ["lbfgs", "newton"]


@pytest.mark.parametrize(
    ("schedule", "step", "expected", "options"),
    [
        ("constant", 999, 1.0, {}),
        ("linear", 25, 0.75, {}),
        ("linear", 100, 0.0, {}),
        ("cosine", 50, 0.5, {}),
        ("cosine", 100, 0.0, {}),
        ("step", 49, 1.0, {}),
        ("step", 50, 0.1, {}),
        ("step", 75, 0.01, {}),
        ("step", 50, 0.5, {"lr_decay": 0.5}),
        ("step", 75, 0.25, {"lr_decay": 0.5}),
        ("step", 29, 0.25, {"lr_decay": 0.5, "lr_decay_every": 10}),
        ("step", 30, 0.125, {"lr_decay": 0.5, "lr_decay_every": 10}),
        ("exponential", 0, 1.0, {}),
        ("exponential", 50, 0.1**0.5, {}),
        ("exponential", 100, 0.1, {}),
        ("exponential", 25, 0.5**2.5, {"lr_decay": 0.5, "lr_decay_every": 10}),
        ("polynomial", 25, 0.75**2, {}),
        ("polynomial", 25, 0.75**3.5, {"lr_power": 3.5}),
        ("polynomial", 100, 0.0, {}),
        ("inverse-time", 0, 1.0, {}),
        ("inverse-time", 99, 1 / 1.99, {}),
        ("inverse-time", 30, 1 / (1 + 0.5 * 30), {"lr_decay": 0.5}),
        ("inverse-time", 30, 1 / (1 + 2 * 3), {"lr_decay": 2.0, "lr_decay_every": 10}),
    ],
)
def test_course_of_the_learning_rate(schedule: str, step: int, expected: float, options: dict[str, Any]) -> None:
    given = OptimizerOptions(lr_schedule=schedule, **options)
    given.check()
    assert factor(given, step, 100) == pytest.approx(expected, abs=1e-12)
    # The same after a warm-up, on a run that is longer by it.
    warmed = dataclasses.replace(given, warmup_steps=7)
    assert factor(warmed, step + 7, 107) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_every_course_begins_at_the_base_rate_and_never_rises(schedule: str) -> None:
    options = OptimizerOptions(lr_schedule=schedule, warmup_steps=3)
    assert [factor(options, step, 20) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    rates = [factor(options, step, 20) for step in range(3, 25)]
    assert rates == sorted(rates, reverse=True)
    # Of plateau losses decide, not steps.
    assert (rates[16] < 1) is (schedule not in ("constant", "plateau"))
    # Runs of no steps but the warm-up's.
    assert all(0 <= factor(options, step, 3) <= 1 for step in range(5))


def test_rates_grow_with_the_batch() -> None:
    for how, expected in (("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)):
        assert batch_factor(OptimizerOptions(lr_scaling=how), 1024) == expected
    options = OptimizerOptions(lr=0.2, lr_scaling="linear", lr_base_batch=100, lr_schedule="linear", warmup_steps=2)
    optimizer = build_optimizer(options, parameters())
    schedule = build_schedule(options, optimizer, 6, 50)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr_decay": 0.5}, "--lr-decay 0.5: --lr-schedule constant has no use for it, only step, exponential"),
        ({"lr_decay_every": 5, "lr_schedule": "cosine"}, "--lr-decay-every 5: --lr-schedule cosine has no use for it"),
        ({"lr_power": 2.0, "lr_schedule": "step"}, "--lr-power 2: --lr-schedule step has no use for it, only polyno"),
        ({"lr_decay": 2.0, "lr_schedule": "step"}, "--lr-decay 2: the learning rate would rise .* at most 1"),
        ({"lr_base_batch": 64}, "--lr-base-batch 64: it has no use without --lr-scaling linear or sqrt"),
        ({"weight_decay_form": "coupled"}, "--weight-decay-form coupled: it has no use without --weight-decay"),
        ({"l1_form": "proximal"}, "--l1-form proximal: it has no use without --l1"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{text}"):
        OptimizerOptions(**options).check()


def test_warm_up_then_course() -> None:
    flat = OptimizerOptions(warmup_steps=4)
    assert [factor(flat, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    optimizer = build_optimizer(OptimizerOptions(lr=2.0), parameters())
    schedule = build_schedule(OptimizerOptions(lr=2.0, lr_schedule="cosine", warmup_steps=2), optimizer, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [1.0, 2.0, *(1 + math.cos(math.pi * done / 8) for done in range(8))]
    assert rates == pytest.approx(expected)


def steps_with_sparse_gradients(options: OptimizerOptions) -> bool:
    """Whether two steps of the optimizer on an embedding succeed."""
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer = build_optimizer(options, layer.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer(torch.tensor([1, 3, 3])).sum()
        loss.backward()
        return loss

    try:
        for _ in range(2):
            optimizer.step(closure)  # type: ignore[arg-type]
    except RuntimeError:
        return False
    return True


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch's Adagrad
@pytest.mark.parametrize("decay", [None, 0.1])
@pytest.mark.parametrize("name", sorted(set(optimizer_names()) - {"newton"}))
def test_optimizers_that_take_sparse_gradients_are_known(name: str, decay: float | None) -> None:
    options = OptimizerOptions(optimizer=name, weight_decay=decay)
    try:
        optimizer = build_optimizer(options, nn.Embedding(5, 3).parameters())
    except ConfigError:
        pytest.skip("has no such option")
    if steps_with_sparse_gradients(options):
        check_takes_sparse(optimizer)
    else:
        flag = "--optimizer" if decay is None or name not in ("sgd", "adagrad") else "--weight-decay"
        with pytest.raises(ConfigError, match=f"^{flag} "):
            check_takes_sparse(optimizer)
