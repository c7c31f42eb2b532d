"""From the times of rounds to the rows of the record: medians, nccl-tests' bandwidths, ratios to the floor."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.collective_data import bus_factor
from benchmarks.raw_tcp import LEAST_BYTES
from benchmarks.rounds import Contender, Turns, Wait

__all__ = ["Setting", "make_rows"]

_BYPASS = 1.05
"""How many times the best rate of raw TCP the links cannot have carried, measurement errors allowed for."""


@dataclass(frozen=True)
class Setting:
    """What all contenders of a group of rows have in common. `count` is the number of elements of the buffer."""

    operation: str
    dtype: str
    count: int
    bytes: int
    ranks: int
    hosts: int
    threads: int


def make_rows(
    setting: Setting,
    results: Sequence[tuple[Contender, Turns, Wait | None]],
    floor_seconds: float | None,
    raw_tcp_bytes_per_second: Sequence[float],
) -> list[dict[str, Any]]:
    """Return a row for every contender and variant: its synchronous call, and beside it its asynchronous one.

    `raw_tcp_bytes_per_second` has a rate per round, none on a single host. `floor_seconds` between hosts is the time
    that raw TCP takes for the bytes that must pass each link.
    """
    raw_rate = statistics.median(raw_tcp_bytes_per_second) if raw_tcp_bytes_per_second else None
    # A short message may pass a rate limiter at once, in its burst; the limit is the best that raw TCP has shown.
    link_bytes = bus_factor(setting.operation, setting.hosts) * setting.bytes
    limit = max(raw_tcp_bytes_per_second) if raw_tcp_bytes_per_second and link_bytes >= LEAST_BYTES else math.inf
    background = {(each.name, each.variant): (turns, wait) for each, turns, wait in results if each.asynchronous}
    nothing = (Turns(), None)
    rows = []
    for each, turns, wait in results:
        if each.asynchronous:
            continue
        seconds = statistics.median(turns.seconds)
        algbw = setting.bytes / seconds / 1e9
        queued, queued_wait = background.get((each.name, each.variant), nothing)
        rows.append(
            {
                "contender": each.name,
                "ours": each.ours,
                "variant": each.variant,
                "private": each.private,
                "algorithm": each.algorithm,
                "op": setting.operation,
                "dtype": setting.dtype,
                "bytes": setting.bytes,
                "count": setting.count,
                "ranks": setting.ranks,
                "hosts": setting.hosts,
                "threads": setting.threads,
                "rounds": len(turns.seconds),
                "median_seconds": seconds,
                "minimum_seconds": min(turns.seconds),
                "maximum_seconds": max(turns.seconds),
                "algbw_gigabytes_per_second": algbw,
                "busbw_gigabytes_per_second": algbw * bus_factor(setting.operation, setting.ranks),
                "floor_seconds": floor_seconds,
                "ratio_to_floor": None if floor_seconds is None else seconds / floor_seconds,
                "raw_tcp_gigabytes_per_second": None if raw_rate is None else raw_rate / 1e9,
                "busbw_to_raw_tcp": None if raw_rate is None else link_bytes / seconds / raw_rate,
                "bypass": link_bytes / seconds > _BYPASS * limit,
                "asynchronous_seconds": statistics.median(queued.seconds) if queued.seconds else None,
                "wait_seconds": wait and wait.seconds,
                "cpu_seconds_waiting": wait and wait.cpu_seconds,
                "cpu_fraction_waiting": wait and wait.cpu_seconds / wait.seconds,
                "asynchronous_cpu_fraction_waiting": queued_wait and queued_wait.cpu_seconds / queued_wait.seconds,
                "sent_bytes": turns.sent_bytes,
                "wrong": turns.wrong + queued.wrong,
            }
        )
    return rows
