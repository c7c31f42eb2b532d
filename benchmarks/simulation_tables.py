"""The tables of the simulation benchmark: fitted prices, predictions against measurements, and simulated ranks."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.message_sizes import format_size
from benchmarks.table import format_number, format_table

__all__ = ["TARGET", "measured_tables", "simulated_table"]

TARGET = 0.2
"""The relative error that a prediction may have."""


def measured_tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the fitted prices, and measured times beside predicted ones, apart for more ranks than cores."""
    links = [
        [
            "longer" if row["largest_message_bytes"] is None else f"to {format_size(row['largest_message_bytes'])}",
            format_number(1e6 * row["alpha_seconds"]),
            format_number(1e9 * row["beta_seconds_per_byte"]),
            format_number(1e9 * row["gamma_seconds_per_byte"]),
        ]
        for row in rows
        if row["kind"] == "link"
    ]
    measured = [row for row in rows if row["kind"] == "measured"]
    call_us = next(1e6 * row["call_seconds"] for row in rows if row["kind"] == "link")
    parts = [f"{format_table(['messages', 'α µs', 'β ns/B', 'γ ns/B'], links)}\na call: {format_number(call_us)} µs"]
    for crowded in (False, True):
        chosen = [row for row in measured if (row["oversubscription"] is not None) == crowded]
        if not chosen:
            continue
        lines = [_measured_line(row) for row in chosen]
        header = [
            "algorithm",
            "ranks",
            "size",
            "µs",
            "predicted",
            "error",
            "one regime" if not crowded else "factor",
            "",
        ]
        cores = measured[0]["cores"]
        heading = f"{'more ranks than' if crowded else 'at most as many ranks as'} cores ({cores}), {_summary(chosen)}"
        parts.append(f"{heading}\n\n{format_table(header, lines, 1)}")
    return "\n\n".join(parts)


def _measured_line(row: Mapping[str, Any]) -> list[str]:
    low, middle, high = (1e6 * row[f"{which}_seconds"] for which in ("minimum", "median", "maximum"))
    factor = row["oversubscription"]
    return [
        row["algorithm"],
        str(row["ranks"]),
        format_size(row["bytes"]),
        f"{format_number(middle)} [{format_number(low)}–{format_number(high)}]",
        format_number(1e6 * row["predicted_seconds"] * (1.0 if factor is None else factor)),
        f"{row['error']:+.0%}",
        f"{row['one_regime_error']:+.0%}" if factor is None else format_number(factor),
        "fitted" if row["fitted"] else "",
    ]


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    errors = [abs(row["error"]) for row in rows if not row["fitted"]]
    if not errors:
        return "nothing held out"
    within = sum(error <= TARGET for error in errors)
    return (
        f"held out: median error {statistics.median(errors):.0%}, largest {max(errors):.0%}, "
        f"{within} of {len(errors)} within {TARGET:.0%}"
    )


def simulated_table(rows: Sequence[Mapping[str, Any]], place: str) -> str:
    """Return the simulated times, a column for each number of ranks."""
    simulated = [row for row in rows if row["kind"] == "simulated"]
    numbers = sorted({row["ranks"] for row in simulated})
    lines = []
    for n_bytes in sorted({row["bytes"] for row in simulated}):
        for name in dict.fromkeys(row["algorithm"] for row in simulated):
            found = {
                row["ranks"]: 1e3 * row["seconds"]
                for row in simulated
                if row["algorithm"] == name and row["bytes"] == n_bytes
            }
            lines.append([name, format_size(n_bytes), *(format_number(found.get(ranks)) for ranks in numbers)])
    header = ["algorithm", "size", *(f"{ranks} ranks" for ranks in numbers)]
    heading = f"simulated milliseconds, a core for each rank; {place}"
    return f"{heading}\n\n{format_table(header, lines, 2)}"
