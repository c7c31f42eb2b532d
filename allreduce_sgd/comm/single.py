"""The communicator of one rank alone: every operation is finished when it starts, and no MPI is needed."""

import os
import sys
from typing import NoReturn

import torch
from torch import Tensor

from allreduce_sgd.comm.base import FinishedWork, ReduceOp, Traffic, Work, check_buffer, check_reduction
from allreduce_sgd.errors import CommunicationError

__all__ = ["SingleCommunicator"]


class SingleCommunicator:
    rank = 0
    size = 1
    backend = "single"
    algorithm = None
    algorithm_table = None

    def __init__(self, timeout_seconds: float = 300.0) -> None:
        self.timeout_seconds = timeout_seconds
        self.traffic = Traffic()

    def describe_algorithm(self, n_bytes: int) -> None:
        return None

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def allocate_shared(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.allocate(numel, dtype, device)

    def all_reduce(
        self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM, *, shared_result: bool = False, blocking: bool = False
    ) -> Work:
        check_reduction(buffer, op, "all_reduce")
        return FinishedWork(check_buffer(buffer, "all_reduce"))

    def reduce_scatter(self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        check_reduction(buffer, op, "reduce_scatter")
        return FinishedWork(check_buffer(buffer, "reduce_scatter"))

    def all_gather(self, buffer: Tensor) -> Work:
        return FinishedWork(check_buffer(buffer, "all_gather"))

    def broadcast(self, buffer: Tensor, root: int = 0) -> Work:
        return FinishedWork(check_buffer(buffer, "broadcast"))

    def barrier(self) -> Work:
        return FinishedWork(torch.empty(0))

    def send(self, buffer: Tensor, to: int, tag: int = 0) -> Work:
        raise CommunicationError("send: one rank alone has nobody to send to")

    def receive(self, buffer: Tensor, source: int | None = None, tag: int = 0) -> Work:
        raise CommunicationError("receive: one rank alone has nobody to receive from")

    def split(self, color: int, key: int = 0) -> "SingleCommunicator":
        return SingleCommunicator(self.timeout_seconds)

    def abort(self, why: str) -> NoReturn:
        print(why, file=sys.stderr, flush=True)
        os._exit(1)

    def close(self) -> None:
        pass
