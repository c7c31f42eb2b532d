"""Plain English about numbers: one and many, lists, percentages."""

from collections.abc import Sequence

__all__ = ["count", "listing", "percent"]


def count(n: int, one: str, many: str | None = None) -> str:
    """Return "1 run", "2 runs", "no runs"."""
    return f"{n or 'no'} {one if n == 1 else many or one + 's'}"


def listing(parts: Sequence[str]) -> str:
    """Return "a", "a and b", "a, b and c"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"
