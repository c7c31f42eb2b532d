"""Small Python values between ranks, as JSON in byte tensors, over any communicator."""

import json
from typing import Any

import torch

from allreduce_sgd.comm.base import Communicator

__all__ = ["all_gather_object"]


def all_gather_object(comm: Communicator, value: Any) -> list[Any]:
    """Return the JSON-representable `value` of every rank, in rank order. All ranks must call."""
    text = json.dumps(value).encode()
    lengths = torch.zeros(comm.size, dtype=torch.int64)
    lengths[comm.rank] = len(text)
    comm.all_gather(lengths).wait()
    longest = int(lengths.max())
    table = torch.zeros(comm.size, longest, dtype=torch.uint8)
    table[comm.rank, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    comm.all_gather(table.view(-1)).wait()
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(table, lengths.tolist(), strict=True)]
