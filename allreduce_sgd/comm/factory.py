"""From the options to a communicator."""

from typing import TYPE_CHECKING

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.deadline import deadline
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.topology import Topology

if TYPE_CHECKING:
    import torch

    from allreduce_sgd.comm.choice import Choice
    from allreduce_sgd.comm.layout import Layout
    from allreduce_sgd.comm.mpi import MpiCommunicator

__all__ = ["connect"]


def connect(
    topology: Topology, device: "torch.device", options: CommunicationOptions, choice: "Choice | None" = None
) -> Communicator:
    """Make the communicator of all ranks. All ranks must call, with the same options; `device` is this rank's.

    `choice` is the table of algorithms of the run that is being resumed, used instead of a new measurement.

    `auto` takes single for one rank, nccl where every rank has a GPU of its own, else mpi. Raises ConfigError where
    the back end asked for does not suit.
    """
    backend = options.backend
    if backend == "auto":
        backend = _suitable(topology, device, options)
    if backend not in ("mpi", "single"):
        _refuse_what_only_mpi_has(backend, options)
    if backend == "single":
        if topology.size > 1:
            raise ConfigError(
                f"--backend single: {topology.size} ranks were started; choose auto, mpi, nccl, gloo or horovod"
            )
        return SingleCommunicator(options.timeout_seconds)
    if backend == "mpi":
        return _connect_mpi(topology, options, choice)
    if backend == "horovod":
        from allreduce_sgd.comm import horovod

        return horovod.connect(topology, device, options.timeout_seconds)
    if backend == "nccl" and not _own_gpus(topology, device):
        raise ConfigError("--backend nccl: needs a GPU of its own for every rank; choose mpi or gloo")
    from allreduce_sgd.comm import torch_distributed

    return torch_distributed.connect(topology, backend, options.timeout_seconds)


def _connect_mpi(topology: Topology, options: CommunicationOptions, saved: "Choice | None") -> "MpiCommunicator":
    from allreduce_sgd.comm.choice import default_choice, named_choice
    from allreduce_sgd.comm.measure import choose, costs_of
    from allreduce_sgd.comm.mpi import MpiCommunicator
    from allreduce_sgd.comm.progress import ProgressEngine

    def choice(layout: "Layout") -> "Choice":
        shared = layout.memory is not None
        if options.algorithm == "auto":
            return default_choice(layout.nodes, layout.pairs_share, options.deterministic)
        return named_choice(options.algorithm, layout.nodes, shared, options.deterministic)

    engine = ProgressEngine(
        topology.mpi_lock,
        oversubscribed=topology.local_size > topology.cores,
        spare_cores=topology.local_size < topology.cores,
    )
    with deadline(options.timeout_seconds, topology.rank, topology.describe(), "the making of the communicator"):
        comm = MpiCommunicator(topology.world, engine, choice, options.timeout_seconds)
    costs = None
    if saved is not None and saved.suits(comm.layout.nodes, comm.layout.memory is not None):
        comm.choice = saved
    elif comm.size > 1 and options.algorithm == "auto" and not options.deterministic:
        costs = costs_of(comm)
        comm.choice = choose(comm, costs)
    if options.verbose and comm.rank == 0:
        shared = "" if comm.layout.memory is not None else "the ranks of a node share no memory here\n"
        measured = "" if costs is None else f"{costs.describe()}\n"
        print(f"{shared}{measured}{comm.choice.describe(comm.layout.nodes)}", flush=True)
    return comm


def _refuse_what_only_mpi_has(backend: str, options: CommunicationOptions) -> None:
    for flag, asked in (("--deterministic", options.deterministic), ("--algorithm", options.algorithm != "auto")):
        if asked:
            raise ConfigError(f"{flag}: --backend {backend} adds in an order of its own; choose mpi or auto")


def _suitable(topology: Topology, device: "torch.device", options: CommunicationOptions) -> str:
    own_gpus = _own_gpus(topology, device)
    if topology.size == 1:
        return "single"
    return "nccl" if own_gpus and not options.deterministic and options.algorithm == "auto" else "mpi"


def _own_gpus(topology: Topology, device: "torch.device") -> bool:
    """Say whether every rank has a GPU that no other rank of its node uses. All ranks must call."""
    identity = None
    if device.type == "cuda":
        import torch

        # The index alone would not do: a scheduler that binds GPUs shows every rank its own as number 0.
        identity = str(torch.cuda.get_device_properties(device).uuid)
    used = topology.gather_all((topology.node, identity))
    return all(entry[1] is not None for entry in used) and len(set(used)) == len(used)
