"""A record's rows as tables: what all rows share is said once, units are chosen for the size of the numbers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.content import Table
from benchmarks.table import format_number, format_range

__all__ = ["group_names", "record_tables", "table_name"]

_GROUPED_BY = ("figure", "kind")
_LONG = 12
_TINY = 1e-3
_SECONDS = "_seconds"
_UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))
_MOST_LISTED = 8
_WORD_COLUMNS = 3


def group_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the rows are grouped by, in order: `figure` or `kind`, one empty name where there is neither."""
    return list(dict.fromkeys(map(_group, rows)))


def table_name(name: str, place: int) -> str:
    """Return the name of the table of the group at that place."""
    return f"{name}-rows" if place == 0 else f"{name}-rows-{place + 1}"


def record_tables(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return a table of all rows, or one for each group of them; long ones are collapsed."""
    tables = []
    for place, group in enumerate(group_names(rows)):
        here = [row for row in rows if _group(row) == group]
        tables.append(_table(table_name(name, place), f"Rows of {group}" if group else "Rows", here))
    return tables


def _group(row: Mapping[str, Any]) -> str:
    return next((f"{key} {row[key]}" for key in _GROUPED_BY if key in row), "")


def _table(name: str, title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(column for row in rows for column in row if column not in _GROUPED_BY))
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
    numbers = [abs(each) for each in values if isinstance(each, (int, float)) and not isinstance(each, bool)]
    if name.endswith(_SECONDS) and numbers:
        fitting = [each for each in _UNITS if max(numbers) * each[0] >= 1]
        scale, unit = fitting[0] if fitting else _UNITS[-1]
        header = f"{name.removesuffix(_SECONDS)} ({unit})"
    return header.replace("_", " "), [_text(each, scale) for each in values]


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
    numbers = [each for each in values if isinstance(each, (int, float)) and not isinstance(each, bool)]
    if len(numbers) == len(values):
        return f"{len(values)} values, {format_range(numbers)}"
    return f"{len(values)} values"
