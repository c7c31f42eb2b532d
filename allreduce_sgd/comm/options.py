"""The options of communication."""

from dataclasses import dataclass

from allreduce_sgd.options import option

__all__ = ["ALGORITHMS", "BACKENDS", "CommunicationOptions"]

BACKENDS = ("auto", "mpi", "nccl", "gloo", "horovod", "single")
ALGORITHMS = (
    "auto",
    "shared-memory",
    "two-level",
    "ring",
    "segmented-ring",
    "recursive-doubling",
    "halving-doubling",
    "tree",
    "chain",
    "mpi",
)


@dataclass(frozen=True)
class CommunicationOptions:
    backend: str = option(
        "auto",
        "what carries the data: mpi (our own collectives over MPI), nccl or gloo (through torch.distributed), horovod "
        "(where it is installed), single (no communication, one rank); auto takes nccl if every rank has its own GPU, "
        "else mpi",
        choices=BACKENDS,
    )
    algorithm: str = option(
        "auto",
        "all-reduce algorithm of the mpi back end: shared-memory (one node), two-level (shared memory inside nodes, "
        "several lanes between them), mpi (MPI's own); the others are schedules over all ranks; auto measures what "
        "messages cost here, once per set of hosts, and takes the cheapest for every size",
        choices=ALGORITHMS,
    )
    deterministic: bool = option(
        False,
        "add in an order that does not depend on bucket and segment sizes, so that these do not change a single bit; "
        "the same ranks on the same nodes always give the same bits",
    )
    verbose: bool = option(False, "print what messages were measured to cost, and the algorithm of every bucket")
    timeout_seconds: float = option(
        300.0,
        "deadline of every wait for other ranks; past it the job ends and says what it waited for",
        above=0,
        maximum=1e6,
    )
