"""PowerSGD against the singular value decomposition."""

import pytest
import torch
from torch import Tensor

from allreduce_sgd.comm.base import ReduceOp, Work
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.base import drive
from allreduce_sgd.compression.error_feedback import ErrorFeedback
from allreduce_sgd.compression.powersgd import PowerSGD, orthonormalise_
from tests.compression.codecs import randn

ROWS, COLUMNS = 30, 50


def matrix(rank: int) -> Tensor:
    left, right = randn(ROWS * rank, 0, torch.float64), randn(rank * COLUMNS, 1, torch.float64)
    return left.view(ROWS, rank) @ right.view(rank, COLUMNS)


def orthonormal(size: int) -> Tensor:
    return torch.linalg.qr(randn(size * ROWS, size, torch.float64).view(size, ROWS)).Q


def step(codec: PowerSGD | ErrorFeedback, signal: Tensor) -> Tensor:
    return drive(codec.reduce(signal, SingleCommunicator()))[0].clone()


class Counting(SingleCommunicator):
    """Notes the lengths of what is reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def all_reduce(
        self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM, *, shared_result: bool = False, blocking: bool = False
    ) -> Work:
        self.lengths.append(buffer.numel())
        return super().all_reduce(buffer, op)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_matrix_of_that_rank_arrives_whole(rank: int) -> None:
    exact = matrix(rank)
    u = step(PowerSGD([exact], rank, (0,)), exact.flatten())
    torch.testing.assert_close(u.view(ROWS, COLUMNS), exact)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_warm_start_approaches_the_best_approximation(rank: int) -> None:
    # Singular values 1, 1/2, 1/4, ...: subspace iteration gains a factor of four a step.
    left, right = (
        torch.linalg.qr(randn(size * ROWS, size, torch.float64).view(size, ROWS)).Q for size in (ROWS, COLUMNS)
    )
    values = 0.5 ** torch.arange(ROWS, dtype=torch.float64)
    full = left @ torch.diag(values) @ right.t()
    best = left[:, :rank] @ torch.diag(values[:rank]) @ right[:, :rank].t()
    codec = PowerSGD([full], rank, (1,))
    errors = [float((step(codec, full.flatten()).view(ROWS, COLUMNS) - full).norm()) for _ in range(20)]
    assert errors[0] > 1.01 * errors[-1]
    assert errors[-1] == pytest.approx(float((best - full).norm()), rel=1e-6)


def test_vectors_and_matrices_not_worth_it_travel_whole_with_the_first_factor() -> None:
    parameters = [torch.empty(7), torch.empty(20, 30), torch.empty(3, 4), torch.empty(()), torch.empty(10, 2, 3, 3)]
    comm = Counting()
    codec = PowerSGD(parameters, 2, (0,))
    signal = randn(7 + 600 + 12 + 1 + 180, 3)
    u, sent = drive(codec.reduce(signal, comm))
    # 3 by 4 has 12 elements, and its factors of rank 2 would have 14.
    assert comm.lengths == [2 * (20 + 10) + 7 + 12 + 1, 2 * (30 + 18)]
    for whole in (slice(0, 7), slice(607, 620)):
        assert torch.equal(u[whole], signal[whole])
        assert torch.equal(sent[whole], signal[whole])
    assert torch.linalg.matrix_rank(u[7:607].view(20, 30)) == 2


def test_a_bucket_of_vectors_only() -> None:
    comm = Counting()
    signal = randn(9, 0)
    u, _ = drive(PowerSGD([torch.empty(4), torch.empty(5, 1)], 1, (0,)).reduce(signal, comm))
    assert torch.equal(u, signal)
    assert sum(comm.lengths) == 9


def test_memory_is_a_matrix_whatever_the_order_of_dimensions() -> None:
    # The outermost dimension in memory gives the rows: no copy is made, and the approximation is as good.
    image = torch.empty(16, 4, 3, 3).to(memory_format=torch.channels_last)
    transposed = torch.empty(12, 40).t()
    low = torch.outer(randn(16, 0), randn(36, 1)).flatten(), torch.outer(randn(12, 2), randn(40, 3)).flatten()
    signal = torch.cat(low)
    u = step(PowerSGD([image, transposed], 1, (0,)), signal)
    torch.testing.assert_close(u, signal)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_the_size_of_gradients_does_not_matter(scale: float) -> None:
    slots = [torch.empty(20, 30)]
    codecs = [PowerSGD(slots, 2, (0,)) for _ in range(2)]
    for turn in range(5):
        signal = randn(600, turn)
        torch.testing.assert_close(
            step(codecs[1], scale * signal) / scale, step(codecs[0], signal), rtol=1e-3, atol=1e-4
        )


def test_zero_gradients_leave_it_able_to_go_on() -> None:
    codec = PowerSGD([torch.empty(ROWS, COLUMNS)], 2, (0,))
    assert torch.equal(step(codec, torch.zeros(ROWS * COLUMNS)), torch.zeros(ROWS * COLUMNS))
    exact = matrix(2).float().flatten()
    for _ in range(2):
        u = step(codec, exact)
    torch.testing.assert_close(u, exact, rtol=1e-3, atol=1e-5)


def test_orthonormal_rows_span_the_same() -> None:
    rows = randn(3 * 40, 0, torch.float64).view(3, 40)
    basis = rows.clone()
    orthonormalise_(basis)
    torch.testing.assert_close(basis @ basis.t(), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(rows @ basis.t() @ basis, rows)


def test_wrong_lengths_and_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="rank is 0"):
        PowerSGD([], 0, (0,))
    with pytest.raises(ValueError, match="signal has 5 elements, its parameters 6"):
        step(PowerSGD([torch.empty(6)], 1, (0,)), torch.zeros(5))
    saved = PowerSGD([torch.empty(20, 30)], 1, (0,))
    step(saved, torch.zeros(600))
    other = PowerSGD([torch.empty(20, 30)], 2, (0,))
    other.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="another bucket or rank"):
        step(other, torch.zeros(600))
