"""Top-k, random-k, deep gradient compression and how much they send, against plain references."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.base import Codec, drive
from allreduce_sgd.compression.density import Density
from allreduce_sgd.compression.dgc import DeepGradientCompression
from allreduce_sgd.compression.error_feedback import ErrorFeedback
from allreduce_sgd.compression.random_k import RandomK
from allreduce_sgd.compression.selection import largest
from allreduce_sgd.compression.top_k import TopK
from tests.compression.codecs import randn


def sent_by(codec: Codec, signal: Tensor) -> Tensor:
    return drive(codec.reduce(signal, SingleCommunicator()))[0].clone()


def test_the_papers_warm_up() -> None:
    density = Density(0.001, warmup_steps=8)
    sparsities = [100 * (1 - density.at(step)) for step in range(10)]
    expected = [75, 75, 93.75, 93.75, 98.4375, 98.4375, 99.609375, 99.609375, 99.9, 99.9]
    assert sparsities == pytest.approx(expected)


def test_warm_up_never_sends_less_than_afterwards_and_may_be_shorter_than_its_stages() -> None:
    assert [Density(0.1, 4).at(step) for step in range(5)] == [0.25, 0.1, 0.1, 0.1, 0.1]
    assert [Density(0.01, 2).at(step) for step in range(3)] == [0.25, 0.015625, 0.01]
    assert Density(0.5).at(0) == 0.5


@given(st.floats(1e-4, 1), st.integers(0, 5000))
def test_a_count_is_the_share_rounded_up(ratio: float, length: int) -> None:
    count = Density(ratio).count(0, length)
    assert count == min(length, math.ceil(ratio * length))
    assert (count >= 1) == (length >= 1)


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 0), (1.5, 0), (-1.0, 0), (math.nan, 0), (0.5, -1)])
def test_impossible_densities_are_refused(ratio: float, steps: int) -> None:
    with pytest.raises(ValueError, match="allowed are"):
        Density(ratio, steps)


SHAPES = {
    "normal": lambda length: randn(length, 0).abs(),
    "equal": lambda length: torch.ones(length),
    "zeros": lambda length: torch.zeros(length),
    "few": lambda length: (torch.arange(length) % 1000 == 7).float(),
    "ascending": lambda length: torch.arange(length, dtype=torch.float32),
    # Every sampled element is large, and no other: the threshold from the sample is far too high.
    "misleading": lambda length: (torch.arange(length) % (length // 4096 or 1) == 0) * torch.rand(length),
    "double": lambda length: randn(length, 0, torch.float64).abs(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 4095, 8192, 20000, 50001])
def test_the_largest_are_found(shape: str, length: int) -> None:
    magnitudes = SHAPES[shape](length)
    for k in {1, 2, length // 1000, length // 100, length // 4, length - 1, length} - {0}:
        if k <= length:
            found = largest(magnitudes, k)
            assert len(found.unique()) == k
            expected = torch.topk(magnitudes, k).values
            assert torch.equal(magnitudes[found].sort(descending=True).values, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("length", [10, 20000])
def test_what_is_not_finite_is_among_the_largest(length: int, bad: float) -> None:
    magnitudes = torch.rand(length)
    magnitudes[length // 3] = bad
    assert length // 3 in largest(magnitudes, 1 + length // 100).tolist()
    magnitudes[: length // 2] = bad
    assert set(largest(magnitudes, length // 10).tolist()) <= set(range(length // 2))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), st.floats(0.01, 1))
def test_top_k_sends_the_largest_and_nothing_else(values: list[float], ratio: float) -> None:
    signal = torch.tensor(values)
    k = math.ceil(ratio * len(values))
    sent = sent_by(TopK(Density(ratio)), signal)
    chosen = sent != 0
    assert int(chosen.sum()) <= k
    assert torch.equal(sent[chosen], signal[chosen])
    assert sent.abs().sort().values.tolist()[-k:] == signal.abs().sort().values.tolist()[-k:]


def test_the_expected_value_of_random_k_is_the_share_of_the_signal() -> None:
    signal = randn(50, 0)
    codec = RandomK(Density(0.2), (1,))
    mean = torch.stack([sent_by(codec, signal) for _ in range(4000)]).mean(0)
    # Ten parts of five: an element of size x has a standard deviation of 0.4 x / sqrt(4000).
    assert bool(((mean - 0.2 * signal).abs() <= 5 * 0.0064 * signal.abs()).all())


@given(st.integers(1, 3000), st.floats(0.001, 1), st.integers(0, 2**31))
def test_random_k_draws_k_different_elements_and_the_same_from_the_same_seed(
    length: int, ratio: float, seed: int
) -> None:
    signal = torch.arange(1, length + 1, dtype=torch.float64)
    codecs = [RandomK(Density(ratio), (seed,)) for _ in range(2)]
    for _ in range(2):
        first, second = (sent_by(codec, signal) for codec in codecs)
        assert torch.equal(first, second)
        chosen = first != 0
        assert int(chosen.sum()) == Density(ratio).count(0, length)
        assert torch.equal(first[chosen], signal[chosen])


def test_every_element_has_its_turn() -> None:
    codec = RandomK(Density(0.1), (0,))
    signal = torch.ones(105)
    counts = torch.stack([sent_by(codec, signal) for _ in range(3000)]).sum(0)
    # Parts of 9 and 10 elements: 3000/10 with a standard deviation of 16, 3000/9 with one of 17.
    assert float(counts.min()) > 210
    assert float(counts.max()) < 425


def test_random_k_differs_between_seeds_and_steps() -> None:
    signal = torch.ones(1000)
    codec = RandomK(Density(0.1), (0, 1))
    first, second = sent_by(codec, signal), sent_by(codec, signal)
    other = sent_by(RandomK(Density(0.1), (0, 2)), signal)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def dgc_reference(signals: list[Tensor], momentum: float, k: int) -> list[Tensor]:
    """The paper's algorithm 1 with momentum correction and factor masking, element by element."""
    length = len(signals[0])
    velocity, unsent, sent = [0.0] * length, [0.0] * length, []
    for signal in signals:
        for i, gradient in enumerate(signal.tolist()):
            velocity[i] = momentum * velocity[i] + gradient
            unsent[i] += velocity[i]
        message = [0.0] * length
        for i in sorted(range(length), key=lambda i: -abs(unsent[i]))[:k]:
            message[i] = unsent[i]
            unsent[i] = velocity[i] = 0.0
        sent.append(torch.tensor(message, dtype=torch.float64))
    return sent


def test_dgc_is_the_papers_algorithm() -> None:
    signals = [randn(40, turn, torch.float64) for turn in range(30)]
    codec = DeepGradientCompression(Density(0.1), momentum=0.9)
    for signal, expected in zip(signals, dgc_reference(signals, 0.9, 4), strict=True):
        torch.testing.assert_close(sent_by(codec, signal), expected)


def test_dgc_without_momentum_is_top_k_with_error_feedback() -> None:
    density = Density(0.02, warmup_steps=8)
    dgc, feedback = DeepGradientCompression(density, momentum=0), ErrorFeedback(TopK(density))
    for turn in range(12):
        signal = randn(3000, turn)
        assert torch.equal(sent_by(dgc, signal), sent_by(feedback, signal))


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_dgc_refuses_a_momentum_that_grows(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum is"):
        DeepGradientCompression(Density(0.1), momentum)
