"""Plain English about numbers: one and many, lists, percentages, ranges that leave an order open."""

from collections.abc import Sequence

__all__ = ["count", "listing", "percent", "undecided"]


def count(n: int, one: str, many: str | None = None) -> str:
    """Return "1 run", "2 runs", "no runs"."""
    return f"{n or 'no'} {one if n == 1 else many or one + 's'}"


def listing(parts: Sequence[str]) -> str:
    """Return "a", "a and b", "a, b and c"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def undecided(winner: str, others: Sequence[str]) -> str:
    """Return a sentence about those whose ranges over seeds overlap the winner's, none where there are none."""
    if not others:
        return ""
    ranges = "that" if len(others) == 1 else "those"
    return (
        f"The range over seeds of “{winner}” overlaps {ranges} of {listing([f'“{other}”' for other in others])}, so "
        "that there is no difference to report between them."
    )
