"""Our collectives as contenders: in place and with one shared result, in the caller and through the queue."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator, ReduceOp, Work
from benchmarks.collective_data import CollectiveData
from benchmarks.rounds import Contender

__all__ = ["own_contenders", "private_contenders"]


def own_contenders(
    comm: Communicator, name: str, data: CollectiveData, numel: int, dtype: torch.dtype, device: torch.device
) -> list[Contender]:
    """Return the contenders of the algorithm `name` on buckets that `comm` allocates. All ranks must call.

    The synchronous and the asynchronous call share a bucket; the variants do not.
    """
    bucket = comm.allocate(numel, dtype, device)
    found = [_contender(comm, name, data, bucket, start, queued) for queued, start in _in_place(comm, data, bucket)]
    if data.operation == "all_reduce":
        shared = comm.allocate(numel, dtype, device)
        starts: list[tuple[bool, Callable[[], Work]]] = [
            (False, lambda: comm.all_reduce(shared, ReduceOp.SUM, shared_result=True, blocking=True)),
            (True, lambda: comm.all_reduce(shared, ReduceOp.SUM, shared_result=True)),
        ]
        found += [
            replace(_contender(comm, name, data, shared, start, queued), variant="shared_result")
            for queued, start in starts
        ]
    return found


def private_contenders(
    comm: Communicator, name: str, data: CollectiveData, numel: int, dtype: torch.dtype, device: torch.device
) -> list[Contender]:
    """Return the contenders of the algorithm `name` on a tensor that the communicator knows nothing of."""
    tensor = torch.zeros(numel, dtype=dtype, device=device)
    return [
        replace(_contender(comm, f"{name}, private buffer", data, tensor, start, queued), private=True)
        for queued, start in _in_place(comm, data, tensor)
    ]


def _in_place(comm: Communicator, data: CollectiveData, buffer: Tensor) -> list[tuple[bool, Callable[[], Work]]]:
    """Return the ways to start the operation, each with whether it goes through the queue."""
    if data.operation == "all_reduce":
        return [
            (False, lambda: comm.all_reduce(buffer, ReduceOp.SUM, blocking=True)),
            (True, lambda: comm.all_reduce(buffer, ReduceOp.SUM)),
        ]
    start: Callable[[], Work] = {
        "reduce_scatter": lambda: comm.reduce_scatter(buffer, ReduceOp.SUM),
        "all_gather": lambda: comm.all_gather(buffer),
        "broadcast": lambda: comm.broadcast(buffer, 0),
    }[data.operation]
    return [(False, start)]


def _contender(
    comm: Communicator,
    name: str,
    data: CollectiveData,
    buffer: Tensor,
    start: Callable[[], Work],
    asynchronous: bool,
) -> Contender:
    return Contender(
        name=name,
        variant="in_place",
        ours=True,
        buffer=buffer,
        call=lambda: start().wait(),
        region=data.region(buffer.numel()),
        asynchronous=asynchronous,
        algorithm=comm.algorithm,
        traffic=comm.traffic,
    )
