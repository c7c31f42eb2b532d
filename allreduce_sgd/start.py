"""Joining the job from a program of one's own: one call returns the communicator of all ranks."""

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.factory import connect as make_communicator
from allreduce_sgd.comm.options import ALGORITHMS, BACKENDS, CommunicationOptions
from allreduce_sgd.failure import install_excepthooks
from allreduce_sgd.topology import discover

__all__ = ["connect"]


def connect(
    backend: str = "auto", *, device: str = "auto", algorithm: str = "auto", timeout_seconds: float = 300.0
) -> Communicator:
    """Return the communicator of all ranks that the launcher started; one rank without a launcher.

    All ranks must call, once, with the same arguments. From here on an uncaught exception on any rank ends all of
    them. `backend`, `algorithm` and `timeout_seconds` are those of the command line, `device` that on which this rank
    computes. Raises ConfigError where the launcher does not fit the MPI library or the back end not the machine, and
    ValueError for an unknown name.
    """
    for name, value, known in (("backend", backend, BACKENDS), ("algorithm", algorithm, ALGORITHMS)):
        if value not in known:
            raise ValueError(f"{name}: unknown value {value!r}; choose from {', '.join(known)}")
    topology = discover(need_mpi=backend == "mpi", timeout_seconds=timeout_seconds)
    install_excepthooks(topology)
    options = CommunicationOptions(backend=backend, algorithm=algorithm, timeout_seconds=timeout_seconds)
    return make_communicator(topology, topology.choose_device(device), options)
