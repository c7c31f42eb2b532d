"""The collectives of others, in their usual form: in place (but reduce-scatter), synchronous, on an ordinary tensor.

- mpi      MPI_Allreduce and its kin with MPI_IN_PLACE, blocking, through mpi4py's buffer interface
- gloo     torch.distributed's collectives
- nccl     likewise, where every rank has a GPU of its own
- horovod  hvd.allreduce_, where Horovod is importable

MPI's calls block without a deadline; `rounds` has one for them. Gloo's and NCCL's is the process group's.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.schedules.step import chunk
from allreduce_sgd.topology import Topology

__all__ = ["PEERS", "Peers"]

PEERS = ("mpi", "gloo", "nccl", "horovod")

# The others are left out: MPI has no bfloat16, and mpi4py no name for float16.
_MPI_NAMES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.int32: "INT32_T",
    torch.int64: "INT64_T",
    torch.uint8: "UINT8_T",
}

Call = Callable[[], Tensor]


class Peers:
    """Those of the peers named that can run here; `left_out` says in a line each which cannot, and why.

    All ranks must call the constructor, `call` and `close`, with the same arguments.
    """

    def __init__(
        self, topology: Topology, device: torch.device, names: tuple[str, ...], timeout_seconds: float
    ) -> None:
        self._topology = topology
        self._group: Communicator | None = None
        self._horovod: Any = None
        self.names: list[str] = []
        self.left_out: list[str] = []
        for name in names:
            why = self._start(name, device, timeout_seconds)
            if why is None:
                self.names.append(name)
            else:
                self.left_out.append(f"{name}: {why}, left out")

    def call(self, name: str, operation: str, buffer: Tensor) -> Call | None:
        """Return what performs the operation in place on `buffer`, None where the peer has no such thing."""
        make = {"mpi": self._mpi, "horovod": self._by_horovod}.get(name, self._torch)
        return make(operation, buffer)

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        if self._horovod is not None:
            self._horovod.shutdown()

    def _start(self, name: str, device: torch.device, timeout_seconds: float) -> str | None:
        """Start a peer, and return why it cannot run here, if so."""
        if name == "mpi":
            return None if device.type == "cpu" else "takes tensors on the CPU only"
        if name == "horovod":
            return self._start_horovod()
        if (name == "nccl") != (device.type == "cuda"):
            return "takes tensors on a GPU only" if name == "nccl" else "takes tensors on the CPU only"
        try:
            self._group = connect(self._topology, device, CommunicationOptions(name, timeout_seconds=timeout_seconds))
        except ConfigError as problem:
            return str(problem)
        return None

    def _start_horovod(self) -> str | None:
        installed = importlib.util.find_spec("horovod") is not None
        if not all(self._topology.gather_all(installed)):
            return "not installed"
        why: str | None = None
        try:
            import horovod.torch as horovod

            horovod.init()
            if horovod.size() == self._topology.size:
                self._horovod = horovod
            else:
                why = f"sees {horovod.size()} ranks of {self._topology.size}"
        except (ImportError, RuntimeError, ValueError) as problem:
            why = " ".join(str(problem).split())
        return next((other for other in self._topology.gather_all(why) if other is not None), None)

    def _mpi(self, operation: str, buffer: Tensor) -> Call | None:
        if buffer.dtype not in _MPI_NAMES:
            return None
        from mpi4py import MPI

        world, lock = self._topology.world, self._topology.mpi_lock
        kind = getattr(MPI, _MPI_NAMES[buffer.dtype])
        size, rank = self._topology.size, self._topology.rank
        chunks = [chunk(buffer.numel(), size, index) for index in range(size)]
        counts, starts = [part.stop - part.start for part in chunks], [part.start for part in chunks]
        whole = [buffer.numpy(), buffer.numel(), kind]
        parts = [buffer.numpy(), (counts, starts), kind]
        result = self._result(operation, buffer)
        mine = [result[chunks[rank]].numpy(), counts[rank], kind]
        perform: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: world.Allreduce(MPI.IN_PLACE, whole),
            "reduce_scatter": lambda: world.Reduce_scatter(whole, mine, counts),
            "all_gather": lambda: world.Allgatherv(MPI.IN_PLACE, parts),
            "broadcast": lambda: world.Bcast(whole, root=0),
        }
        chosen = perform[operation]

        def call() -> Tensor:
            with lock:
                chosen()
            return result

        return call

    def _torch(self, operation: str, buffer: Tensor) -> Call | None:
        # Gathers and scatters of torch want equal chunks.
        size = self._topology.size
        if operation in ("all_gather", "reduce_scatter") and buffer.numel() % size:
            return None
        result = self._result(operation, buffer)
        mine = result[chunk(buffer.numel(), size, self._topology.rank)]
        # Newer versions of torch warn about the old names.
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        perform: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(buffer),
            "reduce_scatter": lambda: scatter(mine, buffer),
            "all_gather": lambda: gather(buffer, mine),
            "broadcast": lambda: dist.broadcast(buffer, 0),
        }
        chosen = perform[operation]

        def call() -> Tensor:
            chosen()
            return result

        return call

    def _result(self, operation: str, buffer: Tensor) -> Tensor:
        # No library has a reduce-scatter whose result stays at the rank's own place.
        return torch.zeros_like(buffer) if operation == "reduce_scatter" else buffer

    def _by_horovod(self, operation: str, buffer: Tensor) -> Call | None:
        horovod = self._horovod
        if operation == "all_reduce":
            return lambda: horovod.allreduce_(buffer, op=horovod.Sum, name=f"all_reduce.{buffer.numel()}")
        if operation == "broadcast":
            return lambda: horovod.broadcast_(buffer, 0, name=f"broadcast.{buffer.numel()}")
        return None
