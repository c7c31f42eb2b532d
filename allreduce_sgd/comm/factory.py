"""From the options to a communicator."""

from typing import TYPE_CHECKING

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.topology import Topology

if TYPE_CHECKING:
    import torch

__all__ = ["connect"]


def connect(topology: Topology, device: "torch.device", options: CommunicationOptions) -> Communicator:
    """Make the communicator of all ranks. All ranks must call, with the same options; `device` is this rank's.

    `auto` takes single for one rank, nccl where every rank has a GPU of its own, else mpi. Raises ConfigError where
    the back end asked for does not suit.
    """
    backend = options.backend
    if backend == "auto":
        backend = _suitable(topology, device)
    if backend == "single":
        if topology.size > 1:
            raise ConfigError(f"--backend single: {topology.size} ranks were started; choose auto, mpi, nccl or gloo")
        return SingleCommunicator(options.timeout_seconds)
    if backend == "mpi":
        from allreduce_sgd.comm.mpi import MpiCommunicator
        from allreduce_sgd.comm.progress import ProgressEngine

        engine = ProgressEngine(topology.mpi_lock)
        return MpiCommunicator(topology.world, engine, options.algorithm, options.timeout_seconds)
    if backend == "nccl" and not _own_gpus(topology, device):
        raise ConfigError("--backend nccl: needs a GPU of its own for every rank; choose mpi or gloo")
    from allreduce_sgd.comm import torch_distributed

    return torch_distributed.connect(topology, backend, options.timeout_seconds)


def _suitable(topology: Topology, device: "torch.device") -> str:
    own_gpus = _own_gpus(topology, device)
    if topology.size == 1:
        return "single"
    return "nccl" if own_gpus else "mpi"


def _own_gpus(topology: Topology, device: "torch.device") -> bool:
    """Say whether every rank has a GPU that no other rank of its node uses. All ranks must call."""
    identity = None
    if device.type == "cuda":
        import torch

        # The index alone would not do: a scheduler that binds GPUs shows every rank its own as number 0.
        identity = str(torch.cuda.get_device_properties(device).uuid)
    used = topology.gather_all((topology.node, identity))
    return all(entry[1] is not None for entry in used) and len(set(used)) == len(used)
