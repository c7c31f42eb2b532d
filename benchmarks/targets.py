"""What is asked of our all-reduce, and whether a run meets it: ours against the fastest peer and against the floor.

The targets are for 2 ranks on one machine under MPICH, and for hosts with limited links; other runs are judged by the
same measure. Medians of one run are compared; a class of sizes is as good as its worst size. The fastest peer is
chosen size by size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.message_sizes import format_size
from benchmarks.table import format_number, format_table

__all__ = ["Verdict", "judge", "verdict_table"]

_KIB, _MIB = 1 << 10, 1 << 20

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """The worst figure of a contender within a class of sizes, and the target it is held against."""

    sizes: str
    contender: str
    variant: str
    measure: str
    worst: float
    worst_bytes: int
    target: float
    met: bool


@dataclass(frozen=True)
class _Target:
    sizes: str
    low_bytes: int
    high_bytes: float
    variants: tuple[str, ...]
    measure: str
    figure: Callable[[Row, float | None], float | None]
    """Of a row, and the median seconds of the fastest peer where one was measured."""
    target: float
    at_least: bool


def _speedup(row: Row, peer_seconds: float | None) -> float | None:
    return None if peer_seconds is None else peer_seconds / float(row["median_seconds"])


def _behind_microseconds(row: Row, peer_seconds: float | None) -> float | None:
    return None if peer_seconds is None else 1e6 * (float(row["median_seconds"]) - peer_seconds)


def _start_to_wait_microseconds(row: Row, peer_seconds: float | None) -> float | None:
    seconds = row.get("asynchronous_seconds")
    return None if seconds is None else 1e6 * float(seconds)


def _to_floor(row: Row, peer_seconds: float | None) -> float | None:
    return row["ratio_to_floor"]


def _to_raw_tcp(row: Row, peer_seconds: float | None) -> float | None:
    return row["busbw_to_raw_tcp"]


_BOTH = ("in_place", "shared_result")
_ONE_HOST = (
    _Target("≥ 32 MiB", 32 * _MIB, math.inf, ("in_place",), "fastest peer ÷ ours", _speedup, 2.3, True),
    _Target("≥ 32 MiB", 32 * _MIB, math.inf, ("shared_result",), "fastest peer ÷ ours", _speedup, 3.3, True),
    _Target("1–16 MiB", _MIB, 16 * _MIB, ("in_place",), "fastest peer ÷ ours", _speedup, 1.6, True),
    _Target("1–16 MiB", _MIB, 16 * _MIB, ("shared_result",), "fastest peer ÷ ours", _speedup, 2.3, True),
    _Target("≥ 2 MiB", 2 * _MIB, math.inf, ("shared_result",), "ours ÷ memory floor", _to_floor, 1.3, False),
    _Target("4–256 KiB", 4 * _KIB, 256 * _KIB, _BOTH, "ours − fastest peer, µs", _behind_microseconds, 20, False),
    _Target("4–256 KiB", 4 * _KIB, 256 * _KIB, _BOTH, "start to wait, µs", _start_to_wait_microseconds, 150, False),
)
_BETWEEN_HOSTS = (_Target("8–128 MiB", 8 * _MIB, 128 * _MIB, _BOTH, "link rate ÷ raw TCP", _to_raw_tcp, 0.95, True),)


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Return a verdict for each of our algorithms, variant and target that the rows have figures for."""
    rows = [row for row in rows if row["op"] == "all_reduce"]
    if not rows:
        return []
    peers: dict[int, float] = {}
    for row in rows:
        if not row["ours"]:
            peers[row["bytes"]] = min(row["median_seconds"], peers.get(row["bytes"], math.inf))
    ours = [row for row in rows if row["ours"] and not row["private"]]
    verdicts = []
    for target in _ONE_HOST if rows[0]["hosts"] == 1 else _BETWEEN_HOSTS:
        for name in dict.fromkeys(row["contender"] for row in ours):
            for variant in target.variants:
                figures = [
                    (figure, row["bytes"])
                    for row in ours
                    if (row["contender"], row["variant"]) == (name, variant)
                    and target.low_bytes <= row["bytes"] <= target.high_bytes
                    and (figure := target.figure(row, peers.get(row["bytes"]))) is not None
                ]
                if figures:
                    worst, where = min(figures) if target.at_least else max(figures)
                    met = worst >= target.target if target.at_least else worst <= target.target
                    verdicts.append(
                        Verdict(target.sizes, name, variant, target.measure, worst, where, target.target, met)
                    )
    return verdicts


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    header = ["sizes", "contender", "variant", "measure", "worst", "at", "target", "met"]
    sign = {each.measure: "≥" if each.measure.endswith(("ours", "TCP")) else "≤" for each in verdicts}
    lines = [
        [
            each.sizes,
            each.contender,
            each.variant,
            each.measure,
            format_number(each.worst),
            format_size(each.worst_bytes),
            f"{sign[each.measure]} {each.target:g}",
            "yes" if each.met else "no",
        ]
        for each in verdicts
    ]
    return format_table(header, lines, 4)
