"""How figures look: narrow enough for a phone, told apart by marker and line as well as by colour."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.plot_styles import Style
from benchmarks.report.measures import Measured

__all__ = [
    "WIDTH_INCHES",
    "add_legend",
    "linear_axis",
    "log_axis",
    "mark",
    "n_of",
    "new_figure",
    "plain",
    "row_axes",
    "save",
]

WIDTH_INCHES = 5.2
_FONT_POINTS = 10.5
_DOTS_PER_INCH = 200
_LEGEND_CHARACTERS = 54
_LEGEND_LINE_INCHES = 0.215
_LABEL_INCHES = 0.23
_LABEL_ABOVE_INCHES = 0.04
_ROW_CHARACTERS = 58
_MOST_DECADES = 3
"""So many decades and fewer are ticked at 1, 2 and 5."""
_NARROW_SPAN = 5
"""Up to this ratio of the largest to the smallest value those would be one or two ticks, and there are more."""


def new_figure(height_inches: float) -> Figure:
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained", facecolor="white")


def plain(text: str) -> str:
    """Return what matplotlib draws as `text`: no formulas in it, and nothing that hides it from a legend."""
    return text.replace("$", r"\$").lstrip("_")


def n_of(cells: Sequence[Measured]) -> str:
    """Return "n = 5 runs of each", with the range where they differ."""
    low, high = min(each.n for each in cells), max(each.n for each in cells)
    if low == high:
        return f"n = {low} {'run' if low == 1 else 'runs'} of each"
    return f"n = {low}–{high} runs of each"


def add_legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], title: str = "") -> None:
    """Put the legend under the axes, and make the figure as much higher as it needs."""
    wrapped = [textwrap.fill(plain(label), _LEGEND_CHARACTERS) for label in labels]
    columns = 2 if max(map(len, wrapped)) <= _LEGEND_CHARACTERS // 2 - 4 else 1
    lines = sum(text.count("\n") + 1 for text in wrapped)
    lines = -(-lines // columns) + (title.count("\n") + 1 if title else 0)
    figure.set_figheight(figure.get_figheight() + _LEGEND_LINE_INCHES * lines + 0.1)
    figure.legend(
        handles,
        wrapped,
        title=title or None,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=_FONT_POINTS - 0.5,
        title_fontsize=_FONT_POINTS - 0.5,
        handlelength=2.6,
    )


def log_axis(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Make the axis logarithmic, with plain numbers at its ticks, enough of them for the values' range."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    ticks: tuple[float, ...] = (1,)
    if max(values) <= _NARROW_SPAN * min(values):
        ticks = (1, 1.5, 2, 3, 4, 6, 8)
    elif max(values) <= 10**_MOST_DECADES * min(values):
        ticks = (1, 2, 5)
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_formatter(NullFormatter())


def linear_axis(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(_tick))


def _tick(value: float, _: Any) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def row_axes(figure: Figure, labels: Sequence[str], half_inches: float = 0.16) -> tuple[Axes, float]:
    """Return axes with a row for each label, which stands above it, and make the figure high enough for them.

    Row i is at y = i, from the top down. Marks have `half_inches` above and below it, which is returned in units of y.
    """
    wrapped = [textwrap.fill(plain(label), _ROW_CHARACTERS) for label in labels]
    label_inches = _LABEL_INCHES * max(text.count("\n") + 1 for text in wrapped)
    pitch_inches = label_inches + 2 * half_inches
    half, above = half_inches / pitch_inches, (half_inches + label_inches) / pitch_inches
    figure.set_figheight(figure.get_figheight() + len(labels) * pitch_inches)
    axes = figure.add_subplot()
    axes.set_ylim(len(labels) - above, -above)
    axes.set_yticks([])
    for row, label in enumerate(wrapped):
        # On white, as vertical lines pass behind it.
        place = (0.01, row - half - _LABEL_ABOVE_INCHES / pitch_inches)
        drawn = axes.text(*place, label, transform=axes.get_yaxis_transform(), va="bottom", zorder=2.5)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.9}
        drawn.set(fontsize=_FONT_POINTS - 0.5, bbox=box)
        if row:
            axes.axhline(row - above, color="0.85", linewidth=0.8)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    return axes, half


def mark(style: Style, *, hollow: bool = False) -> Line2D:
    """Return a marker for a legend."""
    colour, _, marker = style
    return Line2D([], [], color=colour, marker=marker, linestyle="", markerfacecolor="white" if hollow else colour)


def save(figure: Figure, folder: Path, name: str) -> None:
    figure.savefig(folder / f"{name}.png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
