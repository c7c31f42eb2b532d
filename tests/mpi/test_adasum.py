"""Adasum against its definition, computed serially, on every rank count and with any cut into parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.compression.base import drive
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.optim.build import build_optimizer
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.adasum import AdaptiveSum, Adasum
from tests.mpi.test_strategies import assert_same, mini_batch, network, part_of


def pair(first: Tensor, second: Tensor) -> Tensor:
    product = first.flatten() @ second.flatten()
    coefficients = []
    for each in (first, second):
        square = each.flatten() @ each.flatten()
        coefficients.append(1.0 if square == 0 else 1 - product / (2 * square))
    return coefficients[0] * first + coefficients[1] * second


def adasum(vectors: list[Tensor]) -> Tensor:
    """The tree over the largest power of two of ranks, after the others were combined with the first of these."""
    vectors = list(vectors)
    ranks = 1 << (len(vectors).bit_length() - 1)
    for index in range(ranks, len(vectors)):
        vectors[index - ranks] = pair(vectors[index - ranks], vectors[index])
    vectors = vectors[:ranks]
    while len(vectors) > 1:
        vectors = [pair(vectors[index], vectors[index + 1]) for index in range(0, len(vectors), 2)]
    return vectors[0]


def reduced(comm: Communicator, signal: Tensor, lengths: list[int] | None = None) -> Tensor:
    """What the exchange makes of this rank's signal, cut into parameters of these lengths."""
    codec = AdaptiveSum(signal.split(lengths or [signal.numel()]), comm.size)
    before = signal.clone()
    u, sent = drive(codec.reduce(signal, comm))
    assert torch.equal(signal.nan_to_num(), before.nan_to_num())
    assert sent is signal
    bits = all_gather_object(comm, u.double().tolist())
    assert all(str(theirs) == str(bits[0]) for theirs in bits)
    return u


def vectors(size: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(length, generator=generator, dtype=torch.float64).to(dtype) for _ in range(size)]


@pytest.mark.parametrize("lengths", [[1], [2], [3], [1, 1], [5, 3, 1, 7], [64, 32, 1000]])
def test_every_parameter_is_combined_by_itself(comm: Communicator, lengths: list[int]) -> None:
    given = vectors(comm.size, sum(lengths))
    by_parameter = zip(*(each.split(lengths) for each in given), strict=True)
    expected = torch.cat([adasum(list(pieces)) for pieces in by_parameter])
    torch.testing.assert_close(reduced(comm, given[comm.rank], lengths), expected)


def test_over_every_back_end_with_messages(any_comm: Communicator) -> None:
    lengths = [5, 3, 1, 7]
    given = vectors(any_comm.size, sum(lengths), torch.float32)
    if any_comm.size > 1 and any_comm.backend == "nccl":
        with pytest.raises(ConfigError, match="--strategy adasum: back end nccl has no messages between two ranks"):
            Adasum(network(), torch.optim.SGD, any_comm, None, GradientOptions())
        return
    by_parameter = zip(*(each.split(lengths) for each in given), strict=True)
    expected = torch.cat([adasum(list(pieces)) for pieces in by_parameter])
    torch.testing.assert_close(reduced(any_comm, given[any_comm.rank], lengths), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrow_gradients(comm: Communicator, dtype: torch.dtype, tolerance: float) -> None:
    given = vectors(comm.size, 100, dtype)
    expected = adasum([each.double() for each in given])
    u = reduced(comm, given[comm.rank])
    assert u.dtype is dtype
    torch.testing.assert_close(u.double(), expected, rtol=tolerance, atol=tolerance)


def test_orthogonal_gradients_are_added(comm: Communicator) -> None:
    signal = torch.zeros(2 * comm.size, dtype=torch.float64)
    signal[2 * comm.rank] = 1.0 + comm.rank
    signal[2 * comm.rank + 1] = -2.0
    expected = torch.tensor([each for rank in range(comm.size) for each in (1.0 + rank, -2.0)], dtype=torch.float64)
    assert torch.equal(reduced(comm, signal), expected)


@pytest.mark.parametrize("factor", [1e-100, 1.0, 1e100])
def test_equal_gradients_are_averaged_on_any_scale(comm: Communicator, factor: float) -> None:
    signal = vectors(1, 9)[0] * factor
    torch.testing.assert_close(reduced(comm, signal.clone()), signal, rtol=1e-12, atol=0.0)


def test_zero_gradients_leave_the_others_as_they_are(comm: Communicator) -> None:
    only = comm.size - 1
    given = vectors(1, 7)[0]
    assert torch.equal(reduced(comm, given if comm.rank == only else torch.zeros_like(given)), given)
    assert torch.equal(reduced(comm, torch.zeros(7)), torch.zeros(7))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_on_all_ranks(comm: Communicator, bad: float) -> None:
    signal = torch.ones(5)
    if comm.rank == comm.size - 1:
        signal[3] = bad
    assert not torch.isfinite(reduced(comm, signal, [2, 3])[3])


@pytest.mark.parametrize("count", [1, 5, 12])
def test_the_strategy_is_a_serial_loop_with_adasum(comm: Communicator, count: int) -> None:
    """Several buckets, whose exchanges overlap; each rank's gradient is the mean of its own share, empty ones zero."""
    options = OptimizerOptions(lr=0.1, momentum=0.9, clip_norm=0.5)

    def make(groups: Any) -> torch.optim.Optimizer:
        return build_optimizer(options, groups)

    gradients = GradientOptions(bucket_mb=2e-4, first_bucket_mb=1e-4)
    strategy = Adasum(network(), make, comm, options.clip_norm, gradients)
    expected = network()
    optimizer = build_optimizer(options, expected.parameters())
    parameters = list(expected.parameters())
    for step in range(8):
        batch = mini_batch(step, count)
        strategy.step(part_of(batch, comm.rank, comm.size, rounds=2))
        collected = []
        for rank in range(comm.size):
            losses = part_of(batch, rank, comm.size).losses
            loss = losses[0](expected) if losses else 0.0 * functional.mse_loss(expected(batch[0]), batch[0][:, :3])
            collected.append(torch.autograd.grad(loss, parameters))
        for parameter, pieces in zip(parameters, zip(*collected, strict=True), strict=True):
            parameter.grad = adasum(list(pieces))
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    assert_same(strategy.model, expected)
    assert len(set(all_gather_object(comm, parameters_sha256(strategy.model)))) == 1


def test_line_searches_are_refused(comm: Communicator) -> None:
    with pytest.raises(ConfigError, match="--strategy adasum: LBFGS searches along the gradient"):
        Adasum(network(), lambda groups: torch.optim.LBFGS(groups), comm, None, GradientOptions())
