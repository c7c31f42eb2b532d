"""Tables for people: columns aligned, numbers with three significant digits, more only before the point."""

import math
import statistics
from collections.abc import Sequence

__all__ = ["format_number", "format_range", "format_table"]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Return the lines of a table: the first `text_columns` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index < text_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def format_number(value: float | None) -> str:
    """Return the number with three significant digits or as a whole number, "–" for None and "∞" for infinity."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def format_range(values: Sequence[float]) -> str:
    """Return "median [min–max]"."""
    low, middle, high = min(values), statistics.median(values), max(values)
    if low == high:
        return format_number(middle)
    return f"{format_number(middle)} [{format_number(low)}–{format_number(high)}]"
