"""All ranks stop at the same step, whoever is asked, whether they step together or drift apart."""

import time

import pytest

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.stopping import stop_point

FIRST, LIMIT = 3, 3000


def steps_taken(comm: Communicator, asked_at: int, together: bool) -> int:
    """Take steps until the last rank, asked at step `asked_at`, has stopped all; return where they ended."""
    step = FIRST
    stop = stop_point(comm, lambda: comm.rank == comm.size - 1 and step >= asked_at, FIRST)
    while step < LIMIT and not stop.reached(step):
        if together:
            comm.barrier().wait()
        # Nobody is in step with another one.
        time.sleep(0.0005 * (1 + comm.rank))
        step += 1
    ends = all_gather_object(comm, step)
    assert len(set(ends)) == 1, ends
    return step


def test_ranks_that_drift_apart_stop_at_the_same_step(any_comm: Communicator) -> None:
    assert 20 <= steps_taken(any_comm, asked_at=20, together=False) < LIMIT


@pytest.mark.parametrize("asked_at", [FIRST, 20])
def test_on_one_node_it_is_the_next_step(comm: Communicator, asked_at: int) -> None:
    before = comm.traffic.bytes_sent
    end = steps_taken(comm, asked_at, together=True)
    # Others may have begun the step after the one that the asked rank has ended.
    assert max(asked_at, FIRST + 1) <= end <= asked_at + 1
    if comm.size == 1:
        assert comm.traffic.bytes_sent == before
