"""Communication hooks: torch's own, over a Gloo process group, and those that return our Work."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator
from tests.mpi.replicas import Replicas, assert_same_gradients, assert_same_parameters, gradient_of


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(model: nn.Module, rank: int, step: int = 0) -> Tensor:
    return model(torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + rank))).square().mean()


def wrapped(comm: Communicator, bucket_mb: float = 1e-4, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(network(), comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb, **options)


def compare(ddp: DistributedDataParallel, comm: Communicator, rtol: float | None, atol: float | None) -> None:
    replicas = Replicas(network, comm.size)
    for step in range(4):
        loss_of(ddp, comm.rank, step).backward()
        replicas.backward(loss_of, step)
        assert_same_gradients(ddp.module, replicas.models[comm.rank], rtol, atol)
        ddp.zero_grad()
        replicas.zero_grad()


def bfloat16_works(group: Any) -> bool:
    try:
        torch.distributed.all_reduce(torch.ones(1, dtype=torch.bfloat16), group=group)
    except RuntimeError:
        return False
    return True


HOOKS = {
    "allreduce": (default_hooks.allreduce_hook, None),
    "fp16": (default_hooks.fp16_compress_hook, 2e-3),
    "bf16": (default_hooks.bf16_compress_hook, 2e-2),
    "fp16_wrapper": (default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook), 2e-3),
}


@pytest.mark.parametrize("name", HOOKS)
def test_torchs_default_hooks(comm: Communicator, gloo: Any, name: str) -> None:
    hook, tolerance = HOOKS[name]
    if name == "bf16" and not bfloat16_works(gloo):
        pytest.skip("this Gloo does not reduce bfloat16")
    ddp = wrapped(comm)
    ddp.register_comm_hook(gloo, hook)
    compare(ddp, comm, tolerance, tolerance)


@pytest.mark.parametrize("bucket_mb", [1e-4, 25.0])
def test_a_hook_that_returns_our_work_equals_the_plain_path(comm: Communicator, bucket_mb: float) -> None:
    """Divided first, and summed by the same all-reduce over the same buckets."""

    def hook(state: Communicator, bucket: Any) -> Any:
        return state.all_reduce(bucket.buffer().div_(state.size))

    hooked, plain = wrapped(comm, bucket_mb), wrapped(comm, bucket_mb)
    hooked.register_comm_hook(comm, hook)
    for step in range(4):
        for ddp in (hooked, plain):
            loss_of(ddp, comm.rank, step).backward()
        assert_same_gradients(hooked.module, plain.module, rtol=1e-6, atol=1e-7)
        for ddp in (hooked, plain):
            ddp.zero_grad()
    compare(hooked, comm, None, None)


class Seen:
    """A hook that keeps what it was shown, and returns a finished future of the buffer it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool, list[Tensor], list[int], int]] = []

    def __call__(self, state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        gradients = [gradient.clone() for gradient in bucket.gradients()]
        sizes = [parameter.numel() for parameter in bucket.parameters()]
        self.calls.append((bucket.index(), bucket.is_last(), gradients, sizes, bucket.buffer().numel()))
        assert [gradient.shape for gradient in bucket.gradients()] == [each.shape for each in bucket.parameters()]
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer() * 3)
        return future


def test_a_hook_sees_undivided_gradients_and_its_result_is_taken_as_it_is(comm: Communicator) -> None:
    ddp, bare, seen = wrapped(comm), network(), Seen()
    ddp.register_comm_hook(None, seen)
    loss_of(ddp, comm.rank).backward()
    loss_of(bare, comm.rank).backward()
    for parameter, own in zip(ddp.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(gradient_of(parameter), 3 * gradient_of(own))
    assert [call[0] for call in seen.calls] == list(range(len(seen.calls)))
    assert [call[1] for call in seen.calls] == [False] * (len(seen.calls) - 1) + [True]
    assert len(seen.calls) == len(ddp.bucket_bytes()) > 1
    shown = sorted((gradient for call in seen.calls for gradient in call[2]), key=lambda each: float(each.sum()))
    wanted_all = sorted((gradient_of(each) for each in bare.parameters()), key=lambda each: float(each.sum()))
    for gradient, wanted in zip(shown, wanted_all, strict=True):
        torch.testing.assert_close(gradient, wanted)
    assert all(sum(sizes) == numel for *_, sizes, numel in seen.calls)


def test_a_hook_is_not_called_while_gradients_accumulate(comm: Communicator) -> None:
    ddp, bare, seen = wrapped(comm), network(), Seen()
    ddp.register_comm_hook(None, seen)
    with ddp.no_sync():
        loss_of(ddp, comm.rank, 0).backward()
    assert not seen.calls
    loss_of(ddp, comm.rank, 1).backward()
    for step in range(2):
        loss_of(bare, comm.rank, step).backward()
    for parameter, wanted in zip(ddp.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(gradient_of(parameter), 3 * gradient_of(wanted))


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(6, 1) for _ in range(4))

    def forward(self, inputs: Tensor, chosen: list[int]) -> Tensor:
        return torch.stack([self.parts[index](inputs) for index in chosen]).square().sum()


def test_unused_parameters_with_a_hook(comm: Communicator, gloo: Any) -> None:
    """Unused on all ranks: untouched; used on one: its share of the average."""
    ddp = DistributedDataParallel(Partly(), comm, bucket_mb=1e-6, first_bucket_mb=1e-6)
    ddp.register_comm_hook(gloo, default_hooks.allreduce_hook)
    replicas = Replicas(Partly, comm.size)

    def loss(model: nn.Module, rank: int, step: int) -> Tensor:
        inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        return model(inputs, [0, 1] if rank == 0 else [0, 2])

    for step in range(3):
        loss(ddp, comm.rank, step).backward()
        replicas.backward(loss, step)
        assert_same_gradients(ddp.module, replicas.models[comm.rank])
        ddp.zero_grad()
        replicas.zero_grad()


def one_matrix() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(20, 15, bias=False)


def test_torchs_powersgd_gives_what_it_gives_under_torchs_wrapper(comm: Communicator, gloo: Any) -> None:
    """One matrix, so that the order within a bucket cannot matter; uncompressed at first, then rank 2."""
    ours = DistributedDataParallel(one_matrix(), comm)
    theirs = nn.parallel.DistributedDataParallel(one_matrix(), process_group=gloo)
    both: list[Any] = [ours, theirs]
    for ddp in both:
        state = powerSGD_hook.PowerSGDState(
            gloo, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=0.5
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizers = [torch.optim.SGD(ddp.parameters(), lr=0.1) for ddp in both]
    target = torch.randn(15, 20, generator=torch.Generator().manual_seed(5))
    for step in range(6):
        inputs = torch.randn(8, 20, generator=torch.Generator().manual_seed(10 * step + comm.rank))
        for ddp, optimizer in zip(both, optimizers, strict=True):
            optimizer.zero_grad()
            (ddp(inputs) - inputs @ target.t()).square().mean().backward()
            optimizer.step()
        assert_same_parameters(ours.module, theirs.module)
    assert torch.linalg.matrix_rank(gradient_of(ours.module.get_parameter("weight")), atol=1e-6) < 15


def test_torchs_powersgd_lowers_the_loss(comm: Communicator, gloo: Any) -> None:
    """One bucket: its later collectives are started in callbacks, whose order over Gloo is anyone's guess."""
    ddp = wrapped(comm, 25.0)
    state = powerSGD_hook.PowerSGDState(gloo, start_powerSGD_iter=2, min_compression_rate=0.5)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(ddp, comm.rank)
        loss.backward()
        optimizer.step()
        losses.append(float(comm.all_reduce(loss.detach().clone()).wait()))
    assert losses[-1] < 0.5 * losses[0]


def test_an_exception_in_a_hook_reaches_the_caller(comm: Communicator) -> None:

    def hook(state: Any, bucket: Any) -> Any:
        raise KeyError("of the hook")

    ddp = wrapped(comm)
    ddp.register_comm_hook(None, hook)
    with pytest.raises(KeyError, match="of the hook"):
        loss_of(ddp, comm.rank).backward()


def test_a_second_hook_is_refused(comm: Communicator) -> None:
    ddp = wrapped(comm)
    ddp.register_comm_hook(None, Seen())
    with pytest.raises(RuntimeError, match="a hook already"):
        ddp.register_comm_hook(None, Seen())
