"""When buckets are launched, and in which order."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator, ReduceOp, Work
from allreduce_sgd.comm.objects import all_gather_object
from tests.mpi.replicas import Replicas, assert_same_gradients

WIDTHS = (3, 5, 7, 11)
"""Every layer has a weight of its own size, so that launches tell which bucket they are of."""


class Recording:
    """A communicator that tells when all-reduces are launched, and of how many elements."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.events: list[str] = []
        self.works: list[Work] = []
        self.numels: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def all_reduce(self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM, **options: bool) -> Work:
        self.events.append(f"launch {len(self.works)}")
        self.numels.append(buffer.numel())
        work = self._comm.all_reduce(buffer, op, **options)
        self.works.append(work)
        return work


class Layers(nn.Module):
    """Independent layers: autograd reaches first the one that was used last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(100 * width, 1, bias=False) for width in WIDTHS).double()

    def forward(self, order: list[int], scale: float) -> Tensor:
        parts = [
            self.layers[index](torch.full((1, 100 * WIDTHS[index]), scale * (index + 1)).double()) for index in order
        ]
        return torch.stack([part.sum() for part in parts]).square().sum()


ORDERS = [[1, 3, 0, 2], [0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]]


def test_the_order_is_that_of_rank_0s_first_pass_on_all_ranks(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone reduces nothing")
    recording = Recording(comm)
    wrapped: Any = recording
    ddp = DistributedDataParallel(Layers(), wrapped, bucket_mb=1e-6, first_bucket_mb=1e-6)
    replicas = Replicas(Layers, comm.size)
    arrived: list[int] = []
    for index in range(len(WIDTHS)):
        weight = ddp.module.get_parameter(f"layers.{index}.weight")
        weight.register_hook(lambda _, index=index: arrived.append(index))
    first: list[int] = []

    def loss(model: nn.Module, rank: int, step: int) -> Tensor:
        return model(ORDERS[(rank + step) % 4], 0.01 * (rank + 1))

    for step in range(4):
        del recording.numels[:]
        loss(ddp, comm.rank, step).backward()
        replicas.backward(loss, step)
        assert_same_gradients(ddp.module, replicas.models[comm.rank])
        ddp.zero_grad()
        replicas.zero_grad()
        if step == 0:
            first = all_gather_object(comm, arrived)[0]
            assert first == ORDERS[0][::-1]
        else:
            # Flags and padding add a few elements.
            assert [numel // 100 for numel in recording.numels] == [WIDTHS[index] for index in first]
            assert ddp.bucket_order() == first


def test_an_order_that_is_set_is_used_at_once_and_stays(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone reduces nothing")
    recording = Recording(comm)
    wrapped: Any = recording
    ddp = DistributedDataParallel(Layers(), wrapped, bucket_mb=1e-6, first_bucket_mb=1e-6)
    ddp.set_bucket_order([2, 0, 1, 3])
    for step in range(3):
        del recording.numels[:]
        ddp(ORDERS[step], 0.01).backward()
        assert [numel // 100 for numel in recording.numels] == [WIDTHS[index] for index in (2, 0, 1, 3)]
        assert ddp.bucket_order() == [2, 0, 1, 3]


def test_the_order_kept_in_a_checkpoint_gives_the_same_bits(comm: Communicator) -> None:
    """The order in which a sum is formed depends on where in a bucket a gradient lies."""

    def gradients(ddp: DistributedDataParallel) -> list[Tensor]:
        ddp.zero_grad()
        ddp(ORDERS[comm.rank % 4], 0.1 * (comm.rank + 1)).backward()
        return [parameter.grad.clone() for parameter in ddp.parameters() if parameter.grad is not None]

    first = DistributedDataParallel(Layers(), comm, bucket_mb=0.01)
    for _ in range(3):
        wanted = gradients(first)
    second = DistributedDataParallel(Layers(), comm, bucket_mb=0.01)
    second.set_bucket_order(first.bucket_order())
    for mine, theirs in zip(gradients(second), wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4]])
def test_an_order_of_other_parameters_is_refused(comm: Communicator, order: list[int]) -> None:
    ddp = DistributedDataParallel(Layers(), comm)
    if comm.size > 1:
        with pytest.raises(ValueError, match="order"):
            ddp.set_bucket_order(order)


class SlowBackward(torch.autograd.Function):
    """The identity, whose backward takes a while and then tells which reductions have ended meanwhile."""

    recording: Recording

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        time.sleep(0.3)
        SlowBackward.recording.events += [
            f"ended {index}" for index, work in enumerate(SlowBackward.recording.works) if work.done()
        ]
        return gradient


class TwoLayers(nn.Module):
    """`reverse` uses the layer that was registered first last, so that the buckets' first guess is wrong."""

    def __init__(self, reverse: bool) -> None:
        super().__init__()
        self.reverse = reverse
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        near, far = (self.second, self.first) if self.reverse else (self.first, self.second)
        return far(SlowBackward.apply(near(inputs)))


@pytest.mark.parametrize(
    ("reverse", "static_graph", "steps"), [(False, False, 1), (False, False, 3), (True, False, 3), (True, True, 3)]
)
def test_overlap_is_real_already_in_the_first_step(
    comm: Communicator, reverse: bool, static_graph: bool, steps: int
) -> None:
    """Bucket 0 is launched, and even reduced, while the gradients of the other layer are still to come.

    Where parameters are not used in the order in which they were registered, or the first pass is there to learn the
    graph, that is so from the second step on.
    """
    if comm.size == 1:
        pytest.skip("needs a second rank")
    recording = Recording(comm)
    SlowBackward.recording = recording
    wrapped: Any = recording
    ddp: Any = DistributedDataParallel(
        TwoLayers(reverse), wrapped, bucket_mb=1e-5, first_bucket_mb=1e-5, static_graph=static_graph
    )
    last = ddp.module.second.weight if reverse else ddp.module.first.weight
    last.register_hook(lambda gradient: recording.events.append("last gradient"))
    for _ in range(steps):
        del recording.events[:], recording.works[:]
        ddp(torch.randn(4, 5)).sum().backward()
    before = recording.events[: recording.events.index("last gradient")]
    assert "launch 0" in before
    assert "ended 0" in before
    launches = [event for event in recording.events if event.startswith("launch")]
    assert launches == [f"launch {index}" for index in range(len(launches))]
    assert len(launches) == 4


class Idle(nn.Module):
    """One parameter is never used, and something is left to do after the gradients of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(5, 5), nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(SlowBackward.apply(inputs))


@pytest.mark.parametrize("static_graph", [False, True])
def test_a_static_graph_does_not_wait_for_what_never_comes(comm: Communicator, static_graph: bool) -> None:
    """A bucket with a parameter that may still come is launched at the end of the pass, as late as can be."""
    if comm.size == 1:
        pytest.skip("needs a second rank")
    recording = Recording(comm)
    SlowBackward.recording = recording
    wrapped: Any = recording
    ddp = DistributedDataParallel(Idle(), wrapped, static_graph=static_graph)
    for step in range(3):
        del recording.events[:], recording.works[:]
        inputs = torch.randn(4, 5, requires_grad=True)
        inputs.register_hook(lambda gradient: recording.events.append("gradient of the inputs"))
        ddp(inputs).sum().backward()
        early = recording.events.index("launch 0") < recording.events.index("gradient of the inputs")
        assert early is (static_graph and step > 0)


def test_launch_order_does_not_follow_arrival(comm: Communicator) -> None:
    """Ranks whose gradients arrive in different orders launch the same buckets, and get the right sums."""
    ddp = DistributedDataParallel(Layers(), comm, bucket_mb=1e-6, first_bucket_mb=1e-6)
    replicas = Replicas(Layers, comm.size)
    for _ in range(2):
        ddp(ORDERS[comm.rank % 4], float(comm.rank)).backward()
        replicas.backward(lambda model, rank, step: model(ORDERS[rank % 4], float(rank)))
        assert_same_gradients(ddp.module, replicas.models[comm.rank])


@pytest.mark.parametrize(("bucket_mb", "buckets"), [(1e-6, 4), (0.0085, 2), (25.0, 1)])
def test_the_sizes_of_buckets(comm: Communicator, bucket_mb: float, buckets: int) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone reduces nothing")
    ddp = DistributedDataParallel(Layers(), comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb)
    sizes = ddp.bucket_bytes()
    assert len(sizes) == buckets
    gradient_bytes = 8 * 100 * sum(WIDTHS)
    assert gradient_bytes <= sum(sizes) <= gradient_bytes + 64 * (buckets + len(WIDTHS))
