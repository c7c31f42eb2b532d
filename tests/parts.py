"""Models and data sets that tests name as `tests.parts:function` on the command line."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def _rank() -> int:
    return int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)


class _Slow(nn.Module):
    """Random states, running statistics, and time for a test to kill it between two steps."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(features, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(16, classes),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            time.sleep(float(os.environ.get("TEST_STEP_SECONDS", "0")))
        return self.body(inputs)


def slow_model(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _Slow(int(np.prod(input_shape)), classes)


def not_a_module(classes: int) -> object:
    return [classes]


def raising_model() -> nn.Module:
    raise KeyError("no such layer")


class _Failing(nn.Module):
    def __init__(self, features: int, classes: int, in_thread: bool, everywhere: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(features, classes)
        self.steps = 0
        self.in_thread = in_thread
        self.everywhere = everywhere

    def forward(self, inputs: Tensor) -> Tensor:
        self.steps += self.training
        if self.steps == 3 and (_rank() == 1 or self.everywhere):
            if self.in_thread:
                threading.Thread(target=self._fail, name="reader").start()
            else:
                self._fail()
        return self.layer(inputs.flatten(1))

    def _fail(self) -> None:
        if "TEST_FAILURE_TIME" in os.environ:
            Path(os.environ["TEST_FAILURE_TIME"]).write_text(str(time.time()))
        raise ArithmeticError("the third step went wrong")


def fails_on_rank_1(classes: int) -> nn.Module:
    return _Failing(64, classes, in_thread=False, everywhere=False)


def fails_in_thread_of_rank_1(classes: int) -> nn.Module:
    return _Failing(64, classes, in_thread=True, everywhere=False)


def fails_everywhere(classes: int) -> nn.Module:
    return _Failing(64, classes, in_thread=False, everywhere=True)


class _SilentRank(nn.Module):
    """Rank 1 stops taking part after two steps."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, classes)
        self.steps = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.steps += self.training
        if self.steps == 3 and _rank() == 1:
            time.sleep(60)
        return self.layer(inputs.flatten(1))


def silent_rank(classes: int) -> nn.Module:
    return _SilentRank(classes)


def wrong_width(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes + 1))


def wrong_input(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(63, classes))


def forgetful_model(classes: int) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    model.register_parameter("forgotten", nn.Parameter(torch.ones(2)))
    return model


def nan_data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    inputs, targets = torch.ones(40, 4), torch.zeros(40, dtype=torch.int64)
    inputs[17, 2] = float("nan")
    return (inputs, targets), (torch.ones(4, 4), torch.zeros(4, dtype=torch.int64))


def three_samples() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    part = (torch.eye(3), torch.arange(3))
    return part, part


def course_samples() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Linear regression y = 2 a - b + noise, 101 samples: an odd number, so that shares are uneven."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(101, 2, generator=generator)
    targets = 2 * inputs[:, 0] - inputs[:, 1] + 0.1 * torch.randn(101, generator=generator)
    return (inputs, targets), (inputs[:31], targets[:31])


def course_pairs() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Four samples of a line through the origin, from the course."""
    part = (torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([1.0, 1.0, -1.0, -1.0]))
    return part, part


def zero_line() -> nn.Module:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


class _Troubled(nn.Module):
    """On rank 1, in training step 5 (3 for nan_gradient), something goes wrong that only numbers show."""

    def __init__(self, classes: int, trouble: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, classes)
        self.trouble = trouble
        # A buffer, so that a resumed run goes on counting.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(inputs))
        if not self.training:
            return outputs
        self.steps += 1
        if self.trouble == "hopeless":
            return outputs * float("nan")
        if _rank() != 1 or int(self.steps) != (3 if self.trouble == "nan_gradient" else 5):
            return outputs
        match self.trouble:
            case "overflow":
                return outputs * float("inf")
            case "nan_gradient":
                # Adds zero, the gradient of which is not finite, for the bias only.
                return outputs + torch.sqrt((self.head.bias - self.head.bias.detach()).sum())
            case _:
                self.head.weight.data[0, 0] += 1e-6
                return outputs


def overflowing_model(classes: int) -> nn.Module:
    return _Troubled(classes, "overflow")


def nan_gradient_model(classes: int) -> nn.Module:
    return _Troubled(classes, "nan_gradient")


def drifting_model(classes: int) -> nn.Module:
    return _Troubled(classes, "drift")


class _OwnNorm(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return input


def own_norm_model(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), _OwnNorm(64), nn.Linear(64, classes))


class _SparseModel(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(17, 8, sparse=True)
        self.head = nn.Linear(8, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.words(inputs.flatten(1).long().clamp(0, 16)))


def sparse_model(classes: int) -> nn.Module:
    return _SparseModel(classes)


def hopeless_model(classes: int) -> nn.Module:
    return _Troubled(classes, "hopeless")


class _LastDeclaredFirst(nn.Module):
    """Gradients arrive in the order of declaration, not in reverse."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(90, classes)
        self.middle = nn.Linear(110, 90)
        self.first = nn.Linear(64, 110)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(torch.relu(self.first(inputs.flatten(1))))))


def last_declared_first(classes: int) -> nn.Module:
    return _LastDeclaredFirst(classes)


class _WrongSquare(torch.autograd.Function):
    """The square, with a derivative one per mille too large."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return input.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        return 2.002 * input * gradients[0]


class _WrongGradient(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(64, classes)
        self.bias = nn.Parameter(torch.full((classes,), 0.7))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, inputs: Tensor) -> Tensor:
        squares: Tensor = _WrongSquare.apply(self.bias)
        return self.scale * self.body(inputs.flatten(1)) + squares


def wrong_gradient_model(classes: int) -> nn.Module:
    return _WrongGradient(classes)
