"""Clipping by the global norm, and stopping at NaN and Inf."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.errors import NonFiniteError
from tests.mpi.replicas import Replicas, assert_same_gradients, assert_same_parameters, gradient_of, network, samples
from tests.mpi.test_ddp_parameters import Mixed
from tests.mpi.test_ddp_unused import Branches
from tests.mpi.test_ddp_unused import loss_of as branches_loss


def loss_of(model: nn.Module, rank: int, step: int = 0) -> Tensor:
    return model(samples(rank, step=step)[0]).square().mean()


def wrapped(module: nn.Module, comm: Communicator, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(module, comm, bucket_mb=1e-4, first_bucket_mb=1e-4, **options)


@pytest.mark.parametrize("untouched", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0, 0.5])
@pytest.mark.parametrize("max_norm", [1e-2, 1e6])
def test_the_norm_and_the_clipped_gradients_are_torchs(
    comm: Communicator, norm_type: float, max_norm: float, untouched: bool
) -> None:
    ddp, replicas = wrapped(network(), comm), Replicas(network, comm.size)
    reference = replicas.models[comm.rank]
    for step, synchronised in enumerate([True, True, False, True]):
        if synchronised:
            loss_of(ddp, comm.rank, step).backward()
        else:
            with ddp.no_sync():
                loss_of(ddp, comm.rank, step).backward()
        replicas.backward(loss_of, step, synchronised)
        if synchronised:
            norm = ddp.clip_grad_norm_(max_norm, norm_type, untouched=untouched)
            wanted = [clip_grad_norm_(model.parameters(), max_norm, norm_type) for model in replicas.models]
            torch.testing.assert_close(norm, wanted[comm.rank])
            assert_same_gradients(ddp.module, reference)
            ddp.zero_grad()
            replicas.zero_grad()


def test_norms_of_untouched_gradients_are_taken_in_flight(comm: Communicator) -> None:
    """The proof that they are: what is changed behind torch's back against the promise is not seen."""
    if comm.size == 1:
        pytest.skip("one rank alone has no buckets")
    ddp, replicas = wrapped(network(), comm), Replicas(network, comm.size)
    for step in range(3):
        loss_of(ddp, comm.rank, step).backward()
        replicas.backward(loss_of, step)
        wanted = clip_grad_norm_(replicas.models[comm.rank].parameters(), 1e6)
        if step == 2:
            for parameter in ddp.parameters():
                gradient_of(parameter).data.mul_(100)
        torch.testing.assert_close(ddp.clip_grad_norm_(1e6, untouched=True), wanted)
        ddp.zero_grad()
        replicas.zero_grad()


@pytest.mark.parametrize("untouched", [False, True])
def test_twice_in_a_row_and_without_clearing(comm: Communicator, untouched: bool) -> None:
    ddp, replicas = wrapped(network(), comm), Replicas(network, comm.size)
    for step in range(3):
        loss_of(ddp, comm.rank, step).backward()
        replicas.backward(loss_of, step)
        for max_norm in (0.05, 0.02):
            norm = ddp.clip_grad_norm_(max_norm, untouched=untouched)
            wanted = [clip_grad_norm_(model.parameters(), max_norm) for model in replicas.models]
            torch.testing.assert_close(norm, wanted[comm.rank])
            assert_same_gradients(ddp.module, replicas.models[comm.rank])


def test_gradients_that_were_changed_after_the_backward_pass(comm: Communicator) -> None:
    """A scaler divides by its scale, users add noise or remove gradients: the norm is that of what is there now."""
    ddp, replicas = wrapped(network(), comm), Replicas(network, comm.size)
    for step in range(3):
        loss_of(ddp, comm.rank, step).backward()
        replicas.backward(loss_of, step)
        with torch.no_grad():
            for model in [ddp.module, *replicas.models]:
                if step == 0:
                    for parameter in model.parameters():
                        gradient_of(parameter).data.mul_(0.125)
                elif step == 1:
                    model.get_parameter("0.weight").grad = None
                else:
                    model.get_parameter("2.bias").grad = torch.full((3,), 7.0, dtype=torch.float64)
        norm = ddp.clip_grad_norm_(0.01)
        wanted = [clip_grad_norm_(model.parameters(), 0.01) for model in replicas.models]
        torch.testing.assert_close(norm, wanted[comm.rank])
        assert_same_gradients(ddp.module, replicas.models[comm.rank])


def test_gradients_unscaled_by_torchs_scaler(comm: Communicator) -> None:
    ddp, replicas = wrapped(network().float(), comm), Replicas(lambda: network().float(), comm.size)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in replicas.models]

    def loss(model: nn.Module, rank: int, step: int) -> Tensor:
        return model(samples(rank, step=step)[0].float()).square().mean()

    for step in range(4):
        optimizer.zero_grad()
        replicas.zero_grad()
        scaler.scale(loss(ddp, comm.rank, step)).backward()
        scaler.unscale_(optimizer)
        norm = ddp.clip_grad_norm_(0.1)
        scaler.step(optimizer)
        scaler.update()
        replicas.backward(loss, step)
        for model, each in zip(replicas.models, optimizers, strict=True):
            wanted = clip_grad_norm_(model.parameters(), 0.1)
            each.step()
        torch.testing.assert_close(norm, wanted)
        assert_same_parameters(ddp.module, replicas.models[0])


def test_unused_parameters_count_with_what_they_hold(comm: Communicator) -> None:
    ddp, replicas = wrapped(Branches(), comm), Replicas(Branches, comm.size)

    def loss(model: nn.Module, rank: int, step: int) -> Tensor:
        return branches_loss(model, rank, [0, 1 + (rank + step) % 3], step)

    for step in range(3):
        loss(ddp, comm.rank, step).backward()
        replicas.backward(loss, step)
        norm = ddp.clip_grad_norm_(0.1)
        wanted = [clip_grad_norm_(model.parameters(), 0.1) for model in replicas.models]
        torch.testing.assert_close(norm, wanted[comm.rank])
        assert_same_gradients(ddp.module, replicas.models[comm.rank])


def test_parameters_of_several_dtypes(comm: Communicator) -> None:
    ddp, replicas = wrapped(Mixed(), comm), Replicas(Mixed, comm.size)
    ddp(float(comm.rank + 1)).backward()
    replicas.backward(lambda model, rank, step: model(float(rank + 1)))
    norm = ddp.clip_grad_norm_(1.0)
    squares = [
        gradient.detach().abs().double().square().sum()
        for parameter in replicas.models[0].parameters()
        if (gradient := parameter.grad) is not None
    ]
    assert float(norm) == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-3)
    clipped = [gradient_of(each).abs().double().square().sum() for each in ddp.parameters() if each.grad is not None]
    assert float(torch.stack(clipped).sum()) == pytest.approx(1.0, rel=1e-2)


def test_all_ranks_find_the_same_bits(comm: Communicator) -> None:
    ddp = wrapped(network(), comm)
    loss_of(ddp, comm.rank).backward()
    norm = ddp.clip_grad_norm_(0.01).detach().reshape(1).double()
    everyone = torch.zeros(comm.size, dtype=torch.float64)
    everyone[comm.rank] = norm
    comm.all_gather(everyone).wait()
    assert torch.equal(everyone, norm.expand(comm.size))


def test_without_any_gradient_the_norm_is_zero(comm: Communicator) -> None:
    assert float(wrapped(network(), comm).clip_grad_norm_(1.0)) == 0.0


class Poisoned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))

    def forward(self, inputs: Tensor, bad: dict[int, float]) -> Tensor:
        """Add the weights of some layers times a bad number, which then is in their gradients alone."""
        total = self.layers(inputs).square().mean()
        for index, factor in bad.items():
            total = total + factor * self.get_parameter(f"layers.{index}.weight").sum()
        return total


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bucket_mb", [1e-6, 25.0])
def test_bad_gradients_stop_all_ranks_with_names(comm: Communicator, value: float, bucket_mb: float) -> None:
    ddp = DistributedDataParallel(Poisoned(), comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb, check_finite=True)
    guilty = comm.size - 1
    for bad_step in range(3):
        ddp(torch.ones(2, 3), {}).backward()
        ddp.zero_grad()
        bad = {bad_step: value} if comm.rank == guilty else {}
        with pytest.raises(NonFiniteError, match=rf"layers\.{bad_step}\.weight") as caught:
            ddp(torch.ones(2, 3), bad).backward()
        assert f"rank {guilty}" in str(caught.value)
        assert all(f"rank {rank}" not in str(caught.value) for rank in range(guilty))
        assert all(f"layers.{other}." not in str(caught.value) for other in range(4) if other != bad_step)
        ddp.zero_grad()


def test_bad_gradients_of_several_ranks_are_all_named(comm: Communicator) -> None:
    ddp = DistributedDataParallel(Poisoned(), comm, bucket_mb=1e-6, first_bucket_mb=1e-6, check_finite=True)
    with pytest.raises(NonFiniteError) as caught:
        ddp(torch.ones(2, 3), {comm.rank % 4: math.nan}).backward()
    for rank in range(comm.size):
        assert f"rank {rank}: layers.{rank % 4}.weight" in str(caught.value)


def test_finite_gradients_pass_the_check_unchanged(comm: Communicator) -> None:
    ddp, replicas = wrapped(network(), comm, check_finite=True), Replicas(network, comm.size)
    for step in range(3):
        with ddp.no_sync():
            loss_of(ddp, comm.rank, 50 + step).backward()
        loss_of(ddp, comm.rank, step).backward()
        replicas.backward(loss_of, 50 + step, synchronised=False)
        replicas.backward(loss_of, step)
        assert_same_gradients(ddp.module, replicas.models[comm.rank])
        ddp.zero_grad()
        replicas.zero_grad()


def test_a_large_finite_gradient_is_no_bad_one(comm: Communicator) -> None:
    """The square of 1e30 is past the range of float32."""
    ddp: Any = DistributedDataParallel(nn.Linear(3, 1, bias=False), comm, check_finite=True)
    ddp(torch.full((1, 3), 1e30)).sum().backward()
    torch.testing.assert_close(ddp.module.weight.grad, torch.full((1, 3), 1e30))
