"""A rank that hangs: the others end at the deadline and name the step, the bucket, the operation and who has not come.

The launcher then ends the one that hangs too, which takes no other signal than SIGKILL.
"""

import uuid
from pathlib import Path

import pytest

from tests.faults.jobs import assert_nothing_left, ended_after_fault, newest_step
from tests.launching import mpirun

# Rank 1 stops itself before MPI has been started on it, so that rank 0 waits within MPI_Init.
STOPS_AT_START = """
import os, signal, sys
from allreduce_sgd.topology import launcher_rank
if launcher_rank(os.environ) == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
from allreduce_sgd.train import main
sys.exit(main(["--timeout-seconds", "10"]))
"""

# Rank 1 stops itself when all is done, before it ends MPI: rank 0 waits for it within MPI_Finalize.
STOPS_AT_END = """
import atexit, os, signal, sys
from allreduce_sgd.topology import launcher_rank
from allreduce_sgd.train import main
def stop():
    if launcher_rank(os.environ) == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
{early}
status = main(["--steps", "4", "--timeout-seconds", "10", "--output", sys.argv[1]])
{late}
sys.exit(status)
"""


def test_a_rank_that_hangs_is_named_with_what_it_did_not_come_to(tmp_path: Path) -> None:
    done = ended_after_fault(tmp_path, "stop compute 1 6", "--timeout-seconds", "10")
    assert done.status == 1
    assert done.errors.count("rank 0 of 2 on ") == 1
    headline = next(line for line in done.errors.splitlines() if line.startswith("rank 0 of 2 on "))
    assert ": CommunicationTimeout: step 6: bucket 1 of 1: reduce_scatter of " in headline
    assert "not finished after 10 s; rank 1 has not answered; rank 0 has come to it" in headline
    assert done.errors.count("Traceback") == 1
    assert newest_step(tmp_path / "run") == 4


def test_a_rank_that_hangs_before_mpi_is_up_ends_the_job_too() -> None:
    name = str(uuid.uuid4())
    done = mpirun(2, ["-c", STOPS_AT_START], timeout_seconds=100, environment={"FAULT_TEST": name})
    assert done.status != 0
    told = "the start of MPI not finished after 10 s; another rank is stuck, gone or late"
    assert done.errors.count(told) == 1
    assert "rank 0 on " in done.errors
    assert_nothing_left(name, None)


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_rank_that_hangs_as_it_exits_ends_the_job_too(when: str, tmp_path: Path) -> None:
    # Exit handlers run last come first: one made early stops a rank that is already watched, a late one the other kind.
    program = STOPS_AT_END.format(**{"early": "", "late": "", when: "atexit.register(stop)"})
    name = str(uuid.uuid4())
    done = mpirun(2, ["-c", program, str(tmp_path / "run")], timeout_seconds=100, environment={"FAULT_TEST": name})
    assert done.status != 0
    assert done.errors.count("the end of MPI not finished after 10 s; this rank or another is stuck") == 1
    assert "rank 0 of 2 on " in done.errors
    assert newest_step(tmp_path / "run") == 4
    assert_nothing_left(name, None)
