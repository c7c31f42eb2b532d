"""Measures a training step of DistributedDataParallel, the truth that predictions are held against."""

import statistics
from dataclasses import dataclass

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.topology import Topology
from benchmarks.scaling.compute import workload
from benchmarks.step_contenders import own_contender

__all__ = ["Measured", "StepProbe"]


@dataclass(frozen=True)
class Measured:
    """Seconds of a step: the mean over a round's steps, the maximum over ranks, and of these the median over rounds."""

    workload: str
    ranks: int
    median_seconds: float
    minimum_seconds: float
    maximum_seconds: float
    rounds: int


class StepProbe:
    """Takes steps of one workload. All ranks must make it, and call `turn`, together."""

    def __init__(self, name: str, topology: Topology, comm: Communicator) -> None:
        self._name = name
        self._topology = topology
        work = workload(name)
        self._batch = work.batch(comm.rank)
        self._contender = own_contender("ddp", work, comm, "sgd")
        self._rounds: list[float] = []

    def turn(self, steps: int) -> None:
        """Take `steps` timed steps from the start, after some untimed ones: buckets are cut anew after the first."""
        self._contender.reset()
        self._contender.turn(self._batch, max(2, steps // 4))
        self._topology.gather_all(None)
        mine = self._contender.turn(self._batch, steps).seconds
        self._rounds.append(max(self._topology.gather_all(mine)))

    def result(self) -> Measured:
        low, high = min(self._rounds), max(self._rounds)
        middle = statistics.median(self._rounds)
        return Measured(self._name, self._topology.size, middle, low, high, len(self._rounds))
