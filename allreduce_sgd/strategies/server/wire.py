"""Gradients in fewer bits on their way to a server: the codecs that quantise every element by itself.

fp16 and bf16 (narrower floats), int8 and sign (with a scale per block), as in `compression`: a worker encodes its
gradient, the server decodes it and adds up in full precision. With error feedback a worker adds what was left out of a
gradient to its next one (see `compression/error_feedback.py`). Bytes: 1/2, 1/2, 1/4 and 1/32 of a push, plus scales;
parameters come back whole.

Differences from the exchange of all ranks: a gradient is quantised once, there is no second quantisation of a sum. The
other codecs are not offered: their exchange is a collective (powersgd), or a list of indices that a server would have
to scatter one by one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allreduce_sgd.compression.cast import Cast
from allreduce_sgd.compression.int8 import Int8
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.compression.quantized import Quantizer
from allreduce_sgd.compression.sign import Sign
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.strategies.server.shards import Vectors

__all__ = ["CODECS", "Wire", "make_wires"]

CODECS = ("none", "fp16", "bf16", "int8", "sign")
_BLOCK = 256


class Wire:
    """One piece of a gradient, of `length` elements, as it is sent: `message`, a flat tensor of bytes.

    Either side makes its own. With `feedback` the sending side keeps a residual.
    """

    def __init__(self, quantizer: Quantizer, length: int, dtype: torch.dtype, feedback: bool) -> None:
        elements, n_bytes = quantizer.row(length) if length else (0, 0)
        self.message = torch.zeros(n_bytes, dtype=torch.uint8)
        self._quantizer = quantizer
        self._length = length
        self._row = torch.zeros(1, elements, dtype=torch.promote_types(dtype, torch.float32))
        self._residual = torch.zeros(length, dtype=self._row.dtype) if feedback else None

    def encode(self, gradient: Tensor) -> None:
        """Write the flat gradient to `message`, and keep what is lost if there is error feedback."""
        if not self._length:
            return
        values = self._row[0, : self._length]
        values.copy_(gradient)
        if self._residual is not None:
            values.add_(self._residual)
            self._residual.copy_(values)
        self._quantizer.encode(self._row, self.message.view(1, -1), self._length)
        if self._residual is not None:
            self._quantizer.decode(self.message.view(1, -1), self._row)
            self._residual.sub_(values)
            self._row[0, self._length :].zero_()

    def decode(self, gradient: Tensor) -> None:
        """Write what `message` holds to the flat `gradient`."""
        if self._length:
            self._quantizer.decode(self.message.view(1, -1), self._row)
            gradient.copy_(self._row[0, : self._length])

    def state_dict(self) -> dict[str, Any]:
        return {"residual": self._residual, "quantizer": self._quantizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._residual is not None:
            self._residual.copy_(state["residual"])
        self._quantizer.load_state_dict(state["quantizer"])


def make_wires(options: CompressionOptions, vectors: Vectors, shard: int, seed: int, rank: int) -> list[Wire] | None:
    """Return the wires of one shard, one per vector; None for no compression. `seed` and `rank` are those of int8.

    Raises ConfigError for codecs that cannot be used between a worker and a server.
    """
    name = options.compression
    if name == "none":
        return None
    if name not in CODECS:
        raise ConfigError(
            f"--compression {name}: gradients on their way to a server cannot be compressed so; choose from "
            f"{', '.join(CODECS)}"
        )
    feedback = name == "sign" if options.error_feedback is None else options.error_feedback
    block = options.compression_block or _BLOCK

    def quantizer(number: int) -> Quantizer:
        if name == "int8":
            return Int8((seed, number, rank), block)
        return Sign(block) if name == "sign" else Cast(torch.float16 if name == "fp16" else torch.bfloat16)

    pieces = vectors.pieces(shard)
    return [
        Wire(quantizer(shard * len(pieces) + number), piece.stop - piece.start, dtype, feedback)
        for number, (piece, dtype) in enumerate(zip(pieces, vectors.dtypes, strict=True))
    ]
