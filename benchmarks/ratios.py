"""Times of steps of contenders that took turns, beside one of them: in a record's rows, and in a table."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.table import format_range

__all__ = ["ratio_columns", "ratio_row"]


def ratio_row(seconds: Sequence[float], others_seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median and range of times, one of each round, and of their ratios to another's of the same round."""
    ratios = [one / other for one, other in zip(seconds, others_seconds, strict=True)]
    return {
        "rounds": len(ratios),
        "median_seconds": statistics.median(seconds),
        "minimum_seconds": min(seconds),
        "maximum_seconds": max(seconds),
        "ratio": statistics.median(ratios),
        "minimum_ratio": min(ratios),
        "maximum_ratio": max(ratios),
    }


def ratio_columns(row: Mapping[str, Any]) -> list[str]:
    """Return the times, in milliseconds, and the ratios of such a row, each as median [minimum–maximum]."""
    return [
        format_range([1e3 * row[f"{which}_seconds"] for which in ("minimum", "median", "maximum")]),
        format_range([row["minimum_ratio"], row["ratio"], row["maximum_ratio"]]),
    ]
