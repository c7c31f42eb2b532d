"""Messages from one rank to another as programs: their bytes, beside the collectives."""

from collections.abc import Callable
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from allreduce_sgd.comm.progress import Program
from allreduce_sgd.errors import CommunicationError

__all__ = ["receive", "send"]

_CPU = torch.device("cpu")


def send(data: Tensor, to: int, tag: int, comm: Any, count: Callable[[int], None]) -> Program:
    """Send the tensor, which lies on the CPU, over the mpi4py communicator `comm`; `count` is told its bytes."""
    block = MPI.buffer.fromaddress(data.data_ptr(), data.nbytes)
    request = comm.Isend([block, MPI.BYTE], to, tag)
    count(data.nbytes)
    while not request.Test():
        yield False


def receive(data: Tensor, source: int | None, tag: int, comm: Any) -> Program:
    """Receive into the tensor, on any device; None: from any rank. Raises CommunicationError at any other length."""
    host = data if data.device == _CPU else torch.empty_like(data, device=_CPU)
    block = MPI.buffer.fromaddress(host.data_ptr(), host.nbytes)
    status = MPI.Status()
    request = comm.Irecv([block, MPI.BYTE], MPI.ANY_SOURCE if source is None else source, tag)
    while not request.Test(status):
        yield False
    arrived = status.Get_count(MPI.BYTE)
    if arrived != host.nbytes:
        raise CommunicationError(f"rank {status.Get_source()} sent {arrived} bytes, {host.nbytes} were expected")
    if host is not data:
        data.copy_(host)
