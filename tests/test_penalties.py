"""L2 and L1, each in two forms, around any optimizer."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softshrink

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.optim.build import build_optimizer, check_takes_sparse, optimizer_names
from allreduce_sgd.optim.nesterov import Nesterov
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.server.shards import Master, Vectors
from tests.test_optimizers import PROBLEM, RATES, assert_close, built, course, flat

DECAY, L1 = 0.3, 0.4
HOOKED = sorted(set(optimizer_names()) - {"lbfgs", "newton", "sparseadam", "muon"})


def by_hand(name: str, form: str) -> list[Tensor]:
    """The course of the bare optimizer, with the term written into its gradients or around its steps."""
    decays = form in ("coupled", "decoupled") and "weight_decay" in built(OptimizerOptions(optimizer=name))[0].defaults
    decay = 0.0 if decays else None
    optimizer, parameters = built(OptimizerOptions(optimizer=name, weight_decay=decay))
    path = []
    for rate in RATES:
        optimizer.param_groups[0]["lr"] = rate
        w = flat(parameters)
        g = PROBLEM.gradient(w)
        if form == "coupled":
            g = g + DECAY * w
        if form == "subgradient":
            g = g + L1 * w.sign()
        if form == "decoupled":
            w = w - rate * DECAY * w
        with torch.no_grad():
            for one, part, gradient in zip(parameters, w.split([6, 4]), g.split([6, 4]), strict=True):
                one.copy_(part.view(one.shape))
                one.grad = gradient.view(one.shape)
        optimizer.step()
        if form == "proximal":
            with torch.no_grad():
                for one in parameters:
                    one.copy_(one.sign() * (one.abs() - rate * L1).clamp(min=0))
        path.append(flat(parameters))
    return path


@pytest.mark.parametrize("form", ["coupled", "decoupled", "subgradient", "proximal"])
@pytest.mark.parametrize("name", HOOKED)
def test_the_term_is_in_the_gradient_or_around_the_step(name: str, form: str) -> None:
    decay = form in ("coupled", "decoupled")
    options = OptimizerOptions(
        optimizer=name,
        weight_decay=DECAY if decay else None,
        weight_decay_form=form if decay else None,
        l1=None if decay else L1,
        l1_form=None if decay else form,
    )
    if decay and name in ("lars", "lamb"):
        with pytest.raises(ConfigError, match=f"--weight-decay-form {form}: {name} has weight decay in its ratio"):
            built(options)
        return
    if form == "proximal" and name in ("heavy-ball", "nesterov"):
        pytest.skip("a part of the displacement there: see test_optimizers.py")
    if form == "decoupled" and name == "adafactor":
        pytest.skip("torch's own, in steps whose length is that of the parameters before")
    for given, wanted in zip(course(*built(options), RATES), by_hand(name, form), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-12)


def test_forms_are_those_of_torch_where_torch_has_them() -> None:
    for name, form, same in (
        ("adam", "decoupled", "adamw"),
        ("adamw", "coupled", "adam"),
        ("adamw", "decoupled", "adamw"),
    ):
        ours = built(OptimizerOptions(optimizer=name, weight_decay=DECAY, weight_decay_form=form))
        theirs = built(OptimizerOptions(optimizer=same, weight_decay=DECAY))
        assert_close(course(*ours, RATES)[-1], course(*theirs, RATES)[-1])


def test_proximal_descent_finds_the_zeros_of_the_lasso_and_the_subgradient_does_not() -> None:
    def found(optimizer: str, form: str, momentum: float, rate: float) -> Tensor:
        made, parameters = built(OptimizerOptions(optimizer=optimizer, momentum=momentum, l1=L1, l1_form=form))
        course(made, parameters, [rate] * 150)
        if isinstance(made, Nesterov):
            made.look_back_()
        return flat(parameters)

    w = found("nesterov", "proximal", 0.8, 0.2)
    # The minimum of f + L1 |w|: a fixed point of the proximal step of any length.
    torch.testing.assert_close(softshrink(w - 0.7 * PROBLEM.gradient(w), 0.7 * L1), w, rtol=1e-5, atol=1e-5)
    assert (w == 0).any()
    slower = found("sgd", "proximal", 0.0, 0.4)
    torch.testing.assert_close(slower, w, rtol=1e-2, atol=1e-2)
    assert torch.equal(slower == 0, w == 0)
    assert not (found("sgd", "subgradient", 0.0, 0.4) == 0).any()


def test_gradients_are_given_back_and_parameters_without_one_are_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    options = OptimizerOptions(momentum=0.0, lr=0.1, l1=1.0, weight_decay=0.5, weight_decay_form="decoupled")
    optimizer = build_optimizer(options, [used, unused])
    gradient = torch.ones(2)
    used.grad = gradient
    optimizer.step()
    assert used.grad is gradient
    assert torch.equal(gradient, torch.ones(2))
    assert torch.equal(unused, torch.ones(2))
    # 1 - 0.05 of decay, - 0.1 of the step, - 0.1 of the threshold.
    torch.testing.assert_close(used.detach(), torch.full((2,), 0.75))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (OptimizerOptions(optimizer="lbfgs", l1=0.1), "--l1 0.1: lbfgs evaluates the loss several times a step"),
        (
            OptimizerOptions(optimizer="newton", weight_decay=0.1, weight_decay_form="decoupled"),
            "--weight-decay-form decoupled: newton evaluates",
        ),
        (OptimizerOptions(trust=0.1), "--trust: SGD has no such option"),
        (OptimizerOptions(optimizer="adam", line_search="none"), "--line-search: Adam has no such option"),
    ],
)
def test_what_cannot_be_is_one_line(options: OptimizerOptions, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        built(options)


def test_penalties_do_not_go_with_sparse_gradients() -> None:
    for options, flag in (
        (OptimizerOptions(momentum=0.0, l1=0.1), "--l1"),
        (OptimizerOptions(momentum=0.0, weight_decay=0.1, weight_decay_form="decoupled"), "--weight-decay 0.1"),
    ):
        with pytest.raises(ConfigError, match=f"^{flag}: .* sparse"):
            check_takes_sparse(built(options)[0])


def test_options_of_torch_reach_it() -> None:
    lbfgs = OptimizerOptions(optimizer="lbfgs", lbfgs_history=7, line_search="strong-wolfe", max_iterations=3)
    group = built(lbfgs)[0].param_groups[0]
    assert (group["history_size"], group["line_search_fn"], group["max_iter"]) == (7, "strong_wolfe", 3)
    assert built(OptimizerOptions(optimizer="lbfgs", line_search="none"))[0].defaults["line_search_fn"] is None
    assert built(OptimizerOptions(optimizer="adadelta", rho=0.8))[0].defaults["rho"] == 0.8
    rmsprop = built(OptimizerOptions(optimizer="rmsprop", alpha=0.8, centered=True))[0].defaults
    assert (rmsprop["alpha"], rmsprop["centered"]) == (0.8, True)


@pytest.mark.parametrize("name", ["sgd", "heavy-ball", "nesterov"])
def test_servers_step_with_the_penalties_on_their_shards(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 5).double()
    options = OptimizerOptions(
        optimizer=name, lr=0.1, l1=2.0, weight_decay=0.3, weight_decay_form="decoupled", momentum=0.5
    )
    vectors = Vectors(model, 2)
    masters = [Master(vectors, shard, lambda groups: build_optimizer(options, groups)) for shard in range(2)]
    start = flat(list(model.parameters()))
    (cuts,) = zip(*map(vectors.pieces, range(2)), strict=True)
    for master, cut in zip(masters, cuts, strict=True):
        master.values[0].copy_(start[cut])
    optimizer = build_optimizer(options, model.parameters())
    for step in range(3):
        gradient = torch.randn(20, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for parameter, part in zip(model.parameters(), gradient.split([15, 5]), strict=True):
            parameter.grad = part.view(parameter.shape)
        optimizer.step()
        for master, cut in zip(masters, cuts, strict=True):
            # Where pushed gradients are received, step after step.
            master.gradient[0].copy_(gradient[cut])
            master.step(0.1)
    assert torch.equal(torch.cat([master.values[0] for master in masters]), flat(list(model.parameters())))
    assert (flat(list(model.parameters())) == 0).any() or name == "nesterov"
