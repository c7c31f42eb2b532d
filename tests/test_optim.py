"""Optimizers by name with the options they have, and the course of the learning rate."""

import math

import pytest
import torch
from torch import nn

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.optim.build import build_optimizer, check_takes_sparse, needs_closure, optimizer_names
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.optim.schedule import build_schedule, factor


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2))]


def test_every_optimizer_of_torch_is_built_by_its_name() -> None:
    assert {"sgd", "adam", "adamw", "lbfgs", "rmsprop", "adagrad", "adadelta"} <= set(optimizer_names())
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


def test_only_lbfgs_needs_a_closure() -> None:
    needing = [
        name
        for name in optimizer_names()
        if needs_closure(build_optimizer(OptimizerOptions(optimizer=name), parameters()))
    ]
    assert needing == ["lbfgs"]


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 999, 1.0),
        ("linear", 25, 0.75),
        ("linear", 100, 0.0),
        ("cosine", 50, 0.5),
        ("cosine", 100, 0.0),
        ("step", 49, 1.0),
        ("step", 50, 0.1),
        ("step", 75, 0.01),
    ],
)
def test_course_of_the_learning_rate(schedule: str, step: int, expected: float) -> None:
    assert factor(schedule, step, 100, 0) == pytest.approx(expected, abs=1e-12)


def test_warm_up_then_course() -> None:
    assert [factor("constant", step, 100, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
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
@pytest.mark.parametrize("name", sorted(optimizer_names()))
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
