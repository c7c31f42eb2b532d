"""What an all-reduce of one bucket takes between so many ranks: simulated, from a closed form, or as it was measured.

The event simulator follows the very schedules of the communicator. A ring of P ranks has 2(P-1) rounds, though, and
work beyond `SIMULATED_EVENTS` ranks · rounds goes to the closed form of `cost` at the price of the slowest message of a
round, which is the more pessimistic the less alike messages are; the answer says which it was. Schedules of log P
rounds are simulated up to eight times as much. Answers are kept by bytes and ranks, as predictions ask for the same
buckets again and again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from allreduce_sgd.comm.choice import TWO_LEVEL, default_choice
from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.simulate import LinkBySize, Network, multi_lane, simulate

__all__ = ["ALGORITHM_CHOICES", "SHARED_MEMORY", "SIMULATED_EVENTS", "Reduction", "Reductions"]

SIMULATED_EVENTS = 100_000
SHARED_MEMORY = "shared-memory"
ALGORITHM_CHOICES = ("cheapest", "auto", *ALL_REDUCE, TWO_LEVEL)
"""cheapest: of all schedules, for each bucket; auto: what the communicator takes where it has measured nothing."""

_ITEM_BYTES = 4
_SEGMENT_BYTES = 1 << 20
_LANES = ("halving-doubling", "ring")
_AROUND = ("ring", "segmented-ring", "chain")
"""Their rounds grow with the number of ranks."""
_WIDE = 8
"""How much more is simulated of few rounds with many messages each, which are computed all at once."""
_PARTS = {"recursive-doubling": 1, "tree": 1, "halving-doubling": 2}
"""Into how many parts a bucket is cut for the largest message; as many as there are ranks for other schedules."""

Method = Literal["none", "measured", "simulated", "closed form"]


@dataclass(frozen=True)
class Reduction:
    """`bytes_sent` is that of the rank which sends most."""

    seconds: float
    bytes_sent: float
    algorithm: str
    method: Method


class Reductions:
    """All-reduces in one network. `shared_seconds` are measured ones of all ranks of one node, by number of ranks."""

    def __init__(
        self,
        network: Network,
        algorithm: str = "cheapest",
        call_seconds: float = 0.0,
        shared_seconds: Mapping[int, tuple[tuple[int, float], ...]] = MappingProxyType({}),
    ) -> None:
        self.network = network
        self.algorithm = algorithm
        self.call_seconds = call_seconds
        self._shared = shared_seconds
        self._known: dict[tuple[int, int, str], Reduction] = {}

    def all_reduce(self, ranks: int, n_bytes: float) -> Reduction:
        """Return what an all-reduce takes. Nothing at all with one rank."""
        if ranks == 1 or n_bytes <= 0:
            return Reduction(0.0, 0.0, "none", "none")
        length = max(1, round(n_bytes / _ITEM_BYTES))
        key = (ranks, length, "all_reduce")
        if key not in self._known:
            found = self._measured(ranks, length * _ITEM_BYTES) or min(
                (self._priced(name, ranks, length) for name in self._candidates(ranks, length * _ITEM_BYTES)),
                key=lambda each: each.seconds,
            )
            self._known[key] = found
        return self._known[key]

    def all_gather(self, ranks: int, n_bytes: float) -> Reduction:
        """Return what it takes to give everyone the messages of `n_bytes` of all ranks, around a ring."""
        if ranks == 1:
            return Reduction(0.0, 0.0, "none", "none")
        link = self._slowest(ranks, round(n_bytes))
        seconds = self.call_seconds + (ranks - 1) * link.message_seconds(n_bytes)
        return Reduction(seconds, (ranks - 1) * n_bytes, "ring all-gather", "closed form")

    def two_phases(self, ranks: int, n_bytes: float) -> Reduction:
        """Return what the exchange of a quantised signal takes, of `n_bytes` on every rank (`compression.quantized`).

        Two ranks send it to each other. More cut it into rows, each sends every other its row, and the sums are
        gathered around a ring. A rank's messages are priced one after another, though it sends them all at once.
        """
        if ranks <= 2:
            return self.all_gather(ranks, n_bytes)
        row_bytes = n_bytes / ranks
        to_all = self._slowest(ranks, round(row_bytes), all_leave=True)
        gathered = self.all_gather(ranks, row_bytes)
        seconds = self.call_seconds + (ranks - 1) * to_all.message_seconds(row_bytes) + gathered.seconds
        return Reduction(seconds, 2 * gathered.bytes_sent, "rows to all, ring all-gather", "closed form")

    def _measured(self, ranks: int, n_bytes: int) -> Reduction | None:
        if self.algorithm not in ("cheapest", "auto") or ranks not in self._shared:
            return None
        if self.network.ranks_per_node is not None and ranks > self.network.ranks_per_node:
            return None
        sizes, seconds = zip(*self._shared[ranks], strict=True)
        found = float(np.interp(n_bytes, sizes, seconds))
        if n_bytes > sizes[-1]:
            found = seconds[-1] * n_bytes / sizes[-1]
        return Reduction(found, 2 * (ranks - 1) / ranks * n_bytes, SHARED_MEMORY, "measured")

    def _candidates(self, ranks: int, n_bytes: int) -> tuple[str, ...]:
        several = self.network.ranks_per_node is not None and ranks > self.network.ranks_per_node > 1
        fits = several and ranks % (self.network.ranks_per_node or 1) == 0
        if self.algorithm == "cheapest":
            return (*ALL_REDUCE, *((TWO_LEVEL,) if fits else ()))
        if self.algorithm == "auto":
            if fits:
                return (TWO_LEVEL,)
            return (default_choice(2, shared_memory=False, deterministic=False).for_message(n_bytes).algorithm,)
        if self.algorithm == TWO_LEVEL and not fits:
            return _LANES[:1]
        return (self.algorithm,)

    def _priced(self, name: str, ranks: int, length: int) -> Reduction:
        if name == TWO_LEVEL:
            return self._two_level(ranks, length)
        algorithm = ALL_REDUCE[name]
        segment = _SEGMENT_BYTES // _ITEM_BYTES if algorithm.segmented else None
        rounds = algorithm.step_count(0, ranks, length, segment) + (ranks if name in _AROUND else 0)
        if rounds * ranks > SIMULATED_EVENTS * (1 if name in _AROUND else _WIDE):
            return self._closed(name, ranks, length)
        look_ahead = 0
        if name == "segmented-ring" and segment is not None:
            look_ahead = max(0, -(-length // (ranks * segment)) - 1)
        done = simulate(algorithm.columns(segment), ranks, length, _ITEM_BYTES, self.network, look_ahead)
        return Reduction(self.call_seconds + done.seconds, float(done.bytes_sent.max()), name, "simulated")

    def _two_level(self, ranks: int, length: int) -> Reduction:
        """Return the better of a few schedules between nodes."""
        nodes = self.network.nodes(ranks)
        found = []
        for name in _LANES:
            if name in _AROUND and 2 * nodes * ranks > SIMULATED_EVENTS:
                continue
            columns = multi_lane(ALL_REDUCE[name].columns(None), self.network)
            done = simulate(columns, ranks, length, _ITEM_BYTES, self.network)
            seconds = self.call_seconds + done.seconds
            found.append(Reduction(seconds, float(done.bytes_sent.max()), TWO_LEVEL, "simulated"))
        return min(found, key=lambda each: each.seconds)

    def _closed(self, name: str, ranks: int, length: int) -> Reduction:
        algorithm = ALL_REDUCE[name]
        n_bytes = length * _ITEM_BYTES
        message_bytes = max(_ITEM_BYTES, n_bytes // _PARTS.get(name, ranks))
        if name == "chain":
            message_bytes = min(n_bytes, _SEGMENT_BYTES)
        link = self._slowest(ranks, message_bytes, all_leave=name not in _AROUND)
        seconds = algorithm.seconds(ranks, float(n_bytes), link, _SEGMENT_BYTES)
        sent = algorithm.elements_sent(0, ranks, length) * _ITEM_BYTES
        return Reduction(self.call_seconds + seconds, float(sent), name, "closed form")

    def _slowest(self, ranks: int, message_bytes: int, all_leave: bool = False) -> LinkCost:
        """Return the price of the slowest message of a round in which every rank sends to the next one.

        `all_leave`: there are rounds in which all ranks of a node send to other nodes, whatever the placement.
        """
        network = self.network
        inside = _at(network.inside, message_bytes)
        if not network.duplex:
            inside = inside.shared_by(2)
        per_node = network.ranks_per_node
        if per_node is None or ranks <= per_node:
            return inside
        between = _at(network.between or network.inside, message_bytes)
        if all_leave or network.placement == "round_robin":
            between = between.shared_by(-(-per_node // network.nics_per_node))
        if per_node == 1:
            return between
        return max(inside, between, key=lambda link: link.message_seconds(message_bytes))


def _at(link: LinkCost | LinkBySize, message_bytes: int) -> LinkCost:
    if isinstance(link, LinkCost):
        return link
    alpha, beta, gamma = link.prices(np.array([message_bytes]))
    return LinkCost(float(alpha[0]), float(beta[0]), float(gamma[0]))
