"""Clocks of several ranks, and what a recorder sees of real works."""

import itertools
import time

import torch
from torch import nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.clock import clock_offsets
from allreduce_sgd.gradients.ddp import DistributedDataParallel
from allreduce_sgd.trace import StepRecorder, gather_trace


def test_processes_of_a_machine_have_one_clock(comm: Communicator) -> None:
    assert all((offset.seconds, offset.uncertainty_seconds) == (0, 0) for offset in clock_offsets(comm))


def test_an_estimate_is_right_within_its_uncertainty(comm: Communicator) -> None:
    """The clock of rank r runs 1000 r seconds ahead, as it might on another machine."""
    offsets = clock_offsets(comm, lambda: time.perf_counter() + 1000 * comm.rank, identity=str(comm.rank))
    assert len(offsets) == comm.size
    for rank, offset in enumerate(offsets):
        assert abs(offset.seconds - 1000 * rank) <= offset.uncertainty_seconds
        # The shortest of many round trips, on one machine.
        assert offset.uncertainty_seconds < 0.02
        assert (offset.uncertainty_seconds > 0) == (rank > 0)


def test_ranks_of_one_clock_are_not_measured(comm: Communicator) -> None:
    """Rank 0's machine has all even ranks; their readings may be whatever they are."""
    offsets = clock_offsets(comm, lambda: time.perf_counter() + comm.rank, identity=str(comm.rank % 2))
    assert [offset.uncertainty_seconds > 0 for offset in offsets] == [rank % 2 == 1 for rank in range(comm.size)]


def test_every_bucket_is_shown_once_in_order_of_launch(comm: Communicator) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    replica = DistributedDataParallel(module, comm, bucket_mb=0.01, first_bucket_mb=0.001)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    recorder = StepRecorder(replica, optimizer, comm)
    for _ in range(3):
        with recorder.recording():
            optimizer.zero_grad()
            replica(torch.ones(2, 64)).sum().backward()
            optimizer.step()
    spans = gather_trace(recorder, comm)[comm.rank].spans
    buckets = replica.bucket_bytes()
    reductions = [span for span in spans if span.name.startswith("all_reduce")]
    assert [span.name for span in reductions] == [f"all_reduce {index}" for index in range(len(buckets))]
    if comm.size == 1:
        return
    assert len(buckets) > 1
    # With the last go flags of the parameters.
    assert [span.arguments["bytes"] for span in reductions][:-1] == buckets[:-1]
    assert reductions[-1].arguments["bytes"] >= buckets[-1]
    ends = [span.end_seconds for span in reductions]
    assert ends == sorted(ends)
    for before, after in itertools.pairwise(reductions):
        assert after.turn_seconds is not None
        assert after.turn_seconds >= before.end_seconds
    assert all(span.start_seconds <= (span.turn_seconds or 0) <= span.end_seconds for span in reductions)
