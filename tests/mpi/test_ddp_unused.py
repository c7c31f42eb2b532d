"""Parameters without a gradient: on all ranks, on some, in some of several accumulated passes."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator
from tests.mpi.replicas import Replicas, assert_same_gradients, gradient_of

LAYERS = 5
BUCKETS = [1e-6, 25.0]


class Branches(nn.Module):
    """The sum over the chosen layers, each used as often as it is named."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3, 2) for _ in range(LAYERS)).double()

    def forward(self, inputs: Tensor, chosen: list[int]) -> Tensor:
        outputs = [torch.tanh(self.layers[index](inputs)) for index in chosen]
        return torch.stack(outputs).sum(dim=0)


def loss_of(model: nn.Module, rank: int, chosen: list[int], step: int = 0) -> Tensor:
    """The loss of using the layers `chosen`, on inputs of this rank and step."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return model(torch.randn(4, 3, generator=generator, dtype=torch.float64), chosen).square().mean()


def wrapped(comm: Communicator, bucket_mb: float = 1e-6, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(Branches(), comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb, **options)


@pytest.mark.parametrize("bucket_mb", BUCKETS)
def test_a_parameter_unused_on_all_ranks_is_untouched(comm: Communicator, bucket_mb: float) -> None:
    ddp = wrapped(comm, bucket_mb)
    unused: Any = ddp.module.get_submodule("layers.1")
    kept = torch.full((2, 3), float(comm.rank + 1), dtype=torch.float64)
    unused.weight.grad = kept
    for step in range(3):
        loss_of(ddp, comm.rank, [0, 2, 3, 4], step).backward()
        assert unused.weight.grad is kept
        assert unused.bias.grad is None
    torch.testing.assert_close(kept, torch.full((2, 3), float(comm.rank + 1), dtype=torch.float64))


@pytest.mark.parametrize("bucket_mb", BUCKETS)
def test_a_parameter_used_on_one_rank_gets_the_average_on_all(comm: Communicator, bucket_mb: float) -> None:
    ddp, replicas = wrapped(comm, bucket_mb), Replicas(Branches, comm.size)

    def loss(model: nn.Module, rank: int, step: int) -> Tensor:
        return loss_of(model, rank, [0, (rank + step) % LAYERS], step)

    for step in range(4):
        ddp.zero_grad()
        replicas.zero_grad()
        loss(ddp, comm.rank, step).backward()
        replicas.backward(loss, step)
        assert_same_gradients(ddp.module, replicas.models[comm.rank])


def test_what_was_used_without_synchronisation_counts_as_used(comm: Communicator) -> None:
    ddp, replicas = wrapped(comm), Replicas(Branches, comm.size)

    def loss(model: nn.Module, rank: int, step: int) -> Tensor:
        return loss_of(model, rank, [0, 2] if step > 0 else [0, 1] if rank == 0 else [0], step)

    with ddp.no_sync():
        loss(ddp, comm.rank, 0).backward()
    replicas.backward(loss, 0, synchronised=False)
    loss(ddp, comm.rank, 1).backward()
    replicas.backward(loss, 1)
    assert gradient_of(replicas.models[comm.size - 1].get_parameter("layers.1.weight")).any()
    assert_same_gradients(ddp.module, replicas.models[comm.rank])

    # It counted once: used on no rank now, it stays what it is.
    before = gradient_of(ddp.module.get_parameter("layers.1.weight")).clone()
    loss_of(ddp, comm.rank, [0, 2], 2).backward()
    assert torch.equal(gradient_of(ddp.module.get_parameter("layers.1.weight")), before)


def test_a_rank_that_did_not_use_a_parameter_contributes_the_gradient_it_holds(comm: Communicator) -> None:
    """As torch's: without zero_grad, the average that is there already is averaged with the new gradients."""
    ddp, replicas = wrapped(comm), Replicas(Branches, comm.size)

    def loss(model: nn.Module, rank: int, step: int) -> Tensor:
        return loss_of(model, rank, [0, 1] if rank == 0 else [0], step)

    for step in range(3):
        loss(ddp, comm.rank, step).backward()
        replicas.backward(loss, step)
        assert_same_gradients(ddp.module, replicas.models[comm.rank])


def test_a_rank_without_samples_takes_part_with_what_it_holds(comm: Communicator) -> None:
    ddp, replicas = wrapped(comm), Replicas(Branches, comm.size)
    idle = comm.size - 1
    for step in range(3):
        ddp.zero_grad()
        replicas.zero_grad()
        for rank, model in enumerate(replicas.models):
            if rank != idle:
                loss_of(model, rank, [0, rank + 1], step).backward()
        replicas.average()
        if comm.rank == idle:
            ddp.reduce_without_backward()
        else:
            loss_of(ddp, comm.rank, [0, comm.rank + 1], step).backward()
        assert_same_gradients(ddp.module, replicas.models[comm.rank])


@pytest.mark.parametrize("same_order", [False, True])
@pytest.mark.parametrize("bucket_mb", BUCKETS)
def test_any_sequence_of_uses_on_any_rank(comm: Communicator, bucket_mb: float, same_order: bool) -> None:
    """Random layers in random order on every rank, random accumulation and clearing, against the replicas."""
    ddp, replicas = wrapped(comm, bucket_mb), Replicas(Branches, comm.size)
    common = random.Random(1)

    def loss(model: nn.Module, rank: int, step: int) -> Tensor:
        own = random.Random(f"{step} {rank}")
        chosen = own.sample(range(LAYERS), own.randint(1, LAYERS))
        return loss_of(model, rank, sorted(chosen) if same_order else chosen, step)

    for step in range(20):
        synchronised = common.random() < 0.6
        if synchronised:
            loss(ddp, comm.rank, step).backward()
        else:
            with ddp.no_sync():
                loss(ddp, comm.rank, step).backward()
        replicas.backward(loss, step, synchronised)
        assert_same_gradients(ddp.module, replicas.models[comm.rank])
        if synchronised and common.random() < 0.7:
            set_to_none = common.random() < 0.5
            ddp.zero_grad(set_to_none)
            replicas.zero_grad(set_to_none)


def test_torchs_own_wrapper_agrees(comm: Communicator, gloo: Any) -> None:
    ours = wrapped(comm)
    theirs = nn.parallel.DistributedDataParallel(Branches(), process_group=gloo, find_unused_parameters=True)
    for step in range(6):
        chosen = [0, 1 + (comm.rank + step) % (LAYERS - 2)]
        for ddp in (ours, theirs):
            if step % 3 == 1:
                with ddp.no_sync():
                    loss_of(ddp, comm.rank, chosen, step).backward()
            else:
                loss_of(ddp, comm.rank, chosen, step).backward()
        assert_same_gradients(ours.module, theirs.module)
        if step % 3 == 2:
            ours.zero_grad()
            theirs.zero_grad()


def test_unused_parameters_cost_no_collective_of_their_own(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone reduces nothing")
    sent = []
    for chosen in ([0, 1, 2, 3, 4], [0, 3]):
        ddp = wrapped(comm, 25.0)
        # Past the first two, after which the order of the buckets has been settled.
        for step in range(3):
            before = comm.traffic.bytes_sent or 0
            loss_of(ddp, comm.rank, chosen, step).backward()
        comm.barrier().wait()
        sent.append((comm.traffic.bytes_sent or 0) - before)
    assert sent[0] == sent[1]


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.forgotten = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, inputs: Tensor, everything: bool) -> Tensor:
        return (self.used(inputs) + (self.forgotten(inputs) if everything else 0)).sum()


def test_without_looking_for_unused_ones_they_raise_in_that_backward_by_name(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone behaves as the bare module")
    ddp: Any = DistributedDataParallel(Partly(), comm, bucket_mb=1e-6, first_bucket_mb=25, find_unused_parameters=False)
    with pytest.raises(RuntimeError, match=r"2 of 4 parameters got no gradient.*forgotten\.weight, forgotten\.bias"):
        ddp(torch.ones(2, 3), False).backward()
    # Caught on all ranks, it leaves nothing behind: the next pass first lets the reductions under way end.
    ddp.zero_grad()
    ddp(torch.ones(2, 3), True).backward()
    torch.testing.assert_close(gradient_of(ddp.module.used.weight), torch.full((1, 3), 2.0))
    torch.testing.assert_close(gradient_of(ddp.module.forgotten.weight), torch.full((1, 3), 2.0))
