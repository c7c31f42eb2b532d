"""The rows of the record of `step_time`, and the tables for people."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.contenders import Turn
from benchmarks.overlap import Parts, overlap_bound
from benchmarks.step_contenders import BASELINE, OURS
from benchmarks.step_rounds import Rounds
from benchmarks.table import format_number, format_table

__all__ = ["Setup", "report", "summarise"]


@dataclass(frozen=True)
class Setup:
    """What all rows of a run share."""

    ranks: int
    hosts: int
    optimizer: str


def summarise(workload: str, setup: Setup, rounds: Rounds, parts: Sequence[Parts] = ()) -> list[dict[str, Any]]:
    """Return a row for each contender: of the settings of one, only the fastest.

    `parts` are those of the overlap bound, one per round; without them ours is held to none.
    """
    baseline = _slowest(rounds[BASELINE, ""])
    fastest: dict[str, str] = {}
    tried: dict[str, dict[str, float]] = {}
    for (name, setting), turns in rounds.items():
        tried.setdefault(name, {})[setting] = statistics.median(_slowest(turns))
        fastest[name] = min(tried[name], key=tried[name].__getitem__)
    rows = []
    for name, setting in fastest.items():
        turns = rounds[name, setting]
        slowest = _slowest(turns)
        waited_seconds = _typical(turns, lambda turn: turn.exposed_seconds)
        longer_seconds = statistics.median(mine - base for mine, base in zip(slowest, baseline, strict=True))
        row = {
            "workload": workload,
            "contender": name,
            "setting": setting,
            "ranks": setup.ranks,
            "hosts": setup.hosts,
            "optimizer": setup.optimizer,
            "rounds": len(turns),
            "median_seconds": tried[name][setting],
            "minimum_seconds": min(slowest),
            "maximum_seconds": max(slowest),
            "ratio": statistics.median(mine / base for mine, base in zip(slowest, baseline, strict=True)),
            "forward_seconds": _typical(turns, lambda turn: turn.forward_seconds),
            "backward_seconds": _typical(turns, lambda turn: turn.backward_seconds),
            "optimizer_seconds": _typical(turns, lambda turn: turn.optimizer_seconds),
            "exposed_seconds": longer_seconds if waited_seconds is None else waited_seconds,
            "exposed_by": "difference" if waited_seconds is None else "waiting",
            "sent_bytes": _typical(turns, lambda turn: turn.sent_bytes),
            "settings_tried": {each: seconds for each, seconds in tried[name].items() if each},
        }
        if parts and name != "alone":
            row |= _against_bound(slowest, parts)
        rows.append(row)
    return rows


def _against_bound(slowest: Sequence[float], parts: Sequence[Parts]) -> dict[str, Any]:
    bounds = [overlap_bound(each) for each in parts]
    ideal = [overlap_bound(Parts(**{**vars(each), "contention": 1.0})) for each in parts]
    return {
        "bound_seconds": statistics.median(bounds),
        "bound_without_contention_seconds": statistics.median(ideal),
        "ratio_to_bound": statistics.median(mine / bound for mine, bound in zip(slowest, bounds, strict=True)),
        "contention": statistics.median(each.contention for each in parts),
        "bucket_ready_seconds": _medians([each.ready_seconds for each in parts]),
        "bucket_reduction_seconds": _medians([each.reduction_seconds for each in parts]),
        "compute_seconds": _medians(
            [(each.forward_seconds, each.backward_seconds, each.optimizer_seconds) for each in parts]
        ),
    }


def _medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*rounds, strict=True)]


def _slowest(rounds: Sequence[Sequence[Turn]]) -> list[float]:
    """Return the seconds per step of each round: the maximum over ranks."""
    return [max(turn.seconds for turn in turns) for turns in rounds]


def _typical(rounds: Sequence[Sequence[Turn]], part: Callable[[Turn], float | None]) -> float | None:
    """Return the mean over ranks in each round, then the median over rounds; None where it was not measured.

    The mean, not the maximum: the ranks of a step end together, and what one waits the other computes.
    """
    means = []
    for turns in rounds:
        values = [value for value in map(part, turns) if value is not None]
        if values:
            means.append(statistics.fmean(values))
    return statistics.median(means) if means else None


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables: all contenders, the settings that were tried, and the bound where it was measured."""
    ranks, hosts = rows[0]["ranks"], rows[0]["hosts"]
    heading = (
        f"{ranks} rank{'s' if ranks > 1 else ''} on {hosts} host{'s' if hosts > 1 else ''}, one thread each, "
        f"{rows[0]['optimizer']}; milliseconds per step"
    )
    parts = [heading, _contenders(rows)]
    if any(len(row["settings_tried"]) > 1 for row in rows):
        parts.append(_settings(rows))
    if any("bound_seconds" in row for row in rows):
        parts.append(_bounds(rows))
    cost = next((row["hook_seconds_per_parameter"] for row in rows if "hook_seconds_per_parameter" in row), None)
    if cost is not None:
        parts.append(f"hooks of ours: {1e6 * cost:.2f} µs per parameter and backward pass")
    return "\n\n".join(parts)


def _contenders(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["workload", "contender", "ms per step", "ratio", "forward", "backward", "optimizer", "exposed", "MB sent"]
    lines = []
    for row in rows:
        low, middle, high = (1e3 * row[f"{which}_seconds"] for which in ("minimum", "median", "maximum"))
        phases = [1e3 * row[f"{phase}_seconds"] for phase in ("forward", "backward", "optimizer", "exposed")]
        sent = None if row["sent_bytes"] is None else row["sent_bytes"] / 1e6
        lines.append(
            [
                row["workload"],
                f"{row['contender']} {row['setting']}".rstrip(),
                f"{format_number(middle)} [{format_number(low)}–{format_number(high)}]",
                f"{row['ratio']:.3f}",
                *map(format_number, phases),
                format_number(sent),
            ]
        )
    return format_table(header, lines, 2)


def _settings(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [row["workload"], row["contender"], setting, format_number(1e3 * seconds)]
        for row in rows
        if len(row["settings_tried"]) > 1
        for setting, seconds in row["settings_tried"].items()
    ]
    return format_table(["workload", "contender", "setting tried", "ms per step"], lines, 3)


def _bounds(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["workload", "contender", "ms per step", "bound", "÷ bound", "contention", "buckets ready", "reduced in"]
    lines = [
        [
            row["workload"],
            row["contender"],
            format_number(1e3 * row["median_seconds"]),
            format_number(1e3 * row["bound_seconds"]),
            f"{row['ratio_to_bound']:.3f}",
            f"{row['contention']:.3f}",
            ", ".join(format_number(1e3 * seconds) for seconds in row["bucket_ready_seconds"]),
            ", ".join(format_number(1e3 * seconds) for seconds in row["bucket_reduction_seconds"]),
        ]
        for row in rows
        if "bound_seconds" in row and row["contender"].startswith((OURS, "torch"))
    ]
    return format_table(header, lines, 2)
