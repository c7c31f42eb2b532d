"""DistributedDataParallel against a serial reference that sees all ranks' samples; the rest is in test_ddp_*.py."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.errors import MismatchError
from allreduce_sgd.topology import Topology
from tests.mpi.conftest import TIMEOUT_SECONDS, connected
from tests.mpi.replicas import gradient_of, network, samples


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def reference_gradients(comm: Communicator, counts: list[int] | None = None, seed: int = 0) -> list[Tensor]:
    """The gradients of the mean loss over the samples of all ranks."""
    counts = counts or [4] * comm.size
    parts = [samples(rank, count) for rank, count in enumerate(counts)]
    model = network(seed)
    loss_of(model, (torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))).backward()
    return [gradient_of(parameter) for parameter in model.parameters()]


def assert_gradients(model: nn.Module, expected: list[Tensor]) -> None:
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(gradient_of(parameter), wanted)


@pytest.mark.parametrize("bucket_mb", [1e-4, 3e-4, 25.0])
def test_gradients_are_those_of_one_big_batch(comm: Communicator, bucket_mb: float) -> None:
    # Different seeds: the parameters must become those of rank 0.
    ddp = DistributedDataParallel(network(seed=comm.rank), comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb)
    for _ in range(3):
        ddp.zero_grad()
        loss_of(ddp, samples(comm.rank)).backward()
        assert_gradients(ddp, reference_gradients(comm))


@pytest.mark.parametrize("backend", ["gloo"])
def test_gradients_over_another_back_end(topology: Topology, backend: str) -> None:
    comm = connected(topology, backend)
    ddp = DistributedDataParallel(network(), comm, bucket_mb=1e-4)
    for _ in range(3):
        ddp.zero_grad()
        loss_of(ddp, samples(comm.rank)).backward()
        assert_gradients(ddp, reference_gradients(comm))
    comm.close()


def test_accumulation_without_synchronisation_sends_nothing(comm: Communicator) -> None:
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
    model: Any = network()
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


def test_wrapping_again_after_the_first_wrapper_is_gone(comm: Communicator) -> None:
    model = network()
    for _ in range(3):
        ddp = DistributedDataParallel(model, comm)
        ddp.zero_grad()
        loss_of(ddp, samples(comm.rank)).backward()
        assert_gradients(ddp, reference_gradients(comm))
        del ddp


def test_two_wrappers_of_one_communicator_in_one_backward_pass(comm: Communicator) -> None:
    """An encoder and a decoder wrapped each by itself."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(5, 7).double(), nn.Linear(7, 3).double()
    first = DistributedDataParallel(encoder, comm, bucket_mb=1e-4)
    second = DistributedDataParallel(decoder, comm, bucket_mb=1e-4)
    bare = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    bare[0].load_state_dict(encoder.state_dict())
    bare[1].load_state_dict(decoder.state_dict())
    inputs = torch.cat([samples(rank)[0] for rank in range(comm.size)])
    bare(inputs).square().mean().backward()
    for _ in range(3):
        first.zero_grad()
        second.zero_grad()
        second(first(samples(comm.rank)[0])).square().mean().backward()
        for parameter, wanted in zip([*encoder.parameters(), *decoder.parameters()], bare.parameters(), strict=True):
            torch.testing.assert_close(gradient_of(parameter), gradient_of(wanted))


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


def test_nothing_to_train_is_refused(comm: Communicator) -> None:
    model = network()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        DistributedDataParallel(model, comm)


def test_bytes_of_a_step_are_those_of_the_ring(topology: Topology) -> None:
    """Of the gradients, a flag for each parameter, and a count."""
    options = CommunicationOptions("mpi", algorithm="ring", timeout_seconds=TIMEOUT_SECONDS)
    comm = connect(topology, torch.device("cpu"), options)
    ddp = DistributedDataParallel(network(), comm)
    parameters = list(ddp.parameters())
    message_bytes = 8 * (sum(parameter.numel() for parameter in parameters) + len(parameters) + 1)
    before = comm.traffic.bytes_sent or 0
    loss_of(ddp, samples(comm.rank)).backward()
    sent = torch.tensor(float((comm.traffic.bytes_sent or 0) - before))
    assert float(comm.all_reduce(sent).wait()) == 2 * (comm.size - 1) * message_bytes
    comm.close()
