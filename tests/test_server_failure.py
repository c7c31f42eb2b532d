"""When a worker or a server fails or dies, the job ends within seconds, and the cause is told."""

import pytest

from tests.warm_start import mpirun

JOB = """
import os, sys
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.failure import install_excepthooks
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.options import StrategyOptions
from allreduce_sgd.topology import discover
from tests.mpi.server_job import Job, at_own_pace, in_step
from tests.mpi.test_strategies import network

strategy, victim, way = sys.argv[1], int(sys.argv[2]), sys.argv[3]
topology = discover(need_mpi=True, timeout_seconds=60)
install_excepthooks(topology)
seconds = 3 if way == "sleep" else 60
comm = connect(topology, topology.choose_device("cpu"), CommunicationOptions(backend="mpi", timeout_seconds=seconds))
job = Job(comm, StrategyOptions(strategy=strategy), OptimizerOptions(lr=0.1), network())
train = in_step if strategy == "server-sync" else at_own_pace

def fail(step=0):
    if way == "kill":
        os.kill(os.getpid(), 9)
    if way == "sleep":
        import time
        time.sleep(1000)
    raise ArithmeticError("the third step went wrong")

def work(worker):
    train(worker, 0, 3, 6)
    if comm.rank == victim:
        fail()
    with worker.consensus():
        pass
    worker.before_checkpoint(3)
    train(worker, 3, 1000, 6)

if comm.rank == victim:
    job._save = fail
job.run(work)
"""


@pytest.mark.parametrize(
    ("strategy", "way", "victim"),
    [
        ("server-sync", "raise", 1),
        ("server-async", "raise", 2),
        ("server-sync", "kill", 2),
        ("server-async", "kill", 1),
    ],
)
def test_a_rank_that_fails_ends_the_job(strategy: str, way: str, victim: int) -> None:
    done = mpirun(3, ["-c", JOB, strategy, str(victim), way], timeout_seconds=60)
    assert done.status != 0
    if way == "raise":
        assert f"rank {victim} of 3 on " in done.errors
        assert "ArithmeticError: the third step went wrong" in done.errors
        assert done.errors.count("Traceback") == 1
    # Starting takes most of it; ranks that waited for their deadline would take 60 s.
    assert done.seconds < 50


@pytest.mark.parametrize("victim", [1, 2], ids=["worker", "server"])
def test_a_rank_that_hangs_ends_the_job_at_the_deadline(victim: int) -> None:
    done = mpirun(3, ["-c", JOB, "server-async", str(victim), "sleep"], timeout_seconds=60)
    assert done.status != 0
    assert "CommunicationTimeout" in done.errors
    assert done.seconds < 50
