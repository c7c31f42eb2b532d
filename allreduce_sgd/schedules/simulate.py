"""Event simulator: a clock per rank follows the rounds of a schedule under α, β, γ, for thousands of ranks.

Model: Hockney's, as in Thakur, Rabenseifner and Gropp, IJHPCA 2005, run instead of summed up. A message starts when
both its ends are ready and takes α + bytes·β. The send and the receive of one step overlap; once both have ended, a
reduction costs the receiver bytes·γ, and then the rank goes on. Where every rank does the same (flat network, P | n,
powers of two where an algorithm needs them) this equals the closed forms; elsewhere it shows the waiting that they
leave out.

Two levels: ranks stand on nodes, and messages within and between nodes have costs of their own. Messages between nodes
that share a network interface (NIC) in the same round get equal parts of its bandwidth, at the sender's and at the
receiver's end, whichever is busier; an interface sends and receives at full rate at once. So does a rank, unless its
messages within the node are copied by its own core (`duplex` False).

Steps are strict unless `look_ahead` says otherwise: an executor that looks ahead by L sends the message of a round
once the reductions up to L rounds before the last one are done, so that the others run beside the transfers. Messages
of a rank stay one after the other, and so do its reductions. Only a schedule that needs no later reduction may be run
so: with K segments to a chunk, the segmented ring with L = K-1.

Left out: that messages of one round may miss one another in time and so not share a NIC; switches; contention for the
memory of a node (one of reductions with transfers, too); noise. More ranks than cores: see `oversubscription`.

Steps: those of the schedule; a round costs a few array operations of P elements, whatever the number of bytes.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np
import numpy.typing as npt

from allreduce_sgd.schedules.check import ScheduleError
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.step import Booleans, Column, Columnar, Integers, chunk

__all__ = ["LinkBySize", "Network", "Placement", "Simulation", "multi_lane", "simulate"]

Seconds = npt.NDArray[np.float64]
Placement = Literal["contiguous", "round_robin"]


@dataclass(frozen=True)
class LinkBySize:
    """A link whose cost depends on the size of the message, since transports change their protocol with it.

    `costs[i]` holds for messages of at most `limits_bytes[i]` bytes, the last cost for all longer ones, so there is one
    cost more than there are limits, which ascend. SimGrid's model of MPI is piecewise linear in the same way (Bédaride
    et al., "Toward better simulation of MPI applications on Ethernet/TCP networks", PMBS 2013).
    """

    limits_bytes: tuple[int, ...]
    costs: tuple[LinkCost, ...]

    def __post_init__(self) -> None:
        if len(self.costs) != len(self.limits_bytes) + 1 or list(self.limits_bytes) != sorted(set(self.limits_bytes)):
            raise ValueError(f"{len(self.costs)} costs do not fit the ascending limits {self.limits_bytes}")

    def prices(self, message_bytes: Integers) -> tuple[Seconds, Seconds, Seconds]:
        """Return α, β and γ of each message, in seconds and seconds per byte."""
        regime = np.searchsorted(self.limits_bytes, message_bytes)
        table = np.array([(c.alpha_seconds, c.beta_seconds_per_byte, c.gamma_seconds_per_byte) for c in self.costs])
        alpha, beta, gamma = table[regime].T
        return alpha, beta, gamma


@dataclass(frozen=True)
class Network:
    """Where ranks stand and what messages cost.

    `ranks_per_node` None is a flat network, where every message costs `inside`; `between` None makes messages between
    nodes cost the same as within. Contiguous placement fills one node after the other, round_robin deals ranks to the
    nodes in turn; rank i of a node uses its NIC i modulo `nics_per_node`. `duplex` False: through shared memory a
    rank's core copies what it sends and what it receives, so a message within a node has half the rate where one of its
    ends does both in that round. Raises ValueError for numbers below 1.
    """

    inside: LinkCost | LinkBySize
    between: LinkCost | LinkBySize | None = None
    ranks_per_node: int | None = None
    nics_per_node: int = 1
    placement: Placement = "contiguous"
    duplex: bool = True

    def __post_init__(self) -> None:
        if self.nics_per_node < 1 or (self.ranks_per_node is not None and self.ranks_per_node < 1):
            raise ValueError(f"{self}: a node has at least one rank and one NIC")

    def nodes(self, size: int) -> int:
        """Return how many nodes `size` ranks stand on."""
        return 1 if self.ranks_per_node is None else -(-size // self.ranks_per_node)

    def locate(self, size: int) -> tuple[Integers, Integers]:
        """Return the node and the local rank of every rank, two arrays of shape (size,)."""
        ranks = np.arange(size)
        if self.ranks_per_node is None:
            return np.zeros_like(ranks), ranks
        if self.placement == "contiguous":
            return ranks // self.ranks_per_node, ranks % self.ranks_per_node
        return ranks % self.nodes(size), ranks // self.nodes(size)


@dataclass(frozen=True)
class Simulation:
    """What a simulated collective did. `per_rank_seconds` and `bytes_sent` have shape (size,).

    `seconds` is the time until the last rank is done, each with a core of its own. Where ranks share cores,
    `oversubscription` is the measured factor by which that slows them, and `oversubscribed_seconds` the product; it
    stays apart from α, β and γ, since it is the scheduler's doing. None: it does not apply.
    """

    per_rank_seconds: Seconds
    bytes_sent: Integers
    rounds: int
    oversubscription: float | None = None

    @property
    def seconds(self) -> float:
        return float(self.per_rank_seconds.max())

    @property
    def oversubscribed_seconds(self) -> float | None:
        return None if self.oversubscription is None else self.seconds * self.oversubscription


def simulate(
    columns: Columnar,
    size: int,
    length: int,
    item_bytes: int,
    network: Network,
    look_ahead: int = 0,
    oversubscription: float | None = None,
) -> Simulation:
    """Run `columns` for `size` ranks that hold `length` elements of `item_bytes` bytes, and start all at time 0.

    Raises ScheduleError where a message of a round is not received, or not sent, in that round.
    """
    # When each rank is done with its messages, and with its reductions, of the rounds so far.
    moved, reduced = np.zeros(size), np.zeros(size)
    needed = deque([reduced] * (look_ahead + 1), maxlen=look_ahead + 1)
    bytes_sent = np.zeros(size, dtype=np.int64)
    traffic: _Traffic | None = None
    rounds = 0
    for column in columns(size, length):
        rounds += 1
        sends = column.sends & (column.send_stop > column.send_start)
        if traffic is None or not traffic.same(sends, column):
            traffic = _Traffic(sends, column, network)
        senders, receivers = traffic.senders, traffic.receivers
        message_bytes = (column.send_stop[senders] - column.send_start[senders]) * item_bytes
        transfer_seconds, reduce_seconds = traffic.price(message_bytes, column.reduce[receivers])
        ready = np.maximum(moved, needed[0])
        sent = np.maximum(ready[senders], ready[receivers]) + transfer_seconds
        # A message ends after all earlier ones of both its ends, so what is written first needs no maximum.
        moved[senders] = sent
        moved[receivers] = np.maximum(moved[receivers], sent)
        reduced = reduced.copy()
        reduced[receivers] = np.maximum(reduced[receivers], moved[receivers]) + reduce_seconds
        needed.append(reduced)
        bytes_sent[senders] += message_bytes
    return Simulation(np.maximum(moved, reduced), bytes_sent, rounds, oversubscription)


def multi_lane(lane: Columnar, network: Network) -> Columnar:
    """Return the two-level all-reduce of P = N·q ranks, q a node, in which every local rank carries its share.

    Three phases. Within each node, local rank i reduces share i (n/q elements) out of the buffers of the q-1 others,
    one after the other; reading a peer's shared memory counts as a message within the node. Then local ranks i of all
    nodes all-reduce share i by the schedule `lane`, q of them at once. Last, every rank copies the q-1 other shares.
    Bytes sent per node between nodes: q·2(N-1)/N·n/q for a lane that sends the least, 1/q of what q whole buffers need.

    The columns raise ValueError where q does not divide the number of ranks.
    """

    def columns(size: int, length: int) -> Iterator[Column]:
        per_node = size if network.ranks_per_node is None else network.ranks_per_node
        if size % per_node:
            raise ValueError(f"{size} ranks do not fill nodes of {per_node}")
        node, local = network.locate(size)
        rank_of = np.empty((size // per_node, per_node), dtype=np.int64)
        rank_of[node, local] = np.arange(size)
        shares = [chunk(length, per_node, index) for index in range(per_node)]
        starts, stops = np.array([(share.start, share.stop) for share in shares]).T
        everyone = np.ones(size, dtype=np.bool_)

        def within(away: int, gather: bool) -> Column:
            after, before = (local + away) % per_node, (local - away) % per_node
            sent, received = (local, before) if gather else (after, local)
            to, source = rank_of[node, after], rank_of[node, before]
            sending = (everyone, to, starts[sent], stops[sent])
            return Column(*sending, everyone, source, starts[received], stops[received], np.full(size, not gather))

        yield from (within(away, gather=False) for away in range(1, per_node))
        # Shares differ by one element at most: the lanes follow one of two programs.
        lengths = stops - starts
        longer, shorter = (lane(len(rank_of), int(each)) for each in (lengths[0], lengths[-1]))
        for wide, narrow in zip_longest(longer, shorter):
            yield _lanes(wide, narrow, lengths == lengths[0], node, local, rank_of, starts)
        yield from (within(away, gather=True) for away in range(1, per_node))

    return columns


def _lanes(
    wide: Column | None,
    narrow: Column | None,
    is_wide: Booleans,
    node: Integers,
    local: Integers,
    rank_of: Integers,
    starts: Integers,
) -> Column:
    """Return one round of all lanes at once: `wide` or `narrow` (None: idle), moved to each lane's ranks and share."""
    idle = Column(*np.zeros((len(Column._fields), len(rank_of)), dtype=np.int64))
    fields = [
        np.where(is_wide[local], long[node], short[node])
        for long, short in zip(wide or idle, narrow or idle, strict=True)
    ]
    sends, send_to, send_start, send_stop, receives, recv_from, recv_start, recv_stop, reduce = fields
    offset = starts[local]
    return Column(
        sends.astype(np.bool_),
        rank_of[np.where(sends, send_to, 0), local],
        send_start + offset,
        send_stop + offset,
        receives.astype(np.bool_),
        rank_of[np.where(receives, recv_from, 0), local],
        recv_start + offset,
        recv_stop + offset,
        reduce.astype(np.bool_),
    )


class _Traffic:
    """Who sends to whom in a round and what that shares: kept while rounds repeat it, as those of a ring do."""

    def __init__(self, sends: Booleans, column: Column, network: Network) -> None:
        self._network = network
        self._sends = sends
        self.senders: Integers = np.flatnonzero(sends)
        self.receivers: Integers = column.send_to[self.senders]
        _check_partners(self.senders, self.receivers, column)
        self._sharing = np.ones(len(self.senders))
        if not network.duplex:
            does_both = np.zeros(len(sends), dtype=np.bool_)
            does_both[self.receivers] = sends[self.receivers]
            self._sharing[does_both[self.senders] | does_both[self.receivers]] = 2
        self._crosses: Booleans | None = None
        if network.ranks_per_node is not None:
            node, local = network.locate(len(sends))
            self._crosses = node[self.senders] != node[self.receivers]
            nic = node * network.nics_per_node + local % network.nics_per_node
            self._sharing[self._crosses] = _sharing(
                nic[self.senders[self._crosses]], nic[self.receivers[self._crosses]]
            )

    def same(self, sends: Booleans, column: Column) -> bool:
        return np.array_equal(sends, self._sends) and np.array_equal(column.send_to[self.senders], self.receivers)

    def price(self, message_bytes: Integers, reduce: Booleans) -> tuple[Seconds, Seconds]:
        """Return the seconds of each transfer and of each reduction."""
        alpha, beta, gamma = _prices(self._network.inside, message_bytes)
        if self._crosses is not None:
            far = _prices(self._network.between or self._network.inside, message_bytes)
            alpha, gamma = np.where(self._crosses, far[0], alpha), np.where(self._crosses, far[2], gamma)
            beta = np.where(self._crosses, far[1], beta)
        return alpha + message_bytes * beta * self._sharing, reduce * message_bytes * gamma


def _prices(link: LinkCost | LinkBySize, message_bytes: Integers) -> tuple[Seconds, Seconds, Seconds]:
    if isinstance(link, LinkBySize):
        return link.prices(message_bytes)
    flat = (link.alpha_seconds, link.beta_seconds_per_byte, link.gamma_seconds_per_byte)
    alpha, beta, gamma = (np.asarray(price, dtype=np.float64) for price in flat)
    return alpha, beta, gamma


def _sharing(sending_nics: Integers, receiving_nics: Integers) -> Seconds:
    """Return for each message how many share the busier of its two NICs, in that direction."""
    busy_sending, busy_receiving = np.bincount(sending_nics), np.bincount(receiving_nics)
    return np.maximum(busy_sending[sending_nics], busy_receiving[receiving_nics]).astype(np.float64)


def _check_partners(senders: Integers, receivers: Integers, column: Column) -> None:
    expecting = column.receives & (column.recv_stop > column.recv_start)
    met = expecting[receivers] & (column.recv_from[receivers] == senders)
    if not met.all() or np.count_nonzero(expecting) != len(senders):
        raise ScheduleError(
            f"ranks {senders[~met].tolist()} send to ranks {receivers[~met].tolist()}, which do not receive from them "
            f"in that round; {np.count_nonzero(expecting)} messages are awaited and {len(senders)} are sent"
        )
