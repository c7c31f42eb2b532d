"""Uneven inputs: `join` against torch's own, and `weight_by_samples` against one big batch."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.replicate import common_sha256
from tests.mpi.replicas import Replicas, assert_same_parameters, network, samples


def steps_of(rank: int) -> int:
    """Rank 0 has the fewest batches; the ranks after rank 1 as many as it, so that two end together."""
    return 2 + 3 * min(rank, 1)


def loss_of(model: nn.Module, rank: int, step: int, count: int = 4) -> Tensor:
    inputs, classes = samples(rank, count, step)
    return functional.cross_entropy(model(inputs), classes)


def wrapped(module: nn.Module, comm: Communicator, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(module, comm, bucket_mb=1e-4, first_bucket_mb=1e-4, **options)


def train(ddp: Any, rank: int, steps: int, accumulate: bool = False) -> None:
    """Train with momentum; with `accumulate`, gradients of two batches make a step."""
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.3, momentum=0.9)
    for step in range(steps):
        waits = accumulate and step % 2 == 0
        with ddp.no_sync() if waits else nullcontext():
            loss_of(ddp, rank, step).backward()
        if not waits:
            optimizer.step()
            optimizer.zero_grad()


def with_statistics() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("divide_by_initial_world_size", [True, False])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("make", [network, with_statistics])
def test_the_final_model_is_that_of_torchs_join(
    comm: Communicator, gloo: Any, divide_by_initial_world_size: bool, accumulate: bool, make: Any
) -> None:
    ours, theirs = wrapped(make(), comm), nn.parallel.DistributedDataParallel(make(), process_group=gloo)
    for ddp in (ours, theirs):
        with ddp.join(divide_by_initial_world_size=divide_by_initial_world_size):
            train(ddp, comm.rank, steps_of(comm.rank), accumulate)
    assert_same_parameters(ours.module, theirs.module)
    common_sha256(ours.module, comm)
    with pytest.raises(AssertionError):
        assert_same_parameters(ours.module, make())


@pytest.mark.parametrize("divide_by_initial_world_size", [True, False])
def test_the_final_model_is_that_of_the_replicas(comm: Communicator, divide_by_initial_world_size: bool) -> None:
    ddp, replicas = wrapped(network(), comm), Replicas(network, comm.size)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9) for model in replicas.models]
    last = max(steps_of(rank) for rank in range(comm.size))
    for step in range(last):
        active = [rank for rank in range(comm.size) if step < steps_of(rank)]
        for rank in active:
            loss_of(replicas.models[rank], rank, step).backward()
        share = 1 / (comm.size if divide_by_initial_world_size else len(active))
        replicas.average([share if rank in active else 0.0 for rank in range(comm.size)])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with ddp.join(divide_by_initial_world_size=divide_by_initial_world_size):
        train(ddp, comm.rank, steps_of(comm.rank))
    assert_same_parameters(ddp.module, replicas.models[0])


def test_averaged_buffers_are_those_of_the_ranks_that_still_have_input(comm: Communicator) -> None:
    """Each batch is constant, so that running means follow by hand."""
    momentum, value = 0.5, 1.0 + comm.rank
    ddp = wrapped(nn.Sequential(nn.BatchNorm1d(1, momentum=momentum), nn.Linear(1, 1)), comm, average_buffers=True)
    means = [0.0] * comm.size
    with ddp.join():
        for _ in range(steps_of(comm.rank)):
            ddp(torch.full((2, 1), value)).sum().backward()
    for step in range(max(steps_of(rank) for rank in range(comm.size))):
        active = [rank for rank in range(comm.size) if step < steps_of(rank)]
        start = sum(means[rank] for rank in active) / len(active)
        for rank in active:
            means[rank] = (1 - momentum) * start + momentum * (1.0 + rank)
    # At the end all take the model of the highest of those that ended last.
    torch.testing.assert_close(ddp.module.get_buffer("0.running_mean"), torch.tensor([means[-1]]))


def counts(rank: int) -> list[int]:
    """The sizes of a rank's batches: they differ between ranks and steps, and so does their number."""
    return [1 + (rank + 2 * step) % 5 for step in range(steps_of(rank))]


def big_batches(size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(max(steps_of(rank) for rank in range(size))):
        parts = [samples(rank, counts(rank)[step], step) for rank in range(size) if step < steps_of(rank)]
        yield torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def test_weighted_by_samples_it_is_one_big_batch(comm: Communicator) -> None:
    serial = network()
    optimizer = torch.optim.SGD(serial.parameters(), lr=0.3, momentum=0.9)
    for inputs, classes in big_batches(comm.size):
        optimizer.zero_grad()
        functional.cross_entropy(serial(inputs), classes).backward()
        optimizer.step()

    ddp = wrapped(network(), comm)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.3, momentum=0.9)
    with ddp.join(weight_by_samples=True):
        for step, count in enumerate(counts(comm.rank)):
            optimizer.zero_grad()
            ddp.set_samples(count)
            loss_of(ddp, comm.rank, step, count).backward()
            optimizer.step()
    assert_same_parameters(ddp.module, serial)
    common_sha256(ddp.module, comm)


def test_samples_weigh_one_pass_without_join(comm: Communicator) -> None:
    """`set_samples` counts for the next synchronised pass alone; a rank with none contributes zeros."""
    ddp, replicas = wrapped(network(), comm), Replicas(network, comm.size)
    numbers = [3 * rank for rank in range(comm.size)] if comm.size > 1 else [4]
    for step in range(4):
        ddp.zero_grad()
        replicas.zero_grad()
        weights = None
        if step % 2 == 0:
            weights = [number / sum(numbers) for number in numbers]
            ddp.set_samples(numbers[comm.rank])
        for rank, model in enumerate(replicas.models):
            if numbers[rank]:
                loss_of(model, rank, step, numbers[rank]).backward()
        replicas.average(weights)
        if numbers[comm.rank]:
            loss_of(ddp, comm.rank, step, numbers[comm.rank]).backward()
        else:
            ddp.reduce_without_backward()
        for parameter, wanted in zip(ddp.parameters(), replicas.models[comm.rank].parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, wanted.grad)


def test_all_ranks_raise_when_one_runs_out_if_asked_to(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs a second rank")
    ddp = wrapped(network(), comm)
    done = 0

    def loop() -> None:
        nonlocal done
        with ddp.join(throw_on_early_termination=True):
            for step in range(steps_of(comm.rank)):
                loss_of(ddp, comm.rank, step).backward()
                done += 1

    with pytest.raises(RuntimeError, match="rank 0 ran out of input"):
        loop()
    assert done == steps_of(0)
    # Afterwards the wrapper works as if nothing had happened.
    replicas = Replicas(network, comm.size)
    ddp.zero_grad()
    loss_of(ddp, comm.rank, 9).backward()
    replicas.backward(loss_of, 9)
    for parameter, wanted in zip(ddp.parameters(), replicas.models[comm.rank].parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad)


@pytest.mark.parametrize("enable", [True, False])
def test_even_inputs_are_not_disturbed(comm: Communicator, enable: bool) -> None:
    joined, plain = wrapped(network(), comm), wrapped(network(), comm)
    for _ in range(2):
        with joined.join(enable=enable):
            train(joined, comm.rank, 3)
        train(plain, comm.rank, 3)
    assert_same_parameters(joined.module, plain.module)


def test_an_exception_inside_is_not_replaced_by_waiting(comm: Communicator) -> None:
    ddp = wrapped(network(), comm)

    def loop() -> None:
        with ddp.join():
            loss_of(ddp, comm.rank, 0).backward()
            raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        loop()
    ddp.zero_grad()
    loss_of(ddp, comm.rank, 1).backward()


def test_ranks_join_before_the_first_step(comm: Communicator) -> None:
    """A rank without any batch takes part from the start, and knows nothing of the order of arrival."""
    ddp, replicas = wrapped(network(), comm), Replicas(network, comm.size)
    last = comm.size - 1
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9) for model in replicas.models]
    for step in range(3):
        for rank, model in enumerate(replicas.models):
            if rank != last or comm.size == 1:
                loss_of(model, rank, step).backward()
        replicas.average()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with ddp.join():
        train(ddp, comm.rank, 0 if comm.rank == last and comm.size > 1 else 3)
    assert_same_parameters(ddp.module, replicas.models[0])
