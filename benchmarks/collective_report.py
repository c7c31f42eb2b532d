"""What the collectives benchmark prints: nccl-tests' columns, CPU time burnt in waiting, targets, bypassed links."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.message_sizes import format_size
from benchmarks.rounds import LATE_SECONDS
from benchmarks.table import format_number, format_table
from benchmarks.targets import judge, verdict_table

__all__ = ["report"]


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the text for the rows of one run."""
    if not rows:
        return "nothing was measured"
    first = rows[0]
    hosts = "one machine" if first["hosts"] == 1 else f"{first['hosts']} hosts"
    heading = (
        f"{first['ranks']} ranks on {hosts}, {first['threads']} thread{'s'[: first['threads'] > 1]} each, "
        f"{first['rounds']} rounds, every element of every timed result checked; time in µs, bandwidth in GB/s"
    )
    parts = [heading, _table(rows)]
    late = [row for row in rows if row["cpu_fraction_waiting"] is not None]
    if late:
        parts += [f"CPU time burnt in a wait of {LATE_SECONDS * 1e3:g} ms for a late rank", _wait_table(late)]
    verdicts = judge(rows)
    if verdicts:
        parts += [
            "targets (for 2 ranks on one machine with MPICH, or hosts with limited links)",
            verdict_table(verdicts),
        ]
    parts += [
        f"bypass: {row['contender']} at {format_size(row['bytes'])} moved {row['busbw_to_raw_tcp']:.2f} times what raw "
        f"TCP carries; the data went another way than the links"
        for row in rows
        if row["bypass"]
    ]
    return "\n\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = "op,type,contender,variant,size,count,time,[min–max],algbw,busbw,#wrong,÷ floor,asynchronous,sent".split(
        ","
    )
    lines = []
    floors: set[tuple[str, int]] = set()
    for row in rows:
        there = (row["op"], row["bytes"])
        common = [format_size(row["bytes"]), str(row["count"])]
        if row["floor_seconds"] is not None and there not in floors:
            floors.add(there)
            what = "memory floor" if row["hosts"] == 1 else "raw TCP"
            bandwidths = [
                format_number(row[kind] * row["median_seconds"] / row["floor_seconds"])
                for kind in ("algbw_gigabytes_per_second", "busbw_gigabytes_per_second")
            ]
            time = format_number(1e6 * row["floor_seconds"])
            lines.append([row["op"], row["dtype"], what, "", *common, time, "", *bandwidths, "", "1", "", ""])
        queued = row["asynchronous_seconds"]
        lines.append(
            [
                row["op"],
                row["dtype"],
                row["contender"],
                row["variant"],
                *common,
                format_number(1e6 * row["median_seconds"]),
                f"[{format_number(1e6 * row['minimum_seconds'])}–{format_number(1e6 * row['maximum_seconds'])}]",
                format_number(row["algbw_gigabytes_per_second"]),
                format_number(row["busbw_gigabytes_per_second"]),
                str(row["wrong"]),
                format_number(row["ratio_to_floor"]),
                format_number(None if queued is None else 1e6 * queued),
                "–" if row["sent_bytes"] is None else format_number(row["sent_bytes"] / row["bytes"]) + " n",
            ]
        )
    return format_table(header, lines, 4)


def _wait_table(rows: Sequence[Mapping[str, Any]]) -> str:
    def share(fraction: float | None) -> str:
        return "–" if fraction is None else f"{fraction:.0%}"

    header = ["op", "contender", "variant", "size", "synchronous", "asynchronous"]
    lines = [
        [
            row["op"],
            row["contender"],
            row["variant"],
            format_size(row["bytes"]),
            share(row["cpu_fraction_waiting"]),
            share(row["asynchronous_cpu_fraction_waiting"]),
        ]
        for row in rows
    ]
    return format_table(header, lines, 3)
