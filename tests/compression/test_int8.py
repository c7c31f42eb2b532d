"""8-bit integers: error bounds, expected values, and the bytes of a row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.base import drive
from allreduce_sgd.compression.blocks import Blocks
from allreduce_sgd.compression.int8 import Int8
from allreduce_sgd.compression.quantized import Quantized
from tests.compression.codecs import randn


def draws(signal: torch.Tensor, count: int, block: int = 1024) -> torch.Tensor:
    codec = Quantized(Int8((0,), block))
    return torch.stack([drive(codec.reduce(signal, SingleCommunicator()))[0].clone() for _ in range(count)])


def test_the_expected_value_is_the_signal() -> None:
    signal = torch.tensor([127.0, 0.0, 0.25, 0.5, 0.999, -0.25, -33.3, -126.5])
    sent = draws(signal, 4000)
    # Steps of one: the standard deviation of a mean is at most 0.5 / sqrt(4000) = 0.008.
    torch.testing.assert_close(sent.mean(0), signal, rtol=0, atol=0.04)
    # Whole steps are not rounded at all, others to one of their two neighbours.
    assert bool((sent[:, :2] == signal[:2]).all())
    assert sorted(set(sent[:, 3].tolist())) == [0.0, 1.0]
    assert sorted(set(sent[:, 6].tolist())) == [-34.0, -33.0]


@pytest.mark.parametrize("length", [1, 5, 64, 65, 1000])
def test_the_error_is_less_than_a_step_of_the_own_block(length: int) -> None:
    signal = randn(length, 1)
    blocks = Blocks.of(length, 64, 1)
    (sent,) = draws(signal, 1, 64)
    for start in range(0, length, blocks.width):
        piece = slice(start, start + blocks.width)
        step = float(signal[piece].abs().max()) / 127
        assert float((sent[piece] - signal[piece]).abs().max()) <= step * 1.0001


def test_neighbours_are_rounded_independently_and_ranks_differently() -> None:
    signal = torch.full((4001,), 0.5)
    signal[-1] = 127.0
    first, second = draws(signal, 2, 8192)
    ups = first[:4000]
    # Of 4000 fair coins: five standard deviations.
    assert abs(float(ups.sum()) - 2000) < 160
    assert abs(float((ups[1:] * ups[:-1]).sum()) - 1000) < 200
    assert abs(float((first[:4000] * second[:4000]).sum()) - 1000) < 160
    other, _ = drive(Quantized(Int8((1,), 8192)).reduce(signal, SingleCommunicator()))
    assert abs(float((first[:4000] * other[:4000]).sum()) - 1000) < 160


@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-20, 1e30])
def test_very_small_and_large_numbers_keep_their_order_of_magnitude(size: float) -> None:
    (sent,) = draws(torch.tensor([size, -size, 0.0]), 1)
    # Below 1.2e-38 a step is as large as that.
    torch.testing.assert_close(sent, torch.tensor([size, -size, 0.0]), rtol=1e-2, atol=1.2e-38)


@given(st.integers(0, 5000), st.sampled_from([8, 64, 1000, 1024]), st.sampled_from([1, 8]))
def test_blocks_hold_what_they_must_in_the_fewest_bytes(length: int, block: int, per_byte: int) -> None:
    blocks = Blocks.of(length, block, per_byte)
    assert length <= blocks.elements < length + blocks.count * per_byte + blocks.count
    assert blocks.width <= block
    assert blocks.count == max(1, -(-length // block))
    assert Blocks.of(blocks.elements, block, per_byte) == blocks or length == 0
    assert 0 <= blocks.wire_bytes(per_byte) - blocks.elements // per_byte - 4 * blocks.count < 4


def test_a_block_of_no_whole_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="block is 12 elements, allowed are multiples of 8"):
        Blocks.of(100, 12, 8)
