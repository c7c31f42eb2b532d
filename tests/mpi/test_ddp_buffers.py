"""Buffers: those of rank 0, their average, or every rank's own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator


class Statistics(nn.Module):
    """A running sum of the inputs in a float buffer, a count of rank + 1 per pass in an integer one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.sums: Tensor
        self.count: Tensor
        self.register_buffer("sums", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, value: float) -> Tensor:
        if self.training:
            self.sums.add_(value)
            self.count.add_(int(value))
        return (self.weight * self.sums).sum()


MODES: dict[str, dict[str, bool]] = {
    "broadcast": {},
    "average": {"average_buffers": True},
    "leave": {"broadcast_buffers": False},
}


def wrapped(comm: Communicator, mode: str) -> tuple[DistributedDataParallel, Any]:
    ddp = DistributedDataParallel(Statistics(), comm, **MODES[mode])  # type: ignore[arg-type]
    return ddp, ddp.module


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_starts_from_the_buffers_of_its_mode(comm: Communicator, mode: str) -> None:
    """Rank r adds r + 1 in each pass: before pass k + 1 there is (r + 1) k, of rank 0, on average, or its own."""
    ddp, module = wrapped(comm, mode)
    own = float(comm.rank + 1)
    start = {"broadcast": 1.0, "average": (comm.size + 1) / 2, "leave": own}[mode]
    whole = comm.rank + 1 if mode == "leave" else 1
    for step in range(3):
        ddp(own).backward()
        torch.testing.assert_close(module.sums, torch.full((3,), start * step + own))
        assert int(module.count) == whole * step + comm.rank + 1


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_and_accumulation_leave_buffers_alone(comm: Communicator, mode: str) -> None:
    ddp, module = wrapped(comm, mode)
    own = float(comm.rank + 1)
    ddp(own).backward()
    ddp.eval()
    with torch.no_grad():
        ddp(own)
    ddp.train()
    with ddp.no_sync():
        ddp(own).backward()
    torch.testing.assert_close(module.sums, torch.full((3,), 2 * own))


def test_a_buffer_replaced_or_added_later_is_followed(comm: Communicator) -> None:
    ddp, module = wrapped(comm, "broadcast")
    ddp(1.0).backward()
    module.sums = torch.full((3,), 10.0 * (comm.rank + 1))
    module.register_buffer("late", torch.full((2,), float(comm.rank + 5)))
    ddp(1.0).backward()
    torch.testing.assert_close(module.sums, torch.full((3,), 11.0))
    torch.testing.assert_close(module.late, torch.full((2,), 5.0))


def test_both_broadcast_and_average_cannot_be_meant_silently(comm: Communicator) -> None:
    """`average_buffers` wins over the default of `broadcast_buffers`, in whatever way both are given."""
    ddp = DistributedDataParallel(Statistics(), comm, broadcast_buffers=True, average_buffers=True)
    module: Any = ddp.module
    for step in range(2):
        ddp(float(comm.rank + 1)).backward()
        torch.testing.assert_close(module.sums, torch.full((3,), (comm.size + 1) / 2 * step + comm.rank + 1))


def test_batch_normalisation_averaged_is_the_mean_of_the_ranks_statistics(comm: Communicator) -> None:
    ddp = DistributedDataParallel(nn.BatchNorm1d(3), comm, average_buffers=True)
    norm: Any = ddp.module
    everyone = [torch.randn(6, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(comm.size)]
    ddp(everyone[comm.rank]).sum().backward()
    ddp(torch.zeros(6, 3)).sum().backward()
    means = torch.stack([0.1 * part.mean(dim=0) for part in everyone]).mean(dim=0)
    variances = torch.stack([0.9 + 0.1 * part.var(dim=0) for part in everyone]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, 0.9 * means)
    torch.testing.assert_close(norm.running_var, 0.9 * variances)
    assert int(norm.num_batches_tracked) == 2
