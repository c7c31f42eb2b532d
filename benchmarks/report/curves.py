"""Test accuracy against what it took: seconds, samples or bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from benchmarks.plot_styles import STYLES
from benchmarks.report.measures import Measured
from benchmarks.report.styles import add_legend, linear_axis, log_axis, new_figure
from benchmarks.study.results import Run

__all__ = ["QUANTITIES", "Quantity", "draw_curves", "has"]

_BAND_POINTS = 200
_MARKERS_SHOWN = 8
_SHOWN_BELOW = 0.15
_LOGARITHMIC_ABOVE = 8
"""How many times as far the longest run goes as the shortest before one linear axis shows neither."""


@dataclass(frozen=True)
class Quantity:
    """What accuracy is paid with. `scale` turns the evaluation's field into the unit of `axis`."""

    name: Literal["seconds", "samples", "bytes"]
    field: str
    title: str
    axis: str
    scale: float = 1.0


QUANTITIES = (
    Quantity("seconds", "train_seconds", "training time", "training time without evaluation (s)"),
    Quantity("samples", "samples", "samples", "samples trained on, all ranks (thousands)", 1e-3),
    Quantity("bytes", "bytes", "bytes sent", "sent per rank (MB, 10⁶ bytes)", 1e-6),
)

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def has(each: Measured, quantity: Quantity) -> bool:
    """Say whether all runs tell the quantity, and spent any of it."""
    spent = [getattr(run.evaluations[-1], quantity.field) for run in each.runs]
    return all(last is not None and last > 0 for last in spent)


def draw_curves(cells: Sequence[Measured], quantity: Quantity, target_accuracy: float) -> Figure:
    """Draw for each cell the run of the median seed, the band between all seeds, and where runs ended that missed.

    Between evaluations the band interpolates; a run that has ended keeps its last accuracy. Cells whose runs do not
    have the quantity are left out, and the others look alike in the figures of all quantities. One must have it.
    """
    styled = [(style, each) for style, each in zip(STYLES, cells, strict=False) if has(each, quantity)]
    cells = [each for _, each in styled]
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    ends = [_curve(run, quantity)[0][-1] for each in cells for run in each.runs]
    logarithmic = max(ends) > _LOGARITHMIC_ABOVE * min(ends)
    handles: list[Artist] = []
    for (colour, line, marker), each in styled:
        curves = [_curve(run, quantity) for run in each.runs]
        start, end = max(spent[0] for spent, _ in curves), max(spent[-1] for spent, _ in curves)
        grid = np.geomspace(start, end, _BAND_POINTS) if logarithmic else np.linspace(start, end, _BAND_POINTS)
        accuracies = np.stack([np.interp(grid, *curve) for curve in curves])
        axes.fill_between(grid, accuracies.min(0), accuracies.max(0), color=colour, alpha=0.13, linewidth=0)
        spent, accuracy = curves[each.runs.index(each.median_run)]
        (drawn,) = axes.plot(
            spent,
            accuracy,
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=5,
            markevery=max(1, len(spent) // _MARKERS_SHOWN),
            linewidth=1.6,
        )
        handles.append(drawn)
        misses = [curve for run, curve in zip(each.runs, curves, strict=True) if not run.reached]
        for spent, accuracy in misses:
            axes.plot(spent[-1], accuracy[-1], color=colour, marker="x", markersize=9, markeredgewidth=2, zorder=5)
    target = axes.axhline(target_accuracy, color="0.2", linestyle=(0, (8, 4)), linewidth=1)
    handles.append(target)
    labels = [*(each.label for each in cells), f"target: {100 * target_accuracy:g} %"]
    if any(each.missed for each in cells):
        handles.append(Line2D([], [], color="0.2", marker="x", markersize=9, markeredgewidth=2, linestyle=""))
        labels.append("end of a run that missed the target")
    axes.set(xlabel=quantity.axis, ylabel="test accuracy", title=f"Test accuracy against {quantity.title}")
    if logarithmic:
        log_axis(axes, "x", ends)
    else:
        linear_axis(axes, "x")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda accuracy, _: f"{100 * accuracy:g} %"))
    _look_near(axes, target_accuracy, [_curve(run, quantity) for each in cells for run in each.runs])
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    add_legend(figure, handles, labels)
    return figure


def _look_near(axes: Axes, target_accuracy: float, curves: Sequence[Curve]) -> None:
    """Leave out what lies far below the target, where all curves are steep, and what was spent before.

    A curve that never comes near is seen whole.
    """
    near = target_accuracy - _SHOWN_BELOW
    far = [accuracy.min() for _, accuracy in curves if accuracy.max() < near]
    lowest = max(min(accuracy.min() for _, accuracy in curves), min([near, *far]))
    highest = max(target_accuracy, *(accuracy.max() for _, accuracy in curves))
    margin = 0.04 * (highest - lowest)
    axes.set_ylim(lowest - margin, highest + 2 * margin)
    left = min(spent[np.argmax(accuracy >= lowest)] for spent, accuracy in curves)
    right = max(spent[-1] for spent, _ in curves)
    if axes.get_xscale() == "log":
        axes.set_xlim(left / 1.15, right * 1.15)
    else:
        axes.set_xlim(left - 0.03 * (right - left), right * 1.03)


def _curve(run: Run, quantity: Quantity) -> Curve:
    """Return what was spent and the accuracy at each evaluation after the first step."""
    points = [
        (quantity.scale * getattr(each, quantity.field), each.test_accuracy)
        for each in run.evaluations
        if getattr(each, quantity.field) > 0
    ]
    spent, accuracies = zip(*points, strict=True)
    return np.array(spent), np.array(accuracies)
