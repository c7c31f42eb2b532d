"""Timing collectives: contenders take turns within rounds, in an order that rotates, and every timed result is checked.

A turn: all ranks sleep until the last one is there; each puts its input into the buffer; MPI_Barrier; call; clock. So
the input is as warm in the caches as gradients are that were just computed, and no rank waits for another one's
preparations. The time of a turn is the maximum over ranks.

A small message takes less time than a core needs to wake up and to load the code of the call, so a turn of one begins
with a few calls that are not timed.
"""

import contextlib
import faulthandler
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Traffic
from allreduce_sgd.topology import Topology
from benchmarks.collective_data import CollectiveData

__all__ = ["LATE_SECONDS", "Contender", "Turns", "Wait", "measure_rounds", "measure_wait"]

LATE_SECONDS = 0.05
_SMALL_BYTES = 1 << 20
_UNTIMED_CALLS = 3


@dataclass(frozen=True)
class Contender:
    """One way of performing the collective; all ranks call together.

    `call` takes the input that stands in `buffer` and returns the tensor of the result, of which `region` is checked.
    `private` tells an algorithm of ours on a buffer that its communicator did not allocate.
    `asynchronous` tells a call that goes through the queue from one that runs in the caller. `traffic` counts what
    `call` sends, None where nobody counts it.
    """

    name: str
    variant: str
    ours: bool
    buffer: Tensor
    call: Callable[[], Tensor]
    region: slice
    asynchronous: bool = False
    private: bool = False
    algorithm: str | None = None
    traffic: Traffic | None = None


@dataclass
class Turns:
    """What came of a contender's timed turns: seconds by round, the maximum over ranks; wrong elements of all ranks
    and rounds; bytes sent per call, the mean over ranks, None where nobody counts them."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    sent_bytes: float | None = None


@dataclass(frozen=True)
class Wait:
    """What waiting for a late rank cost the punctual rank that burnt most: medians over repetitions."""

    seconds: float
    cpu_seconds: float


def measure_rounds(
    topology: Topology,
    contenders: Sequence[Contender],
    data: CollectiveData,
    warmup: int,
    timed: int,
    timeout_seconds: float,
    after_turn: Callable[[], object],
) -> list[Turns]:
    """Return the turns of each contender. All ranks must call.

    Every wait has a deadline; in a blocking call, ours or a peer's, it ends the process, which ends the job.
    """
    mine = [Turns(sent_bytes=None if _sent_bytes(each) is None else 0.0) for each in contenders]
    with _no_garbage_collection():
        for index in range(warmup + timed):
            first = index % len(contenders)
            for position in (*range(first, len(contenders)), *range(first)):
                each, turns = contenders[position], mine[position]
                with _turn(topology, each, data, index, timeout_seconds):
                    sent_before = _sent_bytes(each)
                    started = time.perf_counter()
                    result = each.call()
                    _finish(result)
                    seconds = time.perf_counter() - started
                if index >= warmup:
                    turns.seconds.append(seconds)
                    turns.wrong += data.count_wrong(result, each.region, index)
                    sent_after = _sent_bytes(each)
                    if turns.sent_bytes is not None and sent_before is not None and sent_after is not None:
                        turns.sent_bytes += (sent_after - sent_before) / timed
                after_turn()
    return [_merge(turns) for turns in zip(*topology.gather_all(mine), strict=True)]


def measure_wait(
    topology: Topology,
    contender: Contender,
    data: CollectiveData,
    repetitions: int,
    timeout_seconds: float,
) -> Wait:
    """Let the last rank come late, and return how long the others waited and what CPU time that took. All must call.

    CPU time is that of the whole process, progress threads included; it contains the collective itself, so the buffer
    should be small.
    """
    late = topology.rank == topology.size - 1
    waits = []
    for index in range(repetitions):
        with _turn(topology, contender, data, index, timeout_seconds):
            if late:
                time.sleep(LATE_SECONDS)
            started, cpu_started = time.perf_counter(), time.process_time()
            _finish(contender.call())
            waits.append((time.perf_counter() - started, time.process_time() - cpu_started))
    *punctual, _ = topology.gather_all(waits)
    busiest = [max(ranks, key=lambda wait: wait[1]) for ranks in zip(*punctual, strict=True)]
    return Wait(*(statistics.median(column) for column in zip(*busiest, strict=True)))


@contextlib.contextmanager
def _turn(
    topology: Topology, contender: Contender, data: CollectiveData, index: int, timeout_seconds: float
) -> Iterator[None]:
    # In here ranks sleep, so that those that have no part in a turn leave the cores to those that have.
    topology.gather_all(None)
    # A blocking MPI call takes no deadline and no signal reaches Python in it: a watchdog ends the process.
    faulthandler.dump_traceback_later(timeout_seconds, exit=True)
    try:
        if contender.buffer.nbytes <= _SMALL_BYTES:
            for _ in range(_UNTIMED_CALLS):
                _finish(contender.call())
        data.fill(contender.buffer, index)
        with topology.mpi_lock:
            topology.world.Barrier()
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _finish(result: Tensor) -> None:
    if result.is_cuda:
        torch.cuda.synchronize(result.device)


def _sent_bytes(contender: Contender) -> int | None:
    return None if contender.traffic is None else contender.traffic.bytes_sent


def _merge(ranks: Sequence[Turns]) -> Turns:
    sent = [turns.sent_bytes for turns in ranks if turns.sent_bytes is not None]
    return Turns(
        [max(seconds) for seconds in zip(*(turns.seconds for turns in ranks), strict=True)],
        sum(turns.wrong for turns in ranks),
        statistics.fmean(sent) if sent else None,
    )
