"""Narrower floats: closed forms at the ends of their ranges."""

import math

import pytest
import torch

from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.base import Codec, drive
from allreduce_sgd.compression.cast import Cast
from allreduce_sgd.compression.error_feedback import ErrorFeedback
from allreduce_sgd.compression.quantized import Quantized
from tests.compression.codecs import randn


def sent_for(codec: Codec, values: list[float], dtype: torch.dtype = torch.float32) -> list[float]:
    u, _ = drive(codec.reduce(torch.tensor(values, dtype=dtype), SingleCommunicator()))
    assert u.dtype is dtype
    return u.tolist()


def test_float16_rounds_to_the_nearest_and_to_even() -> None:
    # 11 digits: between 2048 and 4096 only even numbers are there.
    codec = Quantized(Cast(torch.float16))
    assert sent_for(codec, [2048.0, 2049.0, 2051.0, 2050.5, -1.5]) == [2048.0, 2048.0, 2052.0, 2050.0, -1.5]


def test_bfloat16_rounds_to_the_nearest_and_to_even() -> None:
    # 8 digits: between 256 and 512 only even numbers are there.
    codec = Quantized(Cast(torch.bfloat16))
    assert sent_for(codec, [256.0, 257.0, 259.0, 258.5, 1e30]) == [
        256.0,
        256.0,
        260.0,
        258.0,
        float(torch.tensor(1e30).bfloat16()),
    ]


def test_float16_overflow_shows() -> None:
    assert sent_for(Quantized(Cast(torch.float16)), [65504.0, 65519.0, 65520.0, -1e9]) == [
        65504.0,
        65504.0,
        math.inf,
        -math.inf,
    ]


def test_a_step_that_overflowed_is_not_kept() -> None:
    codec = ErrorFeedback(Quantized(Cast(torch.float16)))
    sent_for(codec, [1.0 + 2.0**-12, 0.0])
    assert codec.residual is not None
    assert codec.residual.tolist() == [2.0**-12, 0.0]
    assert math.isinf(sent_for(codec, [1.0, 1e6])[1])
    assert codec.residual.tolist() == [2.0**-12, 0.0]
    # Steps of 2^-10: the digit left out comes when three of it have gathered.
    assert [sent_for(codec, [1.0 + 2.0**-12, 0.0])[0] for _ in range(2)] == [1.0, 1.0 + 2.0**-10]
    assert codec.residual.tolist() == [-(2.0**-12), 0.0]


@pytest.mark.parametrize("feedback", [False, True])
def test_what_is_too_small_for_float16_arrives_with_error_feedback_only(feedback: bool) -> None:
    codec: Codec = Quantized(Cast(torch.float16))
    codec = ErrorFeedback(codec) if feedback else codec
    total = sum(sent_for(codec, [1e-8])[0] for _ in range(100))
    # To one step of float16's smallest numbers, 2^-24.
    assert total == pytest.approx(1e-6 if feedback else 0.0, abs=2.0**-24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_signal_that_is_narrow_already_is_sent_as_it_is(dtype: torch.dtype) -> None:
    signal = randn(1000, 0, dtype)
    u, sent = drive(Quantized(Cast(dtype)).reduce(signal, SingleCommunicator()))
    assert torch.equal(u, signal)
    assert torch.equal(sent, signal)


def test_integers_are_no_narrower_floats() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.int8.*floating"):
        Cast(torch.int8)
