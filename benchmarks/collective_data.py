"""What goes into a collective and what has to come out: random whole numbers, other ones in every round.

Every rank knows the seeds of all, so it knows the exact result without communication. Values are whole numbers small
enough for every partial sum to be exact in the dtype, whatever the order of summation: an element is right or wrong,
there is no tolerance to choose. Round r reads the pool of random numbers from another place, so that a result left over
from a round before is wrong nearly everywhere.
"""

import torch
from torch import Tensor

from allreduce_sgd.schedules.step import chunk

__all__ = ["DTYPES", "OPERATIONS", "CollectiveData", "bus_factor"]

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}

_LARGEST_EXACT_SUM = {torch.float16: 2048, torch.bfloat16: 256, torch.uint8: 255}
_LARGEST_VALUE = 100
_SHIFTS = 4096
_SHIFT_PER_ROUND = 1009
_COMPARED_AT_ONCE = 1 << 20


def bus_factor(operation: str, parties: int) -> float:
    """Return what nccl-tests multiplies n/t with: bytes that must pass each party's link, per byte of the buffer."""
    if operation == "broadcast":
        return 1.0
    return (2 if operation == "all_reduce" else 1) * (parties - 1) / parties


class CollectiveData:
    """The inputs and results of `operation` for buffers of up to `largest` elements, on this rank.

    The root of a broadcast is rank 0; in an all-gather and a reduce-scatter, rank r's part is
    `chunk(numel, size, r)`.
    """

    def __init__(self, operation: str, rank: int, size: int, largest: int, dtype: torch.dtype) -> None:
        self.operation = operation
        self._rank = rank
        self._size = size
        bound = max(1, min(_LARGEST_VALUE, _LARGEST_EXACT_SUM.get(dtype, 1 << 24) // size))
        total = torch.zeros(largest + _SHIFTS, dtype=torch.int32)
        for source in range(size):
            generator = torch.Generator().manual_seed(source + 1)
            low = -bound if dtype.is_signed else 0
            values = torch.randint(low, bound + 1, total.shape, dtype=torch.int8, generator=generator)
            total += values
            if source == rank:
                self._own = values.to(dtype)
        self._total = total.to(dtype)

    def region(self, numel: int) -> slice:
        """Return the elements of a result that are defined on this rank."""
        return chunk(numel, self._size, self._rank) if self.operation == "reduce_scatter" else slice(0, numel)

    def fill(self, buffer: Tensor, index: int) -> None:
        """Write this rank's input of round `index` into the flat buffer, on whatever device it is."""
        there = self._place(buffer.numel(), index)
        total = self._total[there]
        if self.operation == "broadcast" and self._rank == 0:
            buffer.copy_(total)
            return
        buffer.copy_(self._own[there])
        if self.operation == "all_gather":
            mine = chunk(buffer.numel(), self._size, self._rank)
            buffer[mine].copy_(total[mine])

    def count_wrong(self, result: Tensor, region: slice, index: int) -> int:
        """Return how many elements of `result[region]` are not those of round `index`."""
        expected = self._total[self._place(result.numel(), index)][region]
        got = result[region].cpu()
        if torch.equal(got, expected):
            return 0
        pairs = zip(got.split(_COMPARED_AT_ONCE), expected.split(_COMPARED_AT_ONCE), strict=True)
        return sum(int((mine != other).sum()) for mine, other in pairs)

    def _place(self, numel: int, index: int) -> slice:
        first = index * _SHIFT_PER_ROUND % _SHIFTS
        return slice(first, first + numel)
