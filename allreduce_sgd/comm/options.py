"""The options of communication."""

from dataclasses import dataclass

from allreduce_sgd.options import option

__all__ = ["ALGORITHMS", "BACKENDS", "CommunicationOptions"]

BACKENDS = ("auto", "mpi", "nccl", "gloo", "single")
ALGORITHMS = ("auto", "ring")


@dataclass(frozen=True)
class CommunicationOptions:
    backend: str = option(
        "auto",
        "what carries the data: mpi (our own collectives over MPI), nccl or gloo (through torch.distributed), single "
        "(no communication, one rank); auto takes nccl if every rank has its own GPU, else mpi",
        choices=BACKENDS,
    )
    algorithm: str = option("auto", "all-reduce algorithm of the mpi back end; auto takes ring", choices=ALGORITHMS)
    timeout_seconds: float = option(
        300.0,
        "deadline of every wait for other ranks; past it the job ends and says what it waited for",
        above=0,
        maximum=1e6,
    )
