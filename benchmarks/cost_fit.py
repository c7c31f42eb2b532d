"""From measured times of all-reduces to α, β and γ, and the error of what they predict.

The fit knows the algorithms only through the simulator: what one of them takes is Σ over classes of message size of
(messages·α + bytes·β + reduced bytes·γ) on its critical path, and the simulator counts each of these by running with
that price at 1 and all others at 0. What a call costs before and after its messages, and γ, are measured on their own,
so the unknowns are α and β of each regime. They minimise
Σ |predicted/measured - 1|, none below 0: a linear program. Absolute values make it robust, as a median is: an outlier
pulls no harder for being further out. Relative ones let 4 KiB count as much as 16 MiB.

A regime is a range of message sizes with one α and β: transports change their protocol with the size (eager,
rendezvous), and beyond the caches every byte costs more. Of all ways to cut the sizes at powers of two, the one counts
that predicts each fitted measurement best from the other fitted ones (leave one out), so that noise gets no regime.

Counting along the critical path is exact where it does not depend on the prices; where it does (an algorithm whose
ranks wait for one another now here, now there), the fit is approximate and its error is part of what is reported.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog  # type: ignore[import-untyped]

from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.simulate import LinkBySize, Network, simulate
from allreduce_sgd.schedules.step import Booleans, Columnar

__all__ = ["Measurement", "Profile", "fit_link", "oversubscription_factor", "predict", "profile", "size_class"]

Numbers = npt.NDArray[np.float64]

_CLASSES_PER_REGIME = 2
"""With fewer, α and β could not be told apart."""


@dataclass(frozen=True)
class Measurement:
    """An all-reduce of `length` elements by `ranks` ranks took `seconds`: max over ranks, median over rounds."""

    algorithm: str
    ranks: int
    length: int
    item_bytes: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """What stands on the critical path, by class of message size: messages, bytes sent, bytes reduced."""

    messages: Mapping[int, float]
    sent_bytes: Mapping[int, float]
    reduced_bytes: Mapping[int, float]


def size_class(message_bytes: int) -> int:
    """Return the smallest power of two that is not below `message_bytes`."""
    return 1 << max(0, message_bytes - 1).bit_length()


def profile(columns: Columnar, measured: Measurement, duplex: bool) -> Profile:
    """Count what stands on the critical path of one measurement; `duplex` as in the simulator's Network."""
    classes = sorted(_classes(columns, measured))
    free = LinkCost(0.0, 0.0, 0.0)

    def count(unit: LinkCost) -> dict[int, float]:
        counted = {}
        for position, limit_bytes in enumerate(classes):
            costs = [free] * (len(classes) + 1)
            costs[position] = unit
            network = Network(LinkBySize(tuple(classes), tuple(costs)), duplex=duplex)
            counted[limit_bytes] = simulate(
                columns, measured.ranks, measured.length, measured.item_bytes, network
            ).seconds
        return counted

    return Profile(count(LinkCost(1.0, 0.0, 0.0)), count(LinkCost(0.0, 1.0, 0.0)), count(LinkCost(0.0, 0.0, 1.0)))


def fit_link(
    measurements: Sequence[Measurement],
    profiles: Sequence[Profile],
    gamma_seconds_per_byte: Mapping[int, float],
    call_seconds: float,
    regimes: int,
) -> LinkBySize:
    """Return the link that explains the measurements best, with at most so many regimes.

    `gamma_seconds_per_byte` is the measured γ by class of message size, of all classes that occur; `call_seconds` is in
    every measurement once, whatever its messages.
    """
    classes = sorted({each for one in profiles for each in one.messages})
    trials = [
        _Trial(measurements, profiles, gamma_seconds_per_byte, call_seconds, cuts)
        for count in range(1, regimes + 1)
        for cuts in _cuts(classes, count)
    ]
    # The first of equals has the fewest regimes.
    return min(trials, key=lambda trial: trial.deviation()).link()


def predict(columns: Columnar, measured: Measurement, network: Network) -> float:
    """Return the seconds that the simulator expects of the same messages, a core for each rank."""
    return simulate(columns, measured.ranks, measured.length, measured.item_bytes, network).seconds


def oversubscription_factor(measured_seconds: Sequence[float], predicted_seconds: Sequence[float]) -> float:
    """Return the median of measured / predicted."""
    return statistics.median(ours / model for ours, model in zip(measured_seconds, predicted_seconds, strict=True))


def _classes(columns: Columnar, measured: Measurement) -> set[int]:
    found: set[int] = set()
    for column in columns(measured.ranks, measured.length):
        lengths = (column.send_stop - column.send_start)[column.sends]
        found.update(size_class(int(each) * measured.item_bytes) for each in np.unique(lengths) if each > 0)
    return found


def _cuts(classes: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Return all ways to cut the classes into `count` regimes, each as the limits between them."""
    ways = []
    for borders in itertools.combinations(range(1, len(classes)), count - 1):
        edges = [0, *borders, len(classes)]
        widths = [after - before for before, after in itertools.pairwise(edges)]
        if count == 1 or min(widths) >= _CLASSES_PER_REGIME:
            ways.append(tuple(classes[border - 1] for border in borders))
    return ways


class _Trial:
    """The linear program for one way to cut message sizes into regimes."""

    def __init__(
        self,
        measurements: Sequence[Measurement],
        profiles: Sequence[Profile],
        gamma_seconds_per_byte: Mapping[int, float],
        call_seconds: float,
        limits_bytes: tuple[int, ...],
    ) -> None:
        self._limits_bytes = limits_bytes
        self._regimes = len(limits_bytes) + 1
        of_regime = {each: self._regime(each) for one in profiles for each in one.messages}
        self._gamma = [
            statistics.median(gamma_seconds_per_byte[each] for each, regime in of_regime.items() if regime == wanted)
            for wanted in range(self._regimes)
        ]
        seconds = np.array([[each.seconds] for each in measurements])
        # In microseconds and nanoseconds per byte, which keeps the numbers of the linear program near 1.
        latency = 1e-6 * np.array([self._by_regime(one.messages) for one in profiles])
        transfer = 1e-9 * np.array([self._by_regime(one.sent_bytes) for one in profiles])
        reduction = np.array([self._by_regime(one.reduced_bytes) for one in profiles]) @ self._gamma
        self._unknown = np.hstack([latency, transfer]) / seconds
        self._rest = 1 - (reduction + call_seconds) / seconds[:, 0]

    def deviation(self) -> float:
        """Return the mean relative error of each measurement when it is predicted from all others."""
        everything = np.arange(len(self._rest))
        if len(everything) == 1:
            return 0.0
        errors = [
            abs(float(self._unknown[left_out] @ self._solve(everything != left_out) - self._rest[left_out]))
            for left_out in everything
        ]
        return statistics.fmean(errors)

    def link(self) -> LinkBySize:
        prices = self._solve(np.ones(len(self._rest), dtype=np.bool_))
        costs = zip(1e-6 * prices[: self._regimes], 1e-9 * prices[self._regimes :], self._gamma, strict=True)
        return LinkBySize(self._limits_bytes, tuple(LinkCost(*map(float, cost)) for cost in costs))

    def _solve(self, chosen: Booleans) -> Numbers:
        """Return α (µs) and then β (ns per byte) of all regimes: the least sum of absolute relative errors."""
        known, rest = self._unknown[chosen], self._rest[chosen]
        errors = np.eye(len(rest))
        solved = linprog(
            np.concatenate([np.zeros(known.shape[1]), np.ones(len(rest))]),
            np.block([[known, -errors], [-known, -errors]]),
            np.concatenate([rest, -rest]),
        )
        prices: Numbers = solved.x[: known.shape[1]].clip(min=0)
        return prices

    def _regime(self, message_bytes: int) -> int:
        return int(np.searchsorted(self._limits_bytes, message_bytes))

    def _by_regime(self, counted: Mapping[int, float]) -> Numbers:
        sums = np.zeros(self._regimes)
        for each, amount in counted.items():
            sums[self._regime(each)] += amount
        return sums
