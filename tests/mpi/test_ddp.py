"""DistributedDataParallel against a serial reference that sees all ranks' samples."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator, ReduceOp, Work
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.errors import MismatchError
from allreduce_sgd.topology import Topology
from tests.mpi.conftest import TIMEOUT_SECONDS


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def samples(rank: int, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def reference_gradients(comm: Communicator, counts: list[int] | None = None, seed: int = 0) -> list[Tensor]:
    """The gradients of the mean loss over the samples of all ranks."""
    counts = counts or [4] * comm.size
    parts = [samples(rank, count) for rank, count in enumerate(counts)]
    model = network(seed)
    loss_of(model, (torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))).backward()
    return [gradient_of(parameter) for parameter in model.parameters()]


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def assert_gradients(model: nn.Module, expected: list[Tensor]) -> None:
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(gradient_of(parameter), wanted)


BUCKETS = [1e-4, 3e-4, 25.0]


@pytest.mark.parametrize("bucket_mb", BUCKETS)
def test_gradients_are_the_average_over_ranks(comm: Communicator, bucket_mb: float) -> None:
    # Different seeds: the parameters must become those of rank 0.
    ddp = DistributedDataParallel(network(seed=comm.rank), comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb)
    for _ in range(3):
        ddp.zero_grad()
        loss_of(ddp, samples(comm.rank)).backward()
        assert_gradients(ddp, reference_gradients(comm))


@pytest.mark.parametrize("backend", ["gloo"])
def test_gradients_over_another_back_end(topology: Any, backend: str) -> None:
    from tests.mpi.conftest import connected

    comm = connected(topology, backend)
    ddp = DistributedDataParallel(network(), comm, bucket_mb=1e-4)
    loss_of(ddp, samples(comm.rank)).backward()
    assert_gradients(ddp, reference_gradients(comm))
    comm.close()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_in_both_forms(comm: Communicator, set_to_none: bool) -> None:
    ddp = DistributedDataParallel(network(), comm)
    for _ in range(3):
        ddp.zero_grad(set_to_none=set_to_none)
        loss_of(ddp, samples(comm.rank)).backward()
        assert_gradients(ddp, reference_gradients(comm))


def test_accumulation_without_synchronisation(comm: Communicator) -> None:
    ddp = DistributedDataParallel(network(), comm)
    sent = comm.traffic.bytes_sent
    for _ in range(2):
        ddp.zero_grad()
        with ddp.no_sync():
            loss_of(ddp, samples(comm.rank)).backward()
        assert comm.traffic.bytes_sent == sent
        loss_of(ddp, samples(comm.rank)).backward()
        assert_gradients(ddp, [2 * gradient for gradient in reference_gradients(comm)])
        sent = comm.traffic.bytes_sent


def test_weights_make_the_true_mean_of_unequal_shares_even_empty_ones(comm: Communicator) -> None:
    counts = [3 * rank for rank in range(comm.size)] if comm.size > 1 else [4]
    ddp = DistributedDataParallel(network(), comm, bucket_mb=1e-4)
    expected = reference_gradients(comm, counts)
    for _ in range(2):
        ddp.zero_grad()
        ddp.set_gradient_weight(counts[comm.rank] / sum(counts))
        if counts[comm.rank]:
            loss_of(ddp, samples(comm.rank, counts[comm.rank])).backward()
        else:
            ddp.reduce_without_backward()
        assert_gradients(ddp, expected)


def test_one_rank_alone_has_weight_one(comm: Communicator) -> None:
    if comm.size > 1:
        pytest.skip("one rank")
    with pytest.raises(ValueError, match="weight 1"):
        DistributedDataParallel(network(), comm).set_gradient_weight(0.5)


class Recording:
    """A communicator that tells when all-reduces are launched."""

    def __init__(self, comm: Communicator, events: list[str]) -> None:
        self._comm = comm
        self.events = events
        self.works: list[Work] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def all_reduce(self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        self.events.append(f"launch {len(self.works)}")
        work = self._comm.all_reduce(buffer, op)
        self.works.append(work)
        return work


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


def test_overlap_is_real_already_in_the_first_step(comm: Communicator) -> None:
    """Bucket 0 is launched, and even reduced, while the gradients of the first layer are still to come."""
    if comm.size == 1:
        pytest.skip("needs a second rank")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second(SlowBackward.apply(self.first(inputs)))

    recording = Recording(comm, [])
    SlowBackward.recording = recording
    wrapped: Any = recording
    ddp: Any = DistributedDataParallel(Model(), wrapped, bucket_mb=1e-5, first_bucket_mb=1e-5)
    last = ddp.module.first.weight
    last.register_hook(lambda gradient: recording.events.append("last gradient"))
    ddp(torch.randn(4, 5)).sum().backward()
    before = recording.events[: recording.events.index("last gradient")]
    assert "launch 0" in before
    assert "ended 0" in before
    launches = [event for event in recording.events if event.startswith("launch")]
    assert launches == [f"launch {index}" for index in range(len(launches))]
    assert len(launches) == 4


def test_launch_order_does_not_follow_arrival(comm: Communicator) -> None:
    """Ranks whose gradients arrive in different orders launch the same buckets, and get the right sums."""

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, inputs: Tensor, a_first: bool) -> Tensor:
            # Autograd runs the node created last first.
            if a_first:
                b, a = self.b(inputs), self.a(inputs)
            else:
                a, b = self.a(inputs), self.b(inputs)
            return (a + 2 * b).sum()

    torch.manual_seed(0)
    ddp: Any = DistributedDataParallel(TwoHeads(), comm, bucket_mb=1e-6, first_bucket_mb=1e-6)
    ddp(torch.full((1, 3), float(comm.rank)), comm.rank % 2 == 0).backward()
    mean = (comm.size - 1) / 2
    torch.testing.assert_close(gradient_of(ddp.module.a.weight), torch.full((2, 3), mean))
    torch.testing.assert_close(gradient_of(ddp.module.b.weight), torch.full((2, 3), 2 * mean))


def test_a_parameter_without_gradient_raises_in_that_backward_by_name(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone behaves as the bare module")

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.forgotten = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, inputs: Tensor, everything: bool) -> Tensor:
            return (self.used(inputs) + (self.forgotten(inputs) if everything else 0)).sum()

    ddp: Any = DistributedDataParallel(Partly(), comm, bucket_mb=1e-6, first_bucket_mb=25)
    with pytest.raises(RuntimeError, match=r"2 of 4 parameters got no gradient.*forgotten\.weight, forgotten\.bias"):
        ddp(torch.ones(2, 3), False).backward()
    # Caught on all ranks, it leaves nothing behind: the next pass first lets the reductions under way end.
    ddp.zero_grad()
    ddp(torch.ones(2, 3), True).backward()
    torch.testing.assert_close(gradient_of(ddp.module.used.weight), torch.full((1, 3), 2.0))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("shape", r"parameter '2\.weight' of shape \(4, 7\)"),
        ("dtype", "float32"),
        ("frozen", r"'0\.weight'.*frozen"),
        ("name", r"'0\.weight'.*'other\.weight'|'other\.weight'.*'0\.weight'"),
        ("missing", "nothing more"),
        ("buffer", "buffer 'extra'"),
    ],
)
def test_a_model_that_differs_is_named_with_the_ranks(comm: Communicator, change: str, text: str) -> None:
    if comm.size == 1:
        pytest.skip("needs a second rank")
    model = network()
    if comm.rank == comm.size - 1:
        match change:
            case "shape":
                model[2] = nn.Linear(7, 4).double()
            case "dtype":
                model.float()
            case "frozen":
                next(model.parameters()).requires_grad_(False)
            case "name":
                model = nn.Sequential()
                model.add_module("other", nn.Linear(5, 7).double())
            case "missing":
                model = network()[:1]
            case "buffer":
                model.register_buffer("extra", torch.zeros(2))
    with pytest.raises(MismatchError, match=text) as caught:
        DistributedDataParallel(model, comm)
    assert f"rank {comm.size - 1} has" in str(caught.value)


def test_buffers_follow_rank_0_or_stay(comm: Communicator) -> None:
    for broadcast in (True, False):
        model: Any = nn.BatchNorm1d(3)
        ddp = DistributedDataParallel(model, comm, broadcast_buffers=broadcast)
        ddp(torch.full((4, 3), float(comm.rank)) + torch.arange(4.0)[:, None])
        before_second = model.running_mean.clone()
        ddp(torch.zeros(4, 3))
        source = 0 if broadcast else comm.rank
        assert before_second[0] == pytest.approx(0.1 * (comm.rank + 1.5))
        assert model.running_mean[0] == pytest.approx(0.9 * 0.1 * (source + 1.5))


def test_mixed_dtypes_frozen_shared_and_channels_last_parameters(comm: Communicator) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4, bias=False)
            self.image = nn.Conv2d(2, 3, 3)
            self.image.weight = nn.Parameter(self.image.weight.to(memory_format=torch.channels_last))
            self.brief = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
            self.wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
            self.scalar = nn.Parameter(torch.tensor(2.0))
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

        def forward(self, scale: float) -> Tensor:
            image = torch.arange(50.0).view(1, 2, 5, 5).to(memory_format=torch.channels_last)
            twice = self.shared(self.shared(torch.ones(1, 4)))
            parts = [self.brief.float(), self.wide.float(), torch.view_as_real(self.phase), self.image(image), twice]
            return scale * self.scalar * sum(part.sum() for part in parts) + self.frozen.sum()

    torch.manual_seed(0)
    plain = Mixed()
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Mixed(), comm, bucket_mb=1e-4)
    ddp(float(comm.rank + 1)).backward()
    plain((comm.size + 1) / 2).backward()
    for name, parameter in ddp.module.named_parameters():
        expected = plain.get_parameter(name).grad
        if expected is None:
            assert parameter.grad is None
        else:
            tolerance = 0.02 if parameter.dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(parameter.grad, expected, rtol=tolerance, atol=1e-5)


def test_wrapping_again_after_the_first_wrapper_is_gone(comm: Communicator) -> None:
    model = network()
    for _ in range(3):
        ddp = DistributedDataParallel(model, comm)
        ddp.zero_grad()
        loss_of(ddp, samples(comm.rank)).backward()
        assert_gradients(ddp, reference_gradients(comm))
        del ddp


def test_a_rank_without_samples_follows_the_buffers_too(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs a second rank")
    model: Any = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    ddp = DistributedDataParallel(model, comm)
    for _ in range(2):
        ddp.zero_grad()
        ddp.set_gradient_weight(0.0 if comm.rank == comm.size - 1 else 1 / (comm.size - 1))
        if comm.rank == comm.size - 1:
            ddp.reduce_without_backward()
        else:
            ddp(torch.ones(4, 3)).sum().backward()
    torch.testing.assert_close(gradient_of(model[1].bias), torch.tensor([4.0]))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_double_backward_is_refused_clearly(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone behaves as the bare module")
    ddp = DistributedDataParallel(network(), comm)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        loss_of(ddp, samples(comm.rank)).backward(create_graph=True)


def test_nothing_to_train_is_refused(comm: Communicator) -> None:
    model = network()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        DistributedDataParallel(model, comm)


def test_state_dict_has_the_keys_of_torchs(comm: Communicator) -> None:
    assert list(DistributedDataParallel(network(), comm).state_dict()) == [
        f"module.{name}" for name in network().state_dict()
    ]


def test_bytes_of_a_step_are_those_of_the_ring(topology: Topology) -> None:
    options = CommunicationOptions("mpi", algorithm="ring", timeout_seconds=TIMEOUT_SECONDS)
    comm = connect(topology, torch.device("cpu"), options)
    ddp = DistributedDataParallel(network(), comm)
    gradient_bytes = 8 * sum(parameter.numel() for parameter in ddp.parameters())
    before = comm.traffic.bytes_sent or 0
    loss_of(ddp, samples(comm.rank)).backward()
    sent = torch.tensor(float((comm.traffic.bytes_sent or 0) - before))
    assert float(comm.all_reduce(sent).wait()) == 2 * (comm.size - 1) * gradient_bytes
    comm.close()
