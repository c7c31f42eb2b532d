"""Measures what messages and additions cost on these hosts, and makes the table of algorithms from it.

Messages are timed as schedules run them, with the cost of our own executor in them: neighbours in a circle send at the
same time as they receive, inside the nodes (all ranks at once) and between them (one rank a node). From the times of a
small and a large message come alpha and beta, from torch's addition gamma. For small messages the candidates themselves
are timed, MPI's own all-reduce among them; for large ones the closed forms of `schedules/cost.py` decide.

Takes less than half a second, once: rank 0 keeps the figures in a file per set of hosts, in
$XDG_CACHE_HOME/allreduce_sgd (else ~/.cache/allreduce_sgd). Delete it to have them measured again.
"""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from allreduce_sgd.comm.base import ReduceOp, Work
from allreduce_sgd.comm.choice import (
    LIBRARY,
    SHARED_MEMORY,
    TWO_LEVEL,
    Choice,
    Entry,
    default_between,
    merge,
)
from allreduce_sgd.comm.mpi import MpiCommunicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.durable import replace_file
from allreduce_sgd.schedules.catalogue import ALL_REDUCE, cheapest
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.step import Schedule, Step

__all__ = ["Costs", "choose", "costs_of"]

_SMALL_BYTES = 8
_LARGE_BYTES = (64 * 1024, 256 * 1024, 1 << 20)
# A message longer than this tells the bandwidth well enough; slow links shall not use up the half second.
_LONG_SECONDS = 0.004
_MEMORY_BYTES = (256, 4 << 20)
_ROUNDS = 9
_CANDIDATE_BYTES = tuple(1 << power for power in range(6, 19, 2))
_LEAST_SEGMENT_BYTES = 64 * 1024
_MOST_SEGMENT_BYTES = 1 << 20
# Above it two levels send the fewest bytes, whatever noise says of them.
_FLAT_UP_TO_BYTES = 64 * 1024
_GROUP_POWERS = range(8, 31)


@dataclass(frozen=True)
class Costs:
    """Per link (None where there is none), and `library_up_to_bytes`: the size up to which MPI's all-reduce is faster.

    `memory_seconds_per_byte` is the time to all-reduce a byte through shared memory, `barrier_seconds` that of nothing.
    """

    inside: LinkCost | None
    between: LinkCost | None
    barrier_seconds: float
    memory_seconds_per_byte: float
    library_up_to_bytes: int

    def __post_init__(self) -> None:
        for name in ("barrier_seconds", "memory_seconds_per_byte", "library_up_to_bytes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Costs: {name} is {getattr(self, name)}, allowed are 0 and more, and finite")

    def describe(self) -> str:
        """Return the table for people."""
        lines = ["link       alpha µs   beta ns/KiB   gamma ns/KiB"]
        for name, link in (("in a node", self.inside), ("between", self.between)):
            if link is not None:
                figures = (link.beta_seconds_per_byte * 1024e9, link.gamma_seconds_per_byte * 1024e9)
                lines.append(f"{name:<9} {1e6 * link.alpha_seconds:>9.1f} {figures[0]:>13.1f} {figures[1]:>14.1f}")
        lines.append(
            f"shared memory: {1e6 * self.barrier_seconds:.1f} µs + {1024e9 * self.memory_seconds_per_byte:.1f} ns/KiB; "
            f"MPI's own all-reduce is faster up to {self.library_up_to_bytes:,} bytes"
        )
        return "\n".join(lines)


def costs_of(comm: MpiCommunicator) -> Costs:
    """Return what was measured on these hosts, now or earlier, the same on all ranks. All ranks must call."""
    path = _cache_path(comm)
    known = all_gather_object(comm, _read(path) if path is not None else None)[0]
    if known is None:
        known = asdict(_measure(comm))
        if path is not None:
            # A home that cannot be written to only costs the next start half a second.
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, json.dumps(known) + "\n")
    return _from_json(known)


def choose(comm: MpiCommunicator, costs: Costs) -> Choice:
    """Return the table of algorithms that costs least, a function of its arguments alone."""
    layout = comm.layout
    between = default_between(deterministic=False)
    if layout.nodes > 1 and costs.between is not None:
        shared = costs.between.shared_by(layout.lanes)
        between = merge(_best(layout.nodes, n_bytes, shared) for n_bytes in _sizes())
    large: list[Entry] = []
    for n_bytes in _sizes():
        flat = _best(comm.size, n_bytes, costs.between or costs.inside)
        if not layout.pairs_share:
            large.append(flat)
            continue
        if layout.nodes == 1:
            # Messages through MPI would be copied twice through the same memory: no noise shall choose them.
            large.append(Entry(n_bytes, SHARED_MEMORY))
            continue
        two_level = 2 * costs.barrier_seconds + n_bytes * costs.memory_seconds_per_byte
        if costs.between is not None:
            across = _best(layout.nodes, n_bytes // layout.lanes, costs.between.shared_by(layout.lanes))
            two_level += _seconds(across, layout.nodes, n_bytes // layout.lanes, costs.between.shared_by(layout.lanes))
        flat_link = costs.between or costs.inside
        faster = (
            n_bytes > _FLAT_UP_TO_BYTES
            or flat_link is None
            or two_level <= _seconds(flat, comm.size, n_bytes, flat_link)
        )
        large.append(Entry(n_bytes, TWO_LEVEL) if faster else flat)
    messages = merge(large)
    if costs.library_up_to_bytes:
        rest = (
            entry for entry in messages if entry.limit_bytes is None or entry.limit_bytes > costs.library_up_to_bytes
        )
        messages = (Entry(costs.library_up_to_bytes, LIBRARY), *rest)
    return Choice(messages, between)


def _sizes() -> list[int]:
    return [1 << power for power in _GROUP_POWERS]


def _best(size: int, n_bytes: int, link: LinkCost | None) -> Entry:
    if link is None or size == 1:
        return Entry(n_bytes, "halving-doubling")
    name = cheapest(size, n_bytes, link, tuple(ALL_REDUCE))
    segment = ALL_REDUCE[name].best_segment_bytes(size, n_bytes, link)
    return Entry(
        n_bytes, name, None if segment is None else min(max(segment, _LEAST_SEGMENT_BYTES), _MOST_SEGMENT_BYTES)
    )


def _seconds(entry: Entry, size: int, n_bytes: int, link: LinkCost) -> float:
    return ALL_REDUCE[entry.algorithm].seconds(size, n_bytes, link, entry.segment_bytes)


def _measure(comm: MpiCommunicator) -> Costs:
    layout, before = comm.layout, comm.choice
    groups = [[rank for rank in range(comm.size) if layout.nodes_of[rank] == node] for node in range(layout.nodes)]
    gamma = _gamma(comm)
    inside = _link(comm, groups, gamma) if max(map(len, groups)) > 1 else None
    between = _link(comm, [[group[0] for group in groups]], gamma) if layout.nodes > 1 else None
    barrier = per_byte = 0.0
    own = SHARED_MEMORY if layout.nodes == 1 else TWO_LEVEL
    if not layout.pairs_share:
        own = "recursive-doubling"
    try:
        if layout.memory is not None:
            barrier, per_byte = _memory(comm)
        lead = most = 0.0
        library_up_to = 0
        for n_bytes in _CANDIDATE_BYTES:
            buffer = comm.allocate(n_bytes // 4, torch.float32, torch.device("cpu"))
            seconds = {}
            for name in (LIBRARY, own):
                comm.choice = Choice((Entry(None, name),), before.between)
                # Buckets are reduced asynchronously, control messages by blocking calls: both count.
                seconds[name] = _time(comm, partial(comm.all_reduce, buffer, blocking=True))
                seconds[name] += _time(comm, lambda: comm.all_reduce(buffer).wait())  # noqa: B023  # called at once
            # The limit with the least sum of times, so that one disturbed measurement does not decide alone.
            lead += seconds[own] - seconds[LIBRARY]
            if lead > most:
                most, library_up_to = lead, n_bytes
    finally:
        comm.choice = before
    return Costs(inside, between, barrier, per_byte, library_up_to)


def _memory(comm: MpiCommunicator) -> tuple[float, float]:
    """Return the time of all-reducing nothing, and each further byte, through the memory of the nodes."""
    node = comm.split(comm.layout.node)
    node.choice = Choice((Entry(None, SHARED_MEMORY),), comm.choice.between)
    seconds = []
    for n_bytes in _MEMORY_BYTES:
        buffer = node.allocate(n_bytes // 4, torch.float32, torch.device("cpu"))
        seconds.append(_time(node, partial(node.all_reduce, buffer, blocking=True)))
    node.close()
    slowest = torch.tensor(seconds, dtype=torch.float64)
    small, large = comm.all_reduce(slowest, ReduceOp.MAX).wait().tolist()
    return small / 2, max(0.0, large - small) / (_MEMORY_BYTES[1] - _MEMORY_BYTES[0])


def _link(comm: MpiCommunicator, groups: list[list[int]], gamma: float) -> LinkCost:
    """Time messages that go round each of the groups at once."""

    def exchange(n_bytes: int) -> float:
        buffer = torch.zeros(2 * n_bytes, dtype=torch.uint8)
        return _time(comm, lambda: comm.run(buffer, _circles(groups), blocking=True))

    exchange(_SMALL_BYTES)
    alpha = exchange(_SMALL_BYTES)
    for n_bytes in _LARGE_BYTES:
        seconds = exchange(n_bytes)
        if seconds > _LONG_SECONDS:
            break
    return LinkCost(alpha, max(0.0, seconds - alpha) / (n_bytes - _SMALL_BYTES), gamma)


def _circles(groups: list[list[int]]) -> Schedule:
    """Every rank of a group sends the first half of its buffer to the next one, which receives it in the second."""

    def schedule(rank: int, size: int, length: int) -> Iterator[Step]:
        group = next((group for group in groups if rank in group), [rank])
        if len(group) > 1:
            place = group.index(rank)
            after, before = group[(place + 1) % len(group)], group[place - 1]
            half = length // 2
            yield Step(after, slice(0, half), before, slice(half, 2 * half), reduce=False)

    return schedule


def _gamma(comm: MpiCommunicator) -> float:
    left, right = (torch.ones(1 << 18) for _ in range(2))
    return _time(comm, lambda: left.add_(right)) / left.nbytes


def _time(comm: MpiCommunicator, call: Callable[[], Work | Tensor]) -> float:
    """Return the slowest rank's seconds in the quickest round, the same on all ranks.

    The quickest, since what disturbs a round only ever makes it longer.
    """
    mine = []
    for _ in range(_ROUNDS):
        comm.barrier().wait()
        started = time.perf_counter()
        call()
        mine.append(time.perf_counter() - started)
    everyone = torch.tensor(mine, dtype=torch.float64)
    comm.all_reduce(everyone, ReduceOp.MAX).wait()
    return float(everyone.min())


def _cache_path(comm: MpiCommunicator) -> Path | None:
    """Return rank 0's file for these hosts; None on other ranks, and for a user without a home. All ranks must call."""
    hosts = all_gather_object(comm, os.uname().nodename)
    what = [hosts, comm.layout.nodes_of, comm.layout.memory is not None, MPI.Get_library_version()]
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    if comm.rank > 0:
        return None
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return folder / "allreduce_sgd" / f"links-{name}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """Return what the file holds, None where there is none or it is not what we write."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        _from_json(known)
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return None
    return dict(known)


def _from_json(known: dict[str, Any]) -> Costs:
    """Return the costs. Raises KeyError, TypeError or ValueError for what is none."""
    inside, between = (None if known[name] is None else LinkCost(**known[name]) for name in ("inside", "between"))
    return Costs(
        inside,
        between,
        float(known["barrier_seconds"]),
        float(known["memory_seconds_per_byte"]),
        int(known["library_up_to_bytes"]),
    )
