"""These tests run under mpirun, each rank one pytest; `tests/test_under_mpirun.py` starts them.

A test that fails on one rank would leave the others waiting for it, so the failure is printed and the job aborted.
"""

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.topology import Topology, discover

collect_ignore_glob = [] if "ALLREDUCE_SGD_UNDER_MPIRUN" in os.environ else ["test_*.py"]

TIMEOUT_SECONDS = 60.0


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK", "?")
        print(f"\nrank {rank}: {report.nodeid} failed\n{report.longreprtext}", file=sys.stderr, flush=True)
        from mpi4py import MPI

        # The launcher drops what a rank wrote last if it aborts before that was read.
        time.sleep(0.5)
        MPI.COMM_WORLD.Abort(1)


@pytest.fixture(scope="session")
def topology() -> Topology:
    torch.set_num_threads(1)
    return discover(need_mpi=True, timeout_seconds=TIMEOUT_SECONDS)


def connected(topology: Topology, backend: str, algorithm: str = "auto") -> Communicator:
    if backend == "nccl" and torch.cuda.device_count() < topology.size:
        pytest.skip("needs a GPU per rank")
    device = topology.choose_device("cuda" if backend == "nccl" else "cpu")
    return connect(topology, device, CommunicationOptions(backend, algorithm, timeout_seconds=TIMEOUT_SECONDS))


@pytest.fixture(scope="session", params=["mpi", "gloo", pytest.param("nccl", marks=pytest.mark.cuda), "single"])
def any_comm(request: pytest.FixtureRequest, topology: Topology) -> Iterator[Communicator]:
    """Every communicator in turn."""
    if request.param == "single" and topology.size > 1:
        pytest.skip("one rank only")
    comm = connected(topology, request.param)
    yield comm
    comm.close()


@pytest.fixture(scope="session")
def comm(topology: Topology) -> Iterator[Communicator]:
    """Our own communicator."""
    made = connected(topology, "mpi")
    yield made
    made.close()


@pytest.fixture(scope="module")
def gloo(topology: Topology) -> Iterator[Any]:
    """A process group of torch.distributed over Gloo, for torch's own DistributedDataParallel and hooks."""
    made: Any = connected(topology, "gloo")
    yield torch.distributed.group.WORLD if made._group is None else made._group
    made.close()
