"""What the tests of ShardedOptimizer share: optimizers, and a model that is awkward to cut."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.sharded import Groups
from allreduce_sgd.optim.build import build_optimizer
from allreduce_sgd.optim.heavy_ball import HeavyBall
from allreduce_sgd.optim.lamb import Lamb
from allreduce_sgd.optim.lars import Lars
from allreduce_sgd.optim.nesterov import Nesterov
from allreduce_sgd.optim.options import OptimizerOptions

__all__ = [
    "ELEMENTWISE",
    "WHOLE",
    "Make",
    "Model",
    "assert_same_bits",
    "loss_of",
    "one_group",
    "several_groups",
    "train",
    "wrapped",
]

Make = Callable[[Groups], optim.Optimizer]

PENALTIES = OptimizerOptions(optimizer="nesterov", l1=0.05, weight_decay=0.1, weight_decay_form="decoupled")

ELEMENTWISE: dict[str, Make] = {
    "sgd": lambda groups: optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01, dampening=0.1),
    "nesterov": lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "sgd_foreach": lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda groups: optim.Adam(groups, lr=0.01, weight_decay=0.01),
    "amsgrad": lambda groups: optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw": lambda groups: optim.AdamW(groups, lr=0.01),
    "adamw_foreach": lambda groups: optim.AdamW(groups, lr=0.01, foreach=True),
    "adagrad": lambda groups: optim.Adagrad(groups, lr=0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda groups: optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
    "adadelta": lambda groups: optim.Adadelta(groups),
    "adamax": lambda groups: optim.Adamax(groups, lr=0.01),
    "nadam": lambda groups: optim.NAdam(groups, lr=0.01),
    "radam": lambda groups: optim.RAdam(groups, lr=0.01),
    "asgd": lambda groups: optim.ASGD(groups, lr=0.01),
    "rprop": lambda groups: optim.Rprop(groups, lr=0.01),
    "heavy_ball": lambda groups: HeavyBall(groups, lr=0.1, weight_decay=0.01),
    "textbook_nesterov": lambda groups: Nesterov(groups, lr=0.1),
    "penalties": lambda groups: build_optimizer(PENALTIES, groups),
}


WHOLE: dict[str, Make] = {
    "adafactor": lambda groups: optim.Adafactor(groups, lr=0.05),
    "lars": lambda groups: Lars(groups, lr=5.0, weight_decay=0.01, trust=0.01),
    "lamb": lambda groups: Lamb(groups, lr=0.05, betas=(0.9, 0.99)),
}
if hasattr(optim, "Muon"):
    WHOLE["muon"] = lambda groups: optim.Muon(groups, lr=0.05)


class Model(nn.Module):
    """Odd sizes, a scalar, an empty and a never used parameter, and a layer that is used in some steps only."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(7, 13), nn.Linear(13, 11), nn.Linear(11, 3)
        self.convolution = nn.Conv2d(3, 5, 3)
        self.convolution.weight = nn.Parameter(self.convolution.weight.detach().to(memory_format=torch.channels_last))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 2))
        self.idle = nn.Parameter(torch.ones(17))
        self.sometimes = nn.Linear(3, 3, bias=False)
        self.to(dtype)

    def forward(self, inputs: Tensor, sometimes: bool) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(inputs))))
        outputs = self.scale * self.third(hidden)
        if sometimes:
            outputs = outputs + self.sometimes(outputs)
        image = hidden.reshape(-1)[: 3 * 3 * 3].reshape(1, 3, 3, 3)
        return outputs.square().mean() + self.convolution(image).square().mean()


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(10 * step + rank))
    return model(inputs.to(next(model.parameters()).dtype), step % 3 == 1)


def wrapped(comm: Communicator, bucket_mb: float = 2e-4, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(Model(), comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb, **options)


def one_group(module: nn.Module) -> Groups:
    return [{"params": list(module.parameters())}]


def several_groups(module: Any) -> Groups:
    """Options and orders of their own: the groups cut through buckets, and do not follow the module's order."""
    return [
        {"params": [module.third.weight, module.first.weight], "lr": 0.03},
        {"params": [module.first.bias, module.idle, module.sometimes.weight]},
        {"params": [module.scale, module.second.weight, module.convolution.weight], "weight_decay": 0.1},
        {"params": [module.empty, module.third.bias, module.second.bias, module.convolution.bias]},
    ]


def train(
    model: nn.Module,
    optimizer: optim.Optimizer,
    rank: int,
    steps: range,
    scheduler: optim.lr_scheduler.LRScheduler | None = None,
) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same_bits(module: nn.Module, expected: nn.Module) -> None:
    for name, wanted in expected.named_parameters():
        differing = int((module.get_parameter(name) != wanted).sum())
        assert differing == 0, f"{name}: {differing} of {wanted.numel()} elements differ"
