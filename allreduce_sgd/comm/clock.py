"""How far the ranks' clocks are apart, so that what they measured can be laid on one time axis.

time.perf_counter is the kernel's monotonic clock on Linux, one for all processes of a machine that share a time
namespace: those are exactly 0 apart, which is known and not measured. Every other rank plays ping-pong with rank 0.
Its answer, a reading t of its clock, was written between the readings a and b of rank 0's clock before and after, so
that it is ahead by t - (a + b)/2, with an error of at most (b - a)/2; the shortest round trip counts (Cristian,
"Probabilistic clock synchronization", Distributed Computing 3, 1989). Clocks drift apart by some 10 µs a second, so
the estimate holds for about a second.

Steps: 2 messages of 8 bytes per round trip.
"""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object

__all__ = ["ClockOffset", "clock_identity", "clock_offsets"]

_ROUND_TRIPS = 50
_TAG = 31_001


@dataclass(frozen=True)
class ClockOffset:
    """A rank's clock is ahead of rank 0's by `seconds`, give or take `uncertainty_seconds`."""

    seconds: float
    uncertainty_seconds: float


def clock_identity() -> str:
    """Return the same text in all processes whose time.perf_counter is one clock."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/time')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"


def clock_offsets(
    comm: Communicator, clock: Callable[[], float] = time.perf_counter, identity: str | None = None
) -> list[ClockOffset]:
    """Return, for every rank, how far its `clock` is ahead of rank 0's. All ranks must call.

    Ranks of one `identity` (None: that of the machine's clock) have one clock.
    """
    identities = all_gather_object(comm, clock_identity() if identity is None else identity)
    offsets = []
    for rank, theirs in enumerate(identities):
        measured = [0.0, 0.0]
        if theirs != identities[0]:
            if comm.rank == 0:
                measured = _ask(comm, rank, clock)
            elif comm.rank == rank:
                _answer(comm, clock)
        offsets.append(measured)
    # Only rank 0 knows.
    return [ClockOffset(seconds, uncertainty) for seconds, uncertainty in all_gather_object(comm, offsets)[0]]


def _ask(comm: Communicator, rank: int, clock: Callable[[], float]) -> list[float]:
    question, answer = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    trips = []
    for _ in range(_ROUND_TRIPS):
        received = comm.receive(answer, rank, _TAG)
        before = clock()
        comm.send(question, rank, _TAG).wait()
        received.wait()
        after = clock()
        trips.append((after - before, float(answer) - (before + after) / 2))
    round_trip, offset = min(trips)
    return [offset, round_trip / 2]


def _answer(comm: Communicator, clock: Callable[[], float]) -> None:
    question = torch.zeros(1, dtype=torch.float64)
    for _ in range(_ROUND_TRIPS):
        comm.receive(question, 0, _TAG).wait()
        comm.send(torch.tensor([clock()], dtype=torch.float64), 0, _TAG).wait()
