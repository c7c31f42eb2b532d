"""What DistributedDataParallel must be equal to: bare copies of the module, one for every rank, in one process.

Every rank of a test keeps all copies, runs on each of them what the rank it stands for runs, and averages by the rules
of torch's DistributedDataParallel, spelled out in `Replicas.average`. No communication, buckets or hooks of ours.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["Loss", "Replicas", "assert_same_gradients", "assert_same_parameters", "gradient_of", "network", "samples"]


Loss = Callable[[nn.Module, int, int], Tensor]
"""The loss of a module on a rank in a step."""


class Replicas:
    """`size` copies of the module that `make` returns; `used[rank]` names the parameters with a new gradient there."""

    def __init__(self, make: Callable[[], nn.Module], size: int) -> None:
        self.models = [make() for _ in range(size)]
        self.used: list[set[str]] = [set() for _ in range(size)]
        for model, used in zip(self.models, self.used, strict=True):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(partial(_note, used, name))

    def backward(self, loss: Loss, step: int = 0, synchronised: bool = True) -> None:
        """Back-propagate `loss(copy, rank, step)` on every copy, and average if `synchronised`."""
        for rank, model in enumerate(self.models):
            loss(model, rank, step).backward()
        if synchronised:
            self.average()

    def average(self, weights: Sequence[float] | None = None) -> None:
        """Replace gradients by the weighted sum of all copies'; without weights, by their mean.

        A copy that has none counts as zeros. Parameters that got a gradient on no copy since the last call stay as
        they are, whatever their `.grad` holds.
        """
        weights = weights or [1 / len(self.models)] * len(self.models)
        for name, first in self.models[0].named_parameters():
            if any(name in used for used in self.used):
                total = torch.zeros_like(first)
                for model, weight in zip(self.models, weights, strict=True):
                    gradient = model.get_parameter(name).grad
                    if gradient is not None:
                        total += weight * gradient.to_dense() if gradient.is_sparse else weight * gradient
                for model in self.models:
                    model.get_parameter(name).grad = total.clone()
        for used in self.used:
            used.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for model in self.models:
            model.zero_grad(set_to_none)


def network(seed: int = 0) -> nn.Sequential:
    """A small network of float64 parameters, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def samples(rank: int, count: int = 4, step: int = 0) -> tuple[Tensor, Tensor]:
    """Return the inputs (count, 5), float64, and classes (count,), int64, of one rank's mini-batch."""
    generator = torch.Generator().manual_seed(100 + rank + 1000 * step)
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=generator)


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def assert_same_gradients(
    module: nn.Module, expected: nn.Module, rtol: float | None = None, atol: float | None = None
) -> None:
    """Assert that the gradients of the parameters of the same names are close, of one dtype, or None in both."""
    for name, wanted in expected.named_parameters():
        gradient = module.get_parameter(name).grad
        if wanted.grad is None or gradient is None:
            assert gradient is wanted.grad is None, f"{name}: {gradient} is not {wanted.grad}"
        else:
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            torch.testing.assert_close(dense, wanted.grad, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))


def _note(used: set[str], name: str, parameter: Tensor) -> None:
    used.add(name)


def assert_same_parameters(module: nn.Module, expected: nn.Module) -> None:
    """Assert that all parameters and buffers of the same names are close."""
    torch.testing.assert_close(dict(module.state_dict()), dict(expected.state_dict()))
