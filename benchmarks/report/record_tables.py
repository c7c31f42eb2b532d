"""A record's rows as tables: what all rows share is said once, units are chosen for the size of the numbers."""

import json
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any

from benchmarks.report.content import Table
from benchmarks.report.sources import Record
from benchmarks.table import format_number, format_range

__all__ = ["group_names", "points_name", "record_tables", "table_name"]

_GROUPED_BY = ("figure", "kind")
# Whose figure shows all kinds.
_IN_ONE_TABLE = ("layer_costs",)
_POINTS = ("x", "y", "low", "high")
_TO_THE_TARGET = ("seconds", "wall_seconds", "samples", "steps")
_LONG = 12
_TINY = 1e-3
_SECONDS = "_seconds"
_UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))
_MOST_LISTED = 8
_WORD_COLUMNS = 3


def group_names(rows: Sequence[Mapping[str, Any]], keys: Sequence[str] = _GROUPED_BY) -> list[str]:
    """Return what the rows are grouped by, in order: the first of the keys, one empty name where there is none."""
    return list(dict.fromkeys(_group(row, keys) for row in rows))


def table_name(name: str, place: int) -> str:
    """Return the name of the table of the group at that place."""
    return f"{name}-rows" if place == 0 else f"{name}-rows-{place + 1}"


def points_name(name: str, place: int) -> str:
    """Return the name of the table of the points of the course's figure at that place."""
    return f"{name}-points" if place == 0 else f"{name}-points-{place + 1}"


def record_tables(name: str, record: Record) -> list[Table]:
    """Return a table of all rows, or one for each group of them; long ones are collapsed.

    The points of the course's figures have tables of their own.
    """
    keys = () if record.benchmark in _IN_ONE_TABLE else _GROUPED_BY
    tables = []
    for place, group in enumerate(group_names(record.rows, keys)):
        here = [_with_infinities(record.benchmark, row) for row in record.rows if _group(row, keys) == group]
        if record.benchmark == "course":
            tables.append(_points_table(points_name(name, place), f"Points of {group}", here))
            here = [{key: value for key, value in row.items() if key not in _POINTS} for row in here]
        tables.append(_table(table_name(name, place), f"Rows of {group}" if group else "Rows", here, keys))
    return tables


def _group(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    return next((f"{key} {row[key]}" for key in keys if key in row), "")


def _with_infinities(benchmark: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row with infinity where null stands for it, as JSON has none."""
    if benchmark in ("course", "recipes"):
        return {key: _never_came(value) if isinstance(value, list) else value for key, value in row.items()}
    if benchmark == "time_to_accuracy" and not row["reached"]:
        # Who does not tell its communication does not tell its bytes either.
        told = () if row["communication_seconds"] is None else ("bytes",)
        return {**row, **dict.fromkeys((*_TO_THE_TARGET, *told), inf)}
    return row


def _never_came(values: Sequence[Any]) -> list[Any]:
    return [inf if value is None else value for value in values]


def _points_table(name: str, title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the points of a figure, a line for each."""
    lines = tuple(
        (str(row["series"]), *map(_text, point), _text(row["n"]))
        for row in rows
        for point in zip(*(row[key] or [None] * len(row["x"]) for key in _POINTS), strict=True)
    )
    return Table(
        name,
        f"{title} ({len(lines)})",
        ("series", str(rows[0]["x_label"]), str(rows[0]["y_label"]), "low", "high", "n"),
        lines,
        "Low and high are the ends of what the figure shows around a point; ∞: infinite, or never reached.",
        collapsed=len(lines) > _LONG,
    )


def _table(name: str, title: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Table:
    columns = list(dict.fromkeys(column for row in rows for column in row if column not in keys))
    same = {column for column in columns if len(rows) > 1 and len({json.dumps(row.get(column)) for row in rows}) == 1}
    shared, columns = [each for each in columns if each in same], [each for each in columns if each not in same]
    if not columns:
        shared, columns = [], shared
    words = [each for each in columns if all(isinstance(row.get(each), str) for row in rows)][:_WORD_COLUMNS]
    columns = [*words, *(each for each in columns if each not in words)]
    written = [_column(column, [row.get(column) for row in rows]) for column in columns]
    told = [f"{header} {values[0]}" for header, values in (_column(each, [rows[0].get(each)]) for each in shared)]
    return Table(
        name,
        f"{title} ({len(rows)})",
        tuple(header for header, _ in written),
        tuple(zip(*(values for _, values in written), strict=True)),
        f"In all rows: {'; '.join(told)}." if told else "",
        text_columns=max(1, len(words)),
        collapsed=len(rows) > _LONG,
    )


def _column(name: str, values: Sequence[Any]) -> tuple[str, list[str]]:
    """Return the header, with the unit chosen for seconds, and the values as text."""
    header, scale = name, 1.0
    if name.endswith(_SECONDS) and (seconds := [abs(each) for each in values if _is_number(each) and isfinite(each)]):
        fitting = [each for each in _UNITS if max(seconds) * each[0] >= 1]
        scale, unit = fitting[0] if fitting else _UNITS[-1]
        header = f"{name.removesuffix(_SECONDS)} ({unit})"
    return header.replace("_", " "), [_text(each, scale) for each in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any, scale: float = 1.0) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and scale == 1.0:
        return f"{value:,}"
    if isinstance(value, (int, float)):
        number = value * scale
        return f"{number:.3g}" if 0 < abs(number) < _TINY else format_number(number)
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _list(value)
    if isinstance(value, dict):
        return "; ".join(f"{key} {_text(each)}" for key, each in value.items()) or "–"
    return json.dumps(value)


def _list(values: list[Any]) -> str:
    """Return few values one by one, many numbers as how many there are and "median [min–max]"."""
    if not values:
        return "–"
    # Words may be the folders of runs, of which all are named.
    if len(values) <= _MOST_LISTED or all(isinstance(each, str) for each in values):
        return ", ".join(map(_text, values))
    numbers = [each for each in values if _is_number(each)]
    if len(numbers) == len(values):
        return f"{len(values)} values, {format_range(numbers)}"
    return f"{len(values)} values"
