"""Figures with a row for each cell: speed-ups, their two factors, what the target took, and where the time went."""

from collections.abc import Callable, Sequence
from math import isinf
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.plot_styles import STYLES
from benchmarks.report.curves import Quantity
from benchmarks.report.measures import Measured
from benchmarks.report.styles import add_legend, linear_axis, log_axis, mark, n_of, new_figure, row_axes
from benchmarks.speedup import SpeedUp
from benchmarks.table import format_number

__all__ = ["draw_factors", "draw_speed_up", "draw_time_split", "draw_to_target"]

_BARE_INCHES = 1.0
_AT_RIGHT_EDGE = 0.975
_LOGARITHMIC_ABOVE = 8
_SMALLEST = 1e-9
_FAR = 3
_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "ha": "left", "fontsize": 9.5, "zorder": 5}

_SPEED_UPS: tuple[tuple[str, Callable[[SpeedUp], float | None], int, bool, float], ...] = (
    ("1: per sample, over serial with the same batch", lambda each: each.same_batch, 1, False, -0.7),
    ("2: per epoch, over serial with batch 1", lambda each: each.epoch_over_batch_1, 2, True, 0),
    ("2: per epoch, over serial's fastest batch", lambda each: each.epoch_over_best, 2, False, 0),
    ("3: to the target, over serial with batch 1", lambda each: each.accuracy_over_batch_1, 3, True, 0.7),
    ("3: to the target, over serial's best batch [min–max]", lambda each: each.accuracy_over_best, 3, False, 0.7),
)


def draw_speed_up(cells: Sequence[Measured]) -> Figure:
    """Draw the speed-ups by all three definitions, the ideal ones, and the range over seeds of the last."""
    figure = new_figure(_BARE_INCHES)
    axes, half = row_axes(figure, [each.name for each in cells], 0.25)
    drawn: list[float] = [1.0, *(float(each.cores_used) for each in cells)]
    handles: list[Artist] = [Line2D([], [], color="0.2", linestyle=(0, (8, 4)), linewidth=1.2)]
    labels = ["no gain over serial SGD"]
    axes.axvline(1, color="0.2", linestyle=(0, (8, 4)), linewidth=1.2)
    for row, each in enumerate(cells):
        axes.plot([each.cores_used] * 2, [row - half, row + half], color="0.2", linestyle=":", linewidth=2)
    handles.append(Line2D([], [], color="0.2", linestyle=":", linewidth=2))
    labels.append("ideal: the number of cores used")
    for text, value, style, hollow, offset in _SPEED_UPS:
        colour, _, marker = STYLES[style]
        found = [(row, value(each.speed_up)) for row, each in enumerate(cells)]
        points = [(row, number) for row, number in found if number is not None and number > _SMALLEST]
        if not points:
            continue
        rows, numbers = zip(*points, strict=True)
        drawn += numbers
        face = "white" if hollow else colour
        places = [row + offset * half for row in rows]
        axes.plot(numbers, places, marker, color=colour, markerfacecolor=face, markersize=7, zorder=4 - hollow)
        handles.append(mark(STYLES[style], hollow=hollow))
        labels.append(text)
    for row, each in enumerate(cells):
        if each.speed_up_range is not None and each.speed_up_range[1] > _SMALLEST:
            low, high = (max(number, _SMALLEST) for number in each.speed_up_range)
            left = low if low > _SMALLEST else min(drawn) / 2
            drawn += [left, high]
            if low == _SMALLEST:
                axes.plot(left, row + 0.7 * half, "<", color=STYLES[3][0], markersize=6, zorder=3)
            axes.plot([left, high], [row + 0.7 * half] * 2, color=STYLES[3][0], linewidth=2, zorder=3)
        if each.speed_up.accuracy_over_best == 0:
            told = axes.text(0.015, row + 0.7 * half, "3: 0, missed the target", transform=axes.get_yaxis_transform())
            told.set(va="center", fontsize=9.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.set_xlabel("speed-up (times)")
    axes.set_title("Speed-up over serial SGD, by three definitions")
    log_axis(axes, "x", drawn)
    axes.set_xlim(min(drawn) / 1.25, max(drawn) * 1.25)
    add_legend(figure, handles, labels, _medians(cells))
    return figure


def draw_factors(cells: Sequence[Measured]) -> Figure:
    """Draw hardware and statistical efficiency, which all cells must have, and their product, the speed-up."""
    figure = new_figure(_BARE_INCHES)
    axes, _ = row_axes(figure, [each.name for each in cells])
    axes.axvline(1, color="0.2", linestyle=(0, (8, 4)), linewidth=1.2)
    parts: tuple[tuple[str, Callable[[SpeedUp], float | None], int], ...] = (
        ("hardware: samples per second", lambda each: each.hardware_efficiency, 2),
        ("statistical: samples needed", lambda each: each.statistical_efficiency, 4),
        ("product: speed-up to accuracy over serial's best batch", lambda each: each.accuracy_over_best, 3),
    )
    drawn = [1.0]
    handles: list[Artist] = []
    for _, value, style in parts:
        colour, _, marker = STYLES[style]
        numbers = [number for each in cells if (number := value(each.speed_up)) is not None]
        drawn += numbers
        axes.plot(numbers, range(len(cells)), marker, color=colour, markersize=7, zorder=3)
        handles.append(mark(STYLES[style]))
    for row, each in enumerate(cells):
        ends = [number for _, value, _ in parts if (number := value(each.speed_up)) is not None]
        axes.plot([min(*ends, 1), max(*ends, 1)], [row] * 2, color="0.75", linewidth=1.2, zorder=2)
    axes.set_xlabel("times that of the best serial SGD")
    axes.set_title("Speed-up to accuracy and its two factors")
    log_axis(axes, "x", drawn)
    axes.set_xlim(min(drawn) / 1.25, max(drawn) * 1.25)
    add_legend(figure, handles, [text for text, _, _ in parts], _medians(cells))
    return figure


def draw_to_target(cells: Sequence[Measured], quantity: Quantity) -> Figure:
    """Draw what each run spent until the target, the medians, and the runs that missed it at the right edge."""
    figure = new_figure(_BARE_INCHES)
    axes, half = row_axes(figure, [each.label for each in cells])
    drawn: list[float] = []
    for row, each in enumerate(cells):
        spent = [_spent(each, index, quantity) for index in range(each.n)]
        reached = [number for number in spent if not isinf(number)]
        drawn += reached
        colour = STYLES[2][0]
        axes.plot(reached, [row] * len(reached), "o", color=colour, markersize=6, alpha=0.55, markeredgewidth=0)
        middle = float(np.median(spent))
        if not isinf(middle):
            axes.plot([middle] * 2, [row - 0.8 * half, row + 0.8 * half], color="black", linewidth=2.4, zorder=3)
        edge = [_AT_RIGHT_EDGE - 0.02 * index for index in range(len(spent) - len(reached))]
        across = axes.get_yaxis_transform()
        axes.plot(edge, [row] * len(edge), "x", color=STYLES[1][0], transform=across, markersize=8, markeredgewidth=2)
    axes.set_xlabel(f"{quantity.axis}, until the target")
    axes.set_title(f"{quantity.title.capitalize()} to the target")
    if drawn and max(drawn) > _LOGARITHMIC_ABOVE * min(drawn):
        log_axis(axes, "x", drawn)
        axes.set_xlim(min(drawn) / 1.25, max(drawn) * 1.6)
    elif drawn:
        linear_axis(axes, "x")
        axes.set_xlim(0, max(drawn) * 1.15)
    else:
        axes.set_xticks([])
    handles: list[Artist] = [
        Line2D([], [], color=STYLES[2][0], marker="o", linestyle="", alpha=0.55),
        Line2D([], [], color="black", marker="|", markersize=12, markeredgewidth=2.4, linestyle=""),
    ]
    labels = ["a run", "median over seeds"]
    if any(each.missed for each in cells):
        handles.append(Line2D([], [], color=STYLES[1][0], marker="x", markersize=8, markeredgewidth=2, linestyle=""))
        labels.append("missed it: ∞")
    add_legend(figure, handles, labels, n_of(cells))
    return figure


def draw_time_split(cells: Sequence[Measured]) -> Figure:
    """Draw the training time of each cell's median run: computing, and waiting for communication where that is told."""
    figure = new_figure(_BARE_INCHES)
    axes, half = row_axes(figure, [each.name for each in cells])
    compute, exposed, unknown = STYLES[6][0], STYLES[1][0], "0.8"
    present: dict[str, Artist] = {}
    longest = sorted(each.range(lambda run: run.train_seconds)[1] for each in cells)
    # What took far longer than most must not make all else thin: its bar leaves the axes, its time stands there.
    limit = max(each for each in longest if each <= _FAR * longest[len(longest) // 2])
    for row, each in enumerate(cells):
        run = each.median_run
        waiting = run.exposed_communication_seconds
        if waiting is None:
            _bar(axes, (row, half), 0, run.train_seconds, unknown, "..")
            present["whole run, not told apart"] = Patch(facecolor=unknown, hatch="..", edgecolor="black")
        else:
            _bar(axes, (row, half), 0, run.train_seconds - waiting, compute, "")
            _bar(axes, (row, half), run.train_seconds - waiting, waiting, exposed, "///")
            present["computing"] = Patch(facecolor=compute, edgecolor="black")
            present["exposed communication"] = Patch(facecolor=exposed, hatch="///", edgecolor="black")
        low, high = each.range(lambda run: run.train_seconds)
        axes.plot([low, high], [row] * 2, color="black", linewidth=1.6, marker="|", markersize=8)
        text = f"{format_number(run.train_seconds)} s"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.9}
        axes.annotate(text, (min(max(high, run.train_seconds), limit), row), xytext=(5, 0), bbox=box, **_BESIDE)
    if any(each.n > 1 for each in cells):
        present["[min–max] of whole runs over seeds"] = Line2D([], [], color="black", linewidth=1.6, marker="|")
    axes.set_xlabel("training time of the whole run, without evaluation (s)")
    axes.set_title("Where the time went")
    axes.set_xlim(0, 1.22 * limit)
    linear_axis(axes, "x")
    add_legend(figure, list(present.values()), list(present), f"runs of the median seed, {n_of(cells)}")
    return figure


def _bar(axes: Axes, place: tuple[int, float], left: float, width: float, colour: str, hatch: str) -> None:
    row, half = place
    axes.barh(row, width, 1.8 * half, left=left, color=colour, hatch=hatch, edgecolor="black", linewidth=0.8)


def _medians(cells: Sequence[Measured]) -> str:
    return f"medians over seeds, {n_of(cells)}"


def _spent(each: Measured, index: int, quantity: Quantity) -> float:
    number: float = getattr(each.runs[index], quantity.name)
    return number * quantity.scale
