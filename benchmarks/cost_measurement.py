"""What a cost model is fitted to: all-reduces timed over sizes and subgroups of ranks, and additions timed alone."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.topology import Topology
from benchmarks.collective_data import CollectiveData
from benchmarks.cost_fit import Measurement
from benchmarks.rounds import Contender, measure_rounds

__all__ = ["DTYPE", "Timing", "connected", "measure_all_reduces", "measure_gamma"]

DTYPE = torch.float32
"""Of what is measured and simulated."""

_ADDITIONS = 25
_ADDED_BYTES = 1 << 20
_REPETITIONS = 50
"""An addition is repeated until so many bytes are added, or so often, since the clock takes time too."""


@dataclass(frozen=True)
class Timing:
    """One algorithm at one size and number of ranks; a round's time is the maximum over ranks."""

    measurement: Measurement
    minimum_seconds: float
    maximum_seconds: float

    @property
    def n_bytes(self) -> int:
        return self.measurement.length * self.measurement.item_bytes


@contextmanager
def connected(
    topology: Topology, algorithms: Sequence[str], ranks: int, timeout_seconds: float
) -> Iterator[dict[str, Communicator]]:
    """Yield a communicator for each algorithm, of the first `ranks` ranks. All ranks must enter and leave.

    The other ranks get communicators of their own, which they do not use.
    """
    with ExitStack() as stack:
        found = {}
        for name in algorithms:
            options = CommunicationOptions("mpi", algorithm=name, timeout_seconds=timeout_seconds)
            whole = stack.enter_context(closing(connect(topology, torch.device("cpu"), options)))
            part = whole.split(int(topology.rank >= ranks), topology.rank)
            found[name] = stack.enter_context(closing(part))
        yield found


def measure_all_reduces(
    topology: Topology,
    comms: Mapping[str, Communicator],
    ranks: int,
    sizes_bytes: Sequence[int],
    warmup: int,
    rounds: int,
    timeout_seconds: float,
) -> list[Timing]:
    """Time every algorithm at every size with the first `ranks` ranks, in turns. All ranks of the job must call.

    Raises RuntimeError where a result is wrong.
    """
    takes_part = topology.rank < ranks
    lengths = [size_bytes // DTYPE.itemsize for size_bytes in sizes_bytes]
    data = CollectiveData("all_reduce", topology.rank if takes_part else 0, ranks, max(lengths), DTYPE)
    cases = [(name, length) for length in lengths for name in comms]
    contenders = [_contender(name, comms[name], length, takes_part) for name, length in cases]
    turns = measure_rounds(topology, contenders, data, warmup, rounds, timeout_seconds, lambda: None)
    found = []
    for (name, length), each in zip(cases, turns, strict=True):
        if each.wrong:
            raise RuntimeError(f"{name}, {ranks} ranks, {length} elements: {each.wrong} wrong elements")
        measurement = Measurement(name, ranks, length, DTYPE.itemsize, statistics.median(each.seconds))
        found.append(Timing(measurement, min(each.seconds), max(each.seconds)))
    return found


def measure_gamma(topology: Topology, ranks: int, classes_bytes: Sequence[int]) -> dict[int, float]:
    """Return the seconds per byte of adding a received message of each size, with `ranks` ranks adding at once.

    Median over repetitions, then over ranks. All ranks of the job must call.
    """
    mine = {}
    for message_bytes in classes_bytes:
        topology.gather_all(None)
        if topology.rank < ranks:
            mine[message_bytes] = _addition_seconds(message_bytes) / message_bytes
    everyone = [found for found in topology.gather_all(mine) if found]
    return {each: statistics.median(found[each] for found in everyone) for each in classes_bytes}


def _contender(name: str, comm: Communicator, length: int, takes_part: bool) -> Contender:
    buffer = comm.allocate(length, DTYPE, torch.device("cpu"))

    def reduce() -> Tensor:
        return comm.all_reduce(buffer).wait() if takes_part else buffer

    region = slice(0, length if takes_part else 0)
    return Contender(name, "in_place", ours=True, buffer=buffer, call=reduce, region=region)


def _addition_seconds(message_bytes: int) -> float:
    numel = max(1, message_bytes // DTYPE.itemsize)
    total, message = torch.zeros(numel, dtype=DTYPE), torch.ones(numel, dtype=DTYPE)
    repetitions = max(1, min(_REPETITIONS, _ADDED_BYTES // message_bytes))
    samples = []
    for _ in range(_ADDITIONS):
        started = time.perf_counter()
        for _ in range(repetitions):
            total.add_(message)
        samples.append((time.perf_counter() - started) / repetitions)
    return statistics.median(samples)
