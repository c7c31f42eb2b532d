"""From the options to what makes a bucket's codec."""

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from allreduce_sgd.compression.base import Codec, CodecFactory
from allreduce_sgd.compression.cast import Cast
from allreduce_sgd.compression.density import Density
from allreduce_sgd.compression.dgc import DeepGradientCompression
from allreduce_sgd.compression.error_feedback import ErrorFeedback
from allreduce_sgd.compression.int8 import Int8
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.compression.powersgd import PowerSGD
from allreduce_sgd.compression.quantized import Quantized
from allreduce_sgd.compression.random_k import RandomK
from allreduce_sgd.compression.sign import Sign
from allreduce_sgd.compression.top_k import TopK
from allreduce_sgd.errors import ConfigError

__all__ = ["build_codec"]

_Value = TypeVar("_Value", int, float)

_RATIOS = {"top-k": 0.01, "random-k": 0.25, "dgc": 0.001}
_WITH_FEEDBACK = ("sign", "top-k", "powersgd")


def build_codec(options: CompressionOptions, *, seed: int, rank: int, size: int) -> CodecFactory | None:
    """Return the factory of the codecs that the options ask for, None for no compression.

    All ranks must call, with the same options and seed; `rank` and `size` are those of the communicator. The factory
    raises ConfigError for gradients that are not real floating-point numbers.
    """
    if options.compression == "none":
        return None
    feedback = options.error_feedback
    if feedback is None:
        feedback = options.compression in _WITH_FEEDBACK
    make = _maker(options, seed, rank, size)
    buckets = itertools.count()

    def factory(slots: Sequence[Tensor]) -> Codec:
        for slot in slots:
            if not slot.is_floating_point():
                raise ConfigError(
                    f"--compression {options.compression}: the model has parameters of {slot.dtype}, and only real "
                    f"floating-point gradients can be compressed; choose none"
                )
        codec = make(slots, next(buckets))
        return ErrorFeedback(codec) if feedback else codec

    return factory


def _maker(options: CompressionOptions, seed: int, rank: int, size: int) -> Callable[[Sequence[Tensor], int], Codec]:
    """Return what makes the codec of a bucket, without error feedback, from its slots and its number."""
    density = Density(
        _given(options.compression_ratio, _RATIOS.get(options.compression, 1.0)),
        _given(options.compression_warmup_steps, 0),
    )
    block = _given(options.compression_block, 256)
    momentum = _given(options.compression_momentum, 0.9)
    matrix_rank = _given(options.compression_rank, 2)
    makers: dict[str, Callable[[Sequence[Tensor], int], Codec]] = {
        "fp16": lambda slots, bucket: Quantized(Cast(torch.float16), size),
        "bf16": lambda slots, bucket: Quantized(Cast(torch.bfloat16), size),
        "int8": lambda slots, bucket: Quantized(Int8((seed, bucket, rank), block), size),
        "sign": lambda slots, bucket: Quantized(Sign(block), size),
        "top-k": lambda slots, bucket: TopK(density),
        "random-k": lambda slots, bucket: RandomK(density, (seed, bucket)),
        "dgc": lambda slots, bucket: DeepGradientCompression(density, momentum),
        "powersgd": lambda slots, bucket: PowerSGD(slots, matrix_rank, (seed, bucket)),
    }
    return makers[options.compression]


def _given(value: _Value | None, default: _Value) -> _Value:
    return default if value is None else value
