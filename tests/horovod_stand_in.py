"""What this project uses of `horovod.torch`, over mpi4py, for machines without Horovod.

It is as strict as Horovod 0.28: which dtypes it reduces, that no two operations in flight have one name, that ranks
use the same names in the same order (asserted by `shutdown`), that all ranks together add process sets. Operations of
a process set run first in, first out, whenever one of them is polled.
"""

from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

__all__ = ["StandIn", "stand_in"]

_MOVED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64)
_REDUCED = (torch.int32, torch.int64, torch.float16, torch.float32, torch.float64)


class ProcessSet:
    def __init__(self, comm: MPI.Comm) -> None:
        self.comm = comm
        self.queue: deque[tuple[str, int, Iterator[None]]] = deque()
        self.names: list[tuple[str, str]] = []


class StandIn:
    Sum, Min, Max, Product = 1, 3, 4, 5

    def __init__(self) -> None:
        self.global_process_set: ProcessSet | None = None
        self.results: dict[int, Tensor | None] = {}
        self.sets: list[ProcessSet] = []
        self.known: set[tuple[int, ...]] = set()
        self.handles = 0

    def is_initialized(self) -> bool:
        return self.global_process_set is not None

    def init(self, comm: MPI.Comm | None = None, process_sets: object = None) -> None:
        assert process_sets == "dynamic"
        self.global_process_set = ProcessSet((comm or MPI.COMM_WORLD).Dup())
        self.sets = [self.global_process_set]
        self.known = {tuple(range(self.size()))}

    def shutdown(self) -> None:
        assert not any(each.queue for each in self.sets)
        for each in self.sets:
            assert len({tuple(names) for names in each.comm.allgather(each.names)}) == 1
            each.comm.Free()
        self.global_process_set = None

    def world(self) -> ProcessSet:
        assert self.global_process_set is not None
        return self.global_process_set

    def rank(self) -> int:
        return self.world().comm.Get_rank()

    def size(self) -> int:
        return self.world().comm.Get_size()

    def mpi_built(self) -> bool:
        return True

    def mpi_enabled(self) -> bool:
        return True

    def mpi_threads_supported(self) -> bool:
        return True

    def cuda_built(self) -> bool:
        return False

    def rocm_built(self) -> bool:
        return False

    def add_process_set(self, ranks: list[int]) -> ProcessSet | None:
        if tuple(ranks) in self.known:
            raise ValueError(f"Attempted to add a duplicate process set: {ranks}")
        assert all(other == ranks for other in self.world().comm.allgather(ranks))
        self.known.add(tuple(ranks))
        included = self.rank() in ranks
        comm = self.world().comm.Split(0 if included else MPI.UNDEFINED, self.rank())
        if not included:
            return None
        self.sets.append(ProcessSet(comm))
        return self.sets[-1]

    def allreduce_async_(self, tensor: Tensor, *, name: str, op: int, process_set: ProcessSet) -> int:
        def program(comm: MPI.Comm, handle: int) -> Iterator[None]:
            tensors: list[Tensor] = []
            yield from _exchange(comm, tensor, tensors)
            self.results[handle] = tensor.copy_(self._combine(tensors, op).view_as(tensor))

        return self._submit("allreduce", tensor, name, process_set, _REDUCED, program)

    def reducescatter_async(self, tensor: Tensor, *, name: str, op: int, process_set: ProcessSet) -> int:
        assert op == self.Sum

        def program(comm: MPI.Comm, handle: int) -> Iterator[None]:
            tensors: list[Tensor] = []
            yield from _exchange(comm, tensor, tensors)
            total = self._combine(tensors, op).view_as(tensor)
            self.results[handle] = total.tensor_split(comm.Get_size())[comm.Get_rank()].clone()

        return self._submit("reducescatter", tensor, name, process_set, _REDUCED, program)

    def allgather_async(self, tensor: Tensor, *, name: str, process_set: ProcessSet) -> int:
        def program(comm: MPI.Comm, handle: int) -> Iterator[None]:
            tensors: list[Tensor] = []
            yield from _exchange(comm, tensor, tensors)
            self.results[handle] = torch.cat(tensors)

        return self._submit("allgather", tensor, name, process_set, _MOVED, program)

    def broadcast_async_(self, tensor: Tensor, root_rank: int, *, name: str, process_set: ProcessSet) -> int:
        def program(comm: MPI.Comm, handle: int) -> Iterator[None]:
            roots = np.zeros(comm.Get_size(), dtype=np.int64)
            yield from _finish(comm.Iallgather(np.array([self.rank()]), roots))
            root = roots.tolist().index(root_rank)
            yield from _finish(comm.Ibcast(tensor.view(-1).view(torch.uint8).numpy(), root))
            self.results[handle] = tensor

        return self._submit("broadcast", tensor, name, process_set, _MOVED, program)

    def poll(self, handle: int) -> bool:
        if handle not in self.results:
            raise ValueError(f"Handle {handle} was not created or has been cleared.")
        for each in self.sets:
            while each.queue and next(each.queue[0][2], self) is self:
                each.queue.popleft()
        return self.results[handle] is not None

    def synchronize(self, handle: int) -> Tensor:
        while not self.poll(handle):
            pass
        return cast(Tensor, self.results.pop(handle))

    def _submit(
        self,
        operation: str,
        tensor: Tensor,
        name: str,
        process_set: ProcessSet,
        dtypes: tuple[torch.dtype, ...],
        program: Callable[[MPI.Comm, int], Iterator[None]],
    ) -> int:
        if tensor.dtype not in dtypes:
            raise ValueError(f"Tensor type {tensor.type()} is not supported.")
        if not tensor.is_contiguous():
            raise ValueError("Tensor is required to be contiguous.")
        if any(name == other and self.results[handle] is None for other, handle, _ in process_set.queue):
            raise RuntimeError(f"Duplicate tensor name {name}")
        self.handles += 1
        self.results[self.handles] = None
        process_set.names.append((operation, name))
        process_set.queue.append((name, self.handles, program(process_set.comm, self.handles)))
        return self.handles

    def _combine(self, tensors: list[Tensor], op: int) -> Tensor:
        stacked = torch.stack(tensors)
        if op == self.Sum:
            return stacked.sum(0, dtype=stacked.dtype)
        if op == self.Product:
            return stacked.prod(0, dtype=stacked.dtype)
        return stacked.amin(0) if op == self.Min else stacked.amax(0)


def stand_in() -> dict[str, Any]:
    """Return the modules that `import horovod.torch` is to find, by name."""
    horovod = StandIn()
    return {"horovod": SimpleNamespace(torch=horovod), "horovod.torch": horovod}


def _exchange(comm: MPI.Comm, tensor: Tensor, tensors: list[Tensor]) -> Iterator[None]:
    """Put every rank's tensor, flat, into `tensors`; their lengths may differ."""
    own = tensor.reshape(-1).view(torch.uint8).numpy()
    lengths = np.zeros(comm.Get_size(), dtype=np.int64)
    yield from _finish(comm.Iallgather(np.array([own.size]), lengths))
    everything = np.zeros(lengths.sum(), dtype=np.uint8)
    yield from _finish(comm.Iallgatherv(own, (everything, lengths.tolist())))
    tensors += [piece.view(tensor.dtype) for piece in torch.from_numpy(everything).split(lengths.tolist())]


def _finish(request: MPI.Request) -> Iterator[None]:
    while not request.Test():
        yield
