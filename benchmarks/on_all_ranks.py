"""Runs a benchmark that needs several ranks: same arguments everywhere, one rank that complains, one exit status."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.failure import install_excepthooks
from allreduce_sgd.topology import Topology, discover, launcher_rank

__all__ = ["complain", "on_all_ranks"]

# A simulation of thousands of ranks may take that long.
_LONGEST_WAIT_SECONDS = 3600.0


def complain(program: str, problem: ConfigError) -> None:
    print(f"{program}: error: {problem}", file=sys.stderr, flush=True)


def on_all_ranks(
    program: str,
    parse: Callable[[], argparse.Namespace],
    check: Callable[[argparse.Namespace], None],
    run: Callable[[Topology, argparse.Namespace], None],
) -> int:
    """Parse on every rank, check on rank 0, run on all; return the exit status, 2 after a ConfigError of any."""
    try:
        # Every rank parses, but only one prints --help.
        with contextlib.redirect_stdout(sys.stdout if launcher_rank(os.environ) == 0 else io.StringIO()):
            options = parse()
        topology = discover(timeout_seconds=options.timeout_seconds)
        if topology.size < 2:
            raise ConfigError("there is nothing to measure with one rank; start with mpirun -np 2 or more")
    except ConfigError as problem:
        if launcher_rank(os.environ) == 0:
            complain(program, problem)
        return 2
    install_excepthooks(topology)
    try:
        topology.agree(lambda: check(options) if topology.rank == 0 else None)
        run(topology, options)
    except ConfigError as problem:
        if problem.rank in (None, topology.rank):
            complain(program, problem)
        return 2
    # MPI ends with a collective, in which the other ranks would spin while rank 0 computes: here they sleep.
    topology.gather_all(None, _LONGEST_WAIT_SECONDS)
    return 0
