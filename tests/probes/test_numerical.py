"""Numerical differences against closed forms, on smooth functions and at kinks.

The example is h(x) = exp(sin(cos x)), whose derivative by the chain rule is −exp(sin(cos x)) cos(cos x) sin x.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from allreduce_sgd.probes.numerical import TOLERANCE, central_difference, relative_error

FunctionOf = Callable[[Tensor], Tensor]


def example(x: Tensor) -> Tensor:
    return x.cos().sin().exp()


def example_derivative(x: float) -> float:
    return -math.exp(math.sin(math.cos(x))) * math.cos(math.cos(x)) * math.sin(x)


@pytest.mark.parametrize("x", [-3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 40.0])
def test_the_example_three_ways(x: float) -> None:
    at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(example(at), at)
    assert float(derivative) == pytest.approx(example_derivative(x), rel=1e-14, abs=1e-15)
    element = torch.tensor(x, dtype=torch.float64)
    numerical = central_difference(lambda: float(example(element)), element)
    assert numerical == pytest.approx(example_derivative(x), rel=1e-7, abs=1e-9)
    assert float(element) == x


def test_a_step_ten_times_as_long_is_a_hundred_times_as_wrong() -> None:
    element = torch.tensor(1.0, dtype=torch.float64)
    errors = [
        abs(central_difference(lambda: float(example(element)), element, step) - example_derivative(1.0))
        for step in (1e-2, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.01)


def error_of(function: FunctionOf, x: float, derivative: float) -> float:
    element = torch.tensor(x, dtype=torch.float64)
    error, _ = relative_error(lambda: float(function(element)), element, derivative)
    assert float(element) == x
    return error


@pytest.mark.parametrize("factor", [1.001, 0.5, -1.0, 0.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_wrong_derivative_is_told_at_any_scale(scale: float, factor: float) -> None:
    def function(x: Tensor) -> Tensor:
        return scale * example(x)

    assert error_of(function, 1.0, scale * example_derivative(1.0)) < TOLERANCE / 10
    assert error_of(function, 1.0, factor * scale * example_derivative(1.0)) > TOLERANCE


KINKS: list[tuple[FunctionOf, float, list[float], list[float]]] = [
    # Within the longest of the steps, and beyond the shortest.
    (lambda x: 3 * torch.relu(x), 1e-6, [3.0], [0.0, 2.9]),
    (lambda x: 3 * torch.relu(x) + example(x), -1e-6, [example_derivative(-1e-6)], [3.0]),
    # Exactly there: any slope between the two sides.
    (lambda x: 3 * torch.relu(x), 0.0, [0.0, 1.5, 3.0], [-0.01, 3.01]),
    (lambda x: x.abs(), 0.0, [-1.0, 0.0, 1.0], [1.01]),
    # A slope that no derivative is lies between none.
    (lambda x: x.square(), 2.0, [4.0], [3.99, 4.01]),
]


@pytest.mark.parametrize(("function", "x", "right", "wrong"), KINKS)
def test_kinks_give_no_false_alarm(function: FunctionOf, x: float, right: list[float], wrong: list[float]) -> None:
    for derivative in right:
        assert error_of(function, x, derivative) <= TOLERANCE, derivative
    for derivative in wrong:
        assert error_of(function, x, derivative) > TOLERANCE, derivative


@pytest.mark.parametrize("derivative", [math.nan, math.inf])
def test_what_is_not_finite_is_wrong(derivative: float) -> None:
    assert error_of(example, 1.0, derivative) == math.inf
