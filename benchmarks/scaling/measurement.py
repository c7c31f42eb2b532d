"""Measures a profile: computing of each workload, all-reduces, what hooks and codecs cost. All ranks take part.

Computing is measured with all ranks at once and without communication: seconds of every step, so that their spread over
ranks and steps is known too, and when the gradient of each parameter arrives, so that buckets of any size can be cut
afterwards. How much slower it is beside a reduction is measured by `benchmarks.overlap`.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.choice import SHARED_MEMORY
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.base import drive
from allreduce_sgd.compression.build import build_codec
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.schedules.simulate import LinkBySize
from allreduce_sgd.topology import Topology
from benchmarks.contenders import OPTIMIZERS
from benchmarks.cost_measurement import DTYPE, connected, measure_all_reduces, measure_gamma
from benchmarks.overlap import OverlapProbe
from benchmarks.prediction import compare
from benchmarks.scaling.compute import workload
from benchmarks.scaling.profile import Compute

__all__ = ["ComputeProbe", "NetworkPrices", "codec_seconds_per_byte", "measure_network"]

_REGIMES = 3
_CODED_ELEMENTS = 1 << 20
_CODINGS = 7


@dataclass(frozen=True)
class _Turn:
    """One rank's part of a round: (forward, backward, optimizer) of each step, and mean arrivals of gradients."""

    steps: Sequence[tuple[float, float, float]]
    arrivals: Sequence[float]


class ComputeProbe:
    """Measures how one workload computes. All ranks must make it, and call `turn` and `result`, together."""

    def __init__(self, name: str, topology: Topology, comm: Communicator) -> None:
        self._name = name
        self._topology = topology
        self._workload = workload(name)
        self._batch = self._workload.batch(comm.rank)
        self._module = self._workload.build()
        self._parameters = list(self._module.parameters())
        self._start = [parameter.detach().clone() for parameter in self._parameters]
        self._stepper = OPTIMIZERS["sgd"]([{"params": self._parameters}])
        self._arrived = [0.0] * len(self._parameters)
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(_Arrival(self._arrived, index))
        self._overlap = OverlapProbe(self._workload, comm, "sgd")
        self._turns: list[list[_Turn]] = []
        self._contention: list[float] = []

    def turn(self, steps: int) -> None:
        """Take `steps` timed steps from the start, after some untimed ones."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._start, strict=True):
                parameter.copy_(value)
        self._stepper.state.clear()
        self._steps(max(1, steps // 4))
        self._topology.gather_all(None)
        self._turns.append(self._topology.gather_all(self._steps(steps)))
        self._contention.append(self._overlap.turn(steps).contention)

    def result(self) -> tuple[Compute, list[float]]:
        """Return the computing, and the seconds of all steps of all ranks divided by the mean of their rank and round.

        The same on all ranks.
        """
        phases = []
        for phase in range(3):
            rounds = [
                statistics.fmean(statistics.fmean(step[phase] for step in turn.steps) for turn in ranks)
                for ranks in self._turns
            ]
            phases.append(statistics.median(rounds))
        arrivals = [
            statistics.median(statistics.fmean(turn.arrivals[index] for turn in ranks) for ranks in self._turns)
            for index in range(len(self._parameters))
        ]
        factors = []
        for turn in (turn for ranks in self._turns for turn in ranks):
            sums = [sum(step) for step in turn.steps]
            factors += [each / statistics.fmean(sums) for each in sums]
        sizes = tuple(parameter.nbytes for parameter in self._parameters)
        batch_size, contention = self._workload.batch_size, statistics.median(self._contention)
        forward, backward, optimizer = phases
        compute = Compute(
            self._name, batch_size, sizes, forward, backward, optimizer, tuple(arrivals), max(1.0, contention)
        )
        return compute, factors

    def _steps(self, count: int) -> _Turn:
        steps, sums = [], [0.0] * len(self._parameters)
        for _ in range(count):
            start = time.perf_counter()
            self._stepper.zero_grad()
            cleared = time.perf_counter()
            loss = functional.cross_entropy(self._module(self._batch[0]), self._batch[1])
            computed = time.perf_counter()
            loss.backward()
            differentiated = time.perf_counter()
            self._stepper.step()
            updated = time.perf_counter() - differentiated + cleared - start
            steps.append((computed - cleared, differentiated - computed, updated))
            sums = [total + arrived - computed for total, arrived in zip(sums, self._arrived, strict=True)]
        return _Turn(steps, [total / count for total in sums])


@dataclass(frozen=True)
class NetworkPrices:
    """What was measured of all-reduces, as in a Profile."""

    link: LinkBySize
    call_seconds: float
    duplex: bool
    shared_seconds: tuple[tuple[int, float], ...]


def measure_network(
    topology: Topology,
    cores: int,
    algorithms: Sequence[str],
    sizes_bytes: Sequence[int],
    rounds: int,
    timeout_seconds: float,
) -> NetworkPrices:
    """Fit α and β, and on one node also time all-reduces through its memory; `cores` in all. All ranks must call.

    Raises ConfigError where the ranks of the node cannot share memory.
    """
    one_node = topology.nodes == 1
    measured = [*algorithms, *((SHARED_MEMORY,) if one_node else ())]
    with connected(topology, measured, topology.size, timeout_seconds) as comms:
        timings = measure_all_reduces(
            topology, comms, topology.size, (0, *sizes_bytes), max(1, rounds // 4), rounds, timeout_seconds
        )
    classes = [1 << power for power in range((2 * max(sizes_bytes)).bit_length())]
    gamma = measure_gamma(topology, min(topology.size, cores), classes)
    programs = {name: ALL_REDUCE[name].columns(None) for name in algorithms}
    messages = [each for each in timings if each.measurement.algorithm != SHARED_MEMORY]
    rows, link = compare(messages, programs, gamma, cores, _REGIMES, duplex=not one_node)
    call_seconds = next(row["call_seconds"] for row in rows if row["kind"] == "link")
    shared = tuple(
        (each.n_bytes, each.measurement.seconds) for each in timings if each.measurement.algorithm == SHARED_MEMORY
    )
    return NetworkPrices(link, call_seconds, not one_node, shared)


def codec_seconds_per_byte(name: str) -> float:
    """Return what encoding and decoding takes on this core per byte of a signal, alone: the median of some turns."""
    make = build_codec(CompressionOptions(name), seed=0, rank=0, size=1)
    if make is None:
        return 0.0
    signal = torch.randn(_CODED_ELEMENTS, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    codec = make([signal])
    comm = SingleCommunicator()
    seconds = []
    for _ in range(_CODINGS):
        started = time.perf_counter()
        drive(codec.reduce(signal, comm))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / signal.nbytes


class _Arrival:
    """A hook that notes when the gradient of a parameter is there."""

    def __init__(self, times: list[float], index: int) -> None:
        self._times = times
        self._index = index

    def __call__(self, parameter: nn.Parameter) -> None:
        self._times[self._index] = time.perf_counter()
