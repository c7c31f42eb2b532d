"""The optimizers that torch lacks, and penalties, against their formulas written out on a quadratic, in float64."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.optim.build import build_optimizer
from allreduce_sgd.optim.heavy_ball import HeavyBall
from allreduce_sgd.optim.lamb import Lamb
from allreduce_sgd.optim.lars import Lars
from allreduce_sgd.optim.nesterov import Nesterov
from allreduce_sgd.optim.newton import Newton, hessian_of
from allreduce_sgd.optim.options import OptimizerOptions

# Rates that change, since that is where forms of momentum differ.
RATES = [0.1, 0.1, 0.05, 0.02, 0.2, 0.1]
SHAPES = [(2, 3), (4,)]


class Quadratic:
    """f(w) = w'Aw/2 - b'w of the elements of a matrix and a vector, with A positive definite."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(10, 10, generator=generator, dtype=torch.float64)
        self.matrix = root @ root.T / 10 + 0.1 * torch.eye(10, dtype=torch.float64)
        self.offset = torch.randn(10, generator=generator, dtype=torch.float64)
        self.start = torch.randn(10, generator=generator, dtype=torch.float64)

    def gradient(self, w: Tensor) -> Tensor:
        return self.matrix @ w - self.offset

    def value(self, w: Tensor) -> Tensor:
        return w @ self.matrix @ w / 2 - self.offset @ w

    @property
    def minimum(self) -> Tensor:
        return torch.linalg.solve(self.matrix, self.offset)

    def parameters(self) -> list[nn.Parameter]:
        first, second = self.start.split([6, 4])
        return [nn.Parameter(first.reshape(2, 3).clone()), nn.Parameter(second.clone())]


PROBLEM = Quadratic()


def flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([one.detach().reshape(-1) for one in parameters])


def course(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], rates: Sequence[float]) -> list[Tensor]:
    """Step with these rates; return the parameters after every step, as they lie."""
    path = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        PROBLEM.value(torch.cat([one.reshape(-1) for one in parameters])).backward()
        optimizer.step()
        path.append(flat(parameters))
    return path


def built(options: OptimizerOptions) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    parameters = PROBLEM.parameters()
    return build_optimizer(options, parameters), parameters


def assert_close(given: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)


# ---- momentum as in textbooks


def heavy_ball(rates: Sequence[float], momentum: float, after: Callable[[Tensor, float], Tensor]) -> list[Tensor]:
    before, w = PROBLEM.start, PROBLEM.start
    path = []
    for rate in rates:
        before, w = w, after(w - rate * PROBLEM.gradient(w) + momentum * (w - before), rate)
        path.append(w)
    return path


def nesterov(rates: Sequence[float], momentum: float, after: Callable[[Tensor, float], Tensor]) -> list[Tensor]:
    before, w = PROBLEM.start, PROBLEM.start
    path = []
    for rate in rates:
        ahead = w + momentum * (w - before)
        before, w = w, after(w - rate * PROBLEM.gradient(ahead) + momentum * (w - before), rate)
        path.append(w)
    return path


def unchanged(w: Tensor, rate: float) -> Tensor:
    return w


def soft_threshold(w: Tensor, rate: float) -> Tensor:
    return torch.sign(w) * (w.abs() - rate * 0.8).clamp(min=0)


@pytest.mark.parametrize("penalty", [None, 0.8])
def test_heavy_ball(penalty: float | None) -> None:
    optimizer, parameters = built(OptimizerOptions(optimizer="Heavy-Ball", momentum=0.7, l1=penalty))
    wanted = heavy_ball(RATES, 0.7, soft_threshold if penalty else unchanged)
    for given, w in zip(course(optimizer, parameters, RATES), wanted, strict=True):
        assert_close(given, w)
    assert type(optimizer) is HeavyBall
    assert bool((flat(parameters) == 0).any()) is (penalty is not None)


@pytest.mark.parametrize("penalty", [None, 0.8])
def test_nesterov_trains_ahead_and_looks_back(penalty: float | None) -> None:
    optimizer, parameters = built(OptimizerOptions(optimizer="nesterov", momentum=0.7, l1=penalty))
    assert type(optimizer) is Nesterov
    wanted = nesterov(RATES, 0.7, soft_threshold if penalty else unchanged)
    before = PROBLEM.start
    for rate, w in zip(RATES, wanted, strict=True):
        (ahead,) = course(optimizer, parameters, [rate])
        assert_close(ahead, w + 0.7 * (w - before))
        optimizer.look_back_()
        assert_close(flat(parameters), w)
        if penalty:
            # What the threshold made 0 is 0, not merely small.
            assert torch.equal(flat(parameters) == 0, w == 0)
        optimizer.look_ahead_()
        assert_close(flat(parameters), ahead)
        before = w
    assert bool((wanted[-1] == 0).any()) is (penalty is not None)


@pytest.mark.parametrize("form", [False, True], ids=["heavy-ball", "nesterov"])
def test_torch_has_the_same_points_at_a_constant_rate_only(form: bool) -> None:
    ours, parameters = built(OptimizerOptions(optimizer="nesterov" if form else "heavy-ball", momentum=0.7))
    theirs, others = built(OptimizerOptions(momentum=0.7, nesterov=form))
    for given, wanted in zip(course(ours, parameters, RATES[:2]), course(theirs, others, RATES[:2]), strict=True):
        assert_close(given, wanted)
    assert not torch.allclose(course(ours, parameters, RATES[2:4])[-1], course(theirs, others, RATES[2:4])[-1])


def test_weight_decay_of_ours_is_that_of_torch() -> None:
    for name, form in (("heavy-ball", False), ("nesterov", True)):
        ours = built(OptimizerOptions(optimizer=name, momentum=0.7, weight_decay=0.3))
        theirs = built(OptimizerOptions(momentum=0.7, nesterov=form, weight_decay=0.3))
        assert_close(course(*ours, [0.1] * 4)[-1], course(*theirs, [0.1] * 4)[-1])


# ---- layer by layer


def test_lars() -> None:
    optimizer, parameters = built(OptimizerOptions(optimizer="lars", momentum=0.8, weight_decay=0.2, trust=0.05))
    assert type(optimizer) is Lars
    w, v = PROBLEM.start.clone(), torch.zeros(10, dtype=torch.float64)
    for given, rate in zip(course(optimizer, parameters, RATES), RATES, strict=True):
        g = PROBLEM.gradient(w)
        matrix, bias = slice(0, 6), slice(6, 10)
        local = 0.05 * w[matrix].norm() / (g[matrix].norm() + 0.2 * w[matrix].norm())
        v[matrix] = 0.8 * v[matrix] + rate * local * (g[matrix] + 0.2 * w[matrix])
        v[bias] = 0.8 * v[bias] + rate * g[bias]
        w = w - v
        assert_close(given, w)


def test_lamb() -> None:
    options = OptimizerOptions(optimizer="lamb", beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.2)
    optimizer, parameters = built(options)
    assert type(optimizer) is Lamb
    w, m, v = PROBLEM.start.clone(), torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    for step, (given, rate) in enumerate(zip(course(optimizer, parameters, RATES), RATES, strict=True), 1):
        g = PROBLEM.gradient(w)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        r = m / (1 - 0.8**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-3)
        matrix = r[:6] + 0.2 * w[:6]
        w = torch.cat([w[:6] - rate * w[:6].norm() / matrix.norm() * matrix, w[6:] - rate * r[6:]])
        assert_close(given, w)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_layers_of_zeros_move_and_those_without_gradient_stay(name: str) -> None:
    zeros, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer(OptimizerOptions(optimizer=name, weight_decay=0.0), [zeros, still])
    for _ in range(2):
        zeros.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
        optimizer.step()
    assert (zeros < 0).all()
    assert torch.equal(still, torch.ones(2, 2))


def test_amsgrad_is_adam_with_the_largest_second_moment() -> None:
    ours = built(OptimizerOptions(optimizer="amsgrad", beta2=0.9))
    parameters = PROBLEM.parameters()
    theirs = torch.optim.Adam(parameters, betas=(0.9, 0.9), amsgrad=True)
    assert_close(course(*ours, RATES)[-1], course(theirs, parameters, RATES)[-1])
    assert not torch.allclose(
        flat(parameters), course(*built(OptimizerOptions(optimizer="adam", beta2=0.9)), RATES)[-1]
    )


@pytest.mark.parametrize("name", ["heavy-ball", "nesterov", "lars", "lamb", "newton"])
def test_a_state_goes_on_bit_for_bit(name: str) -> None:
    options = OptimizerOptions(optimizer=name, l1=None if name == "newton" else 0.1)
    optimizer, parameters = built(options)
    step = newton_course if name == "newton" else course
    step(optimizer, parameters, RATES)
    again = [nn.Parameter(one.detach().clone()) for one in parameters]
    follower = build_optimizer(options, again)
    follower.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(step(optimizer, parameters, RATES)[-1], step(follower, again, RATES)[-1])


@pytest.mark.parametrize("name", ["heavy-ball", "nesterov", "lars", "lamb"])
def test_sparse_gradients_are_refused(name: str) -> None:
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer = build_optimizer(OptimizerOptions(optimizer=name), layer.parameters())
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="takes dense gradients only"):
        optimizer.step()


# ---- Newton


def newton_course(optimizer: Any, parameters: list[nn.Parameter], rates: Sequence[float]) -> list[Tensor]:
    def loss() -> Tensor:
        return PROBLEM.value(torch.cat([one.reshape(-1) for one in parameters]))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    path = []
    for _ in rates:
        optimizer.step(closure, lambda: hessian_of(loss(), parameters))
        path.append(flat(parameters))
    return path


def test_newton_reaches_the_minimum_of_a_quadratic_in_one_step() -> None:
    optimizer, parameters = built(OptimizerOptions(optimizer="newton", damping=0.0))
    torch.testing.assert_close(newton_course(optimizer, parameters, [1])[-1], PROBLEM.minimum, rtol=1e-9, atol=1e-9)
    optimizer, parameters = built(OptimizerOptions(optimizer="newton", damping=0.0, weight_decay=0.5))
    minimum = torch.linalg.solve(PROBLEM.matrix + 0.5 * torch.eye(10, dtype=torch.float64), PROBLEM.offset)
    torch.testing.assert_close(newton_course(optimizer, parameters, [1])[-1], minimum, rtol=1e-9, atol=1e-9)


def test_damped_newton_steps_by_its_formula_and_trusts_a_quadratic_more_and_more() -> None:
    optimizer, parameters = built(OptimizerOptions(optimizer="newton", damping=0.3, lr=0.5))
    w, damping = PROBLEM.start, 0.3
    for given in newton_course(optimizer, parameters, range(4)):
        w = w - 0.5 * torch.linalg.solve(
            PROBLEM.matrix + damping * torch.eye(10, dtype=torch.float64), PROBLEM.gradient(w)
        )
        damping /= 3
        torch.testing.assert_close(given, w, rtol=1e-9, atol=1e-9)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.3 / 81)


def test_damped_newton_leaves_a_saddle_downhill_and_the_plain_one_stays() -> None:
    ends = []
    for damping in (0.1, 0.0):
        point = nn.Parameter(torch.tensor([0.3, 0.5], dtype=torch.float64))
        optimizer = Newton([point], damping=damping)

        def loss(at: nn.Parameter = point) -> Tensor:
            # Minima at x = +-1, y = 0, and a saddle at 0.
            return (at[0] ** 2 - 1) ** 2 + at[1] ** 2

        def closure(at: nn.Parameter = point) -> Tensor:
            at.grad = None
            value = loss(at)
            value.backward()
            return value

        for _ in range(20):
            optimizer.step(closure, lambda at=point: hessian_of(loss(at), [at]))  # type: ignore[misc]
        ends.append(point.detach().clone())
    torch.testing.assert_close(ends[0], torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ends[1], torch.zeros(2, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_second_derivatives_are_those_of_a_formula() -> None:
    first, second = nn.Parameter(torch.tensor([0.3, -0.2])), nn.Parameter(torch.tensor(0.7))
    unused = nn.Parameter(torch.ones(1))
    value = torch.sin(first[0] * second) + first[1] ** 3
    x, y, z = 0.3, -0.2, 0.7
    mixed = math.cos(x * z) - x * z * math.sin(x * z)
    wanted = [
        [-z * z * math.sin(x * z), 0, mixed, 0],
        [0, 6 * y, 0, 0],
        [mixed, 0, -x * x * math.sin(x * z), 0],
        [0, 0, 0, 0],
    ]
    torch.testing.assert_close(hessian_of(value, [first, second, unused]), torch.tensor(wanted))
    assert torch.equal(hessian_of(first.sum(), [first]), torch.zeros(2, 2))


def test_newton_refuses_large_models() -> None:
    with pytest.raises(ConfigError, match=r"--optimizer newton: the model has 5000 parameters, .* allowed are 4096"):
        build_optimizer(OptimizerOptions(optimizer="newton"), [nn.Parameter(torch.zeros(50, 100))])
