"""What theory says of SGD on quadratics, over the ranks there are: noise balls and the limits of stability.

The loss of a sample is sum over coordinates of curvature x^2 / 2 + sigma xi x, with independent normal xi, so that its
gradient is curvature x + sigma xi. Coordinates are independent, and each is a sample of the stationary distribution:
the mean of x^2 over D of them has the relative standard error sqrt(2 / D).
"""

import math

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.strategies.base import Share, Strategy
from allreduce_sgd.strategies.delayed import Delayed
from allreduce_sgd.strategies.synchronous import Synchronous

COORDINATES = 20_000
STANDARD_ERROR = math.sqrt(2 / COORDINATES)
LR, SIGMA = 0.25, 3.0


class Quadratic(nn.Module):
    """The loss at x, from the start given, with this curvature in each coordinate, or the same in all."""

    def __init__(self, curvature: Tensor, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start)
        self.register_buffer("curvature", curvature)

    def forward(self, noise: Tensor) -> Tensor:
        assert isinstance(self.curvature, Tensor)
        return (self.curvature / 2 * self.x.square() + noise * self.x).sum()


def mean_square_after(strategy: Strategy, local_batch: int, steps: int) -> float:
    """Train with independent noise on every rank, and return the mean over coordinates of x^2."""
    comm = strategy.comm
    generator = torch.Generator().manual_seed(1000 * local_batch + comm.rank)

    def loss(model: nn.Module) -> Tensor:
        # The mean of b independent normals is a normal of 1/b the variance.
        return model(SIGMA / math.sqrt(local_batch) * torch.randn(COORDINATES, generator=generator))

    for _ in range(steps):
        strategy.step(Share([loss], local_batch, local_batch * comm.size))
    strategy.finish()
    return float(strategy.model.get_parameter("x").detach().square().mean())


def synchronous(comm: Communicator, a: float) -> Strategy:
    model = Quadratic(torch.tensor(a / LR), torch.zeros(COORDINATES))
    return Synchronous(model, lambda groups: torch.optim.SGD(groups, lr=LR), comm, None, GradientOptions())


def delayed(comm: Communicator, model: nn.Module, delay: int, lr: float) -> Strategy:
    return Delayed(model, torch.optim.SGD(model.parameters(), lr=lr), comm, None, GradientOptions(), delay)


@pytest.mark.parametrize("a", [0.5, 1.5])
def test_the_noise_ball_is_as_large_as_the_inverse_mini_batch(comm: Communicator, a: float) -> None:
    """E x^2 = eta^2 sigma^2 / (b a (2 - a)), where b is the mini-batch of all ranks together."""
    found = []
    for local_batch in (1, 16):
        b = local_batch * comm.size
        theory = LR**2 * SIGMA**2 / (b * a * (2 - a))
        mean_square = mean_square_after(synchronous(comm, a), local_batch, 20)
        # Beside chance, (1 - a)^2 to the number of steps is missing, 1e-12.
        assert mean_square == pytest.approx(theory, rel=5 * STANDARD_ERROR)
        found.append(mean_square)
    assert found[0] / found[1] == pytest.approx(16, rel=5 * math.sqrt(2) * STANDARD_ERROR)


@pytest.mark.parametrize("a", [0.3, 0.6])
def test_the_noise_ball_with_delay_1(comm: Communicator, a: float) -> None:
    """E x^2 = eta^2 sigma^2 (1 + a) / (b a (1 - a) (2 + a)): more than without delay."""
    theory = LR**2 * SIGMA**2 * (1 + a) / (4 * comm.size * a * (1 - a) * (2 + a))
    # The slower of the two modes dies off as max |r|^steps, r^2 - r + a = 0: |r|^2 = a.
    steps = 40
    model = Quadratic(torch.tensor(a / LR), torch.zeros(COORDINATES))
    mean_square = mean_square_after(delayed(comm, model, 1, LR), 4, steps)
    assert mean_square == pytest.approx(theory, rel=5 * STANDARD_ERROR + steps * a**steps)
    assert theory > 1.05 * LR**2 * SIGMA**2 / (4 * comm.size * a * (2 - a))


@pytest.mark.parametrize(("delay", "limit"), [(0, 2.0), (1, 1.0), (2, 0.618034)])
def test_a_delay_is_stable_up_to_its_limit(comm: Communicator, delay: int, limit: float) -> None:
    """eta curvature < 2 sin(pi / (2 (2 tau + 1))): 3 % below it converges, 3 % above it diverges."""
    assert limit == pytest.approx(2 * math.sin(math.pi / (2 * (2 * delay + 1))), rel=1e-6)
    curvatures = torch.tensor([0.97 * limit, 1.03 * limit], dtype=torch.float64)
    model = Quadratic(curvatures, torch.ones(2, dtype=torch.float64))
    strategy = delayed(comm, model, delay, 1.0)
    none = torch.zeros(2, dtype=torch.float64)
    course = []
    for _ in range(600):
        strategy.step(Share([lambda model: model(none)], 1, comm.size))
        course.append(model.x.detach().abs().clone())
    strategy.finish()
    # Over more than a period of the oscillation.
    below, above = torch.stack(course[-12:]).amax(0).tolist()
    # The modes are the roots of r^(tau + 1) = r^tau - a; theory tells how fast they fall and grow.
    rates = []
    for a in curvatures.tolist():
        companion = torch.diag(torch.ones(delay, dtype=torch.float64), -1)
        companion[0, 0] += 1.0
        companion[0, delay] -= a
        rates.append(float(torch.linalg.eigvals(companion).abs().max()))
    assert rates[0] < 1 < rates[1]
    assert below < 10 * rates[0] ** 600 < 0.1
    assert above > 0.1 * rates[1] ** 600 > 10
