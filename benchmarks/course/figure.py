"""Draws any figure of the course from its rows, one per line of the figure.

A row has "figure", "title", "series", the points "x", "y", the ends "low" and "high" of what they vary by, or None,
"x_label", "y_label" with units, "x_log", "y_log", and "n", the runs of each point, None for a formula. None among y,
low or high stands for infinity, drawn at the top, single points as hollow markers. Lines differ by colour, style and
marker, so that grey will do.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from benchmarks.plot_styles import STYLES, Style

__all__ = ["draw"]

_SEPARATE_POINTS = 16
"""Up to so many points, each has a marker and a bar; more make a line with a band."""
_MARKERS_SHOWN = 8
_ASIDE_POINTS = 10
_DOTS_PER_INCH = 160
_POINTS = 12
_WIDE_AXIS = 10_000.0
_TICKS = ((1.0, (1, 1.5, 2, 3, 4, 5, 7)), (2.5, (1, 2, 5)), (np.inf, (1,)))
"""Where a logarithmic axis of fewer decades than the first number has ticks, in each decade."""


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the rows of one figure into the file."""
    first = rows[0]
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log" if first["x_log"] else "linear", yscale="log" if first["y_log"] else "linear")
    infinite = _level_of_infinity(rows)
    with_formula = any(row["n"] is None for row in rows)
    for index, row in enumerate(rows):
        _draw_row(axes, row, STYLES[index % len(STYLES)], infinite, with_formula)
        if len(row["x"]) <= _SEPARATE_POINTS:
            _draw_infinite_points(axes, row, STYLES[index % len(STYLES)], infinite, index - (len(rows) - 1) / 2)
    axes.set_xlabel(first["x_label"], fontsize=_POINTS)
    axes.set_ylabel(first["y_label"], fontsize=_POINTS)
    axes.tick_params(labelsize=_POINTS - 1)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    _set_ticks(axes, rows)
    figure.suptitle(first.get("title", first["figure"]), fontsize=_POINTS + 1)
    _add_legend(figure, axes)
    if any(None in (row[key] or ()) for row in rows for key in ("y", "high")):
        _mark_infinity(figure, axes, infinite)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _draw_row(axes: Axes, row: Mapping[str, Any], style: Style, infinite: float, with_formula: bool) -> None:
    colour, line, marker = style
    x, y = np.array(row["x"], dtype=np.float64), _values(row["y"], infinite)
    label = f"{row['series']}" if row["n"] is None else f"{row['series']} (n = {row['n']})"
    if row["n"] is None:
        axes.plot(x, y, color=colour, linestyle=line, linewidth=1.3, zorder=1.5, label=label)
        return
    few = len(x) <= _SEPARATE_POINTS
    axes.plot(
        x,
        _values(row["y"], np.nan) if few else y,
        color=colour,
        linestyle="" if with_formula else line,
        marker=marker,
        markersize=6,
        markevery=1 if few else max(1, len(x) // _MARKERS_SHOWN),
        linewidth=1.8,
        label=label,
    )
    if row["low"] is None:
        return
    low, high = _values(row["low"], infinite), _values(row["high"], infinite)
    if few:
        axes.vlines(x, low, high, color=colour, linewidth=1.2)
        axes.plot(np.tile(x, 2), np.concatenate([low, high]), "_", color=colour, markersize=8)
    else:
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_infinite_points(axes: Axes, row: Mapping[str, Any], style: Style, infinite: float, place: float) -> None:
    """Draw markers without a line to them, those of several rows beside each other, at `place` markers to the right."""
    colour, _, marker = style
    aside = ScaledTranslation(place * _ASIDE_POINTS / 72, 0, axes.figure.dpi_scale_trans)
    x = [x for x, y in zip(row["x"], row["y"], strict=True) if y is None]
    axes.plot(
        x,
        np.full(len(x), infinite),
        color=colour,
        linestyle="",
        marker=marker,
        markersize=7,
        markerfacecolor="white",
        markeredgewidth=1.8,
        transform=axes.transData + aside,
        zorder=3,
    )


def _add_legend(figure: Figure, axes: Axes) -> None:
    """Put the legend below, in as many columns as there is room for."""
    handles, labels = axes.get_legend_handles_labels()
    for columns in (3, 2, 1):
        legend = figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=_POINTS - 1,
            handlelength=3,
        )
        figure.draw_without_rendering()
        if columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            return
        legend.remove()


def _values(values: Sequence[float | None], infinite: float) -> NDArray[np.float64]:
    return np.array([infinite if value is None else value for value in values], dtype=np.float64)


def _finite(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [value for row in rows for key in ("y", "low", "high") for value in row[key] or () if value is not None]


def _level_of_infinity(rows: Sequence[Mapping[str, Any]]) -> float:
    finite = _finite(rows) or [1.0]
    if rows[0]["y_log"]:
        finite = [value for value in finite if value > 0] or [1.0]
        return max(finite) * max(1.3, (max(finite) / min(finite)) ** 0.12)
    return max(finite) * 1.15


def _mark_infinity(figure: Figure, axes: Axes, infinite: float) -> None:
    """Write ∞ beside the level that stands for it, in place of the axis' own numbers up there."""
    bottom, _ = axes.get_ylim()
    logarithmic = axes.get_yscale() == "log"
    margin = 1.12 if logarithmic else 1.06
    axes.set_ylim(bottom, infinite * margin)
    figure.draw_without_rendering()
    kept = [float(tick) for tick in axes.yaxis.get_majorticklocs() if bottom <= tick < infinite / margin]
    written = axes.yaxis.get_major_formatter()
    axes.axhline(infinite, color="0.55", linestyle=(0, (1, 2)), linewidth=1, zorder=1)
    axes.yaxis.set_major_locator(FixedLocator([*kept, infinite]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: "∞" if np.isclose(y, infinite) else written(y)))


def _set_ticks(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    places = sorted({x for row in rows if row["n"] is not None for x in row["x"]})
    found = set(_finite(rows))
    # Logarithmic axes find no limits of their own around a single value.
    if rows[0]["x_log"] and len(places) == 1:
        axes.set_xlim(places[0] / 2, 2 * places[0])
    if rows[0]["y_log"] and len(found) == 1:
        axes.set_ylim(min(found) / 2, 2 * min(found))
    if rows[0]["x_log"] and len(places) <= _SEPARATE_POINTS:
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    elif max(places) >= _WIDE_AXIS:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if rows[0]["y_log"]:
        finite = [value for value in _finite(rows) if value > 0] or [1.0]
        decades = np.log10(max(finite) / min(finite))
        axes.yaxis.set_major_locator(LogLocator(subs=next(subs for limit, subs in _TICKS if decades < limit)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    elif min(_finite(rows), default=0.0) >= 0:
        axes.set_ylim(bottom=0)
