"""Test accuracy against training seconds: a line per cell, told apart by marker and style as well as by colour."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from benchmarks.runs import Outcome

__all__ = ["median_run", "plot_accuracy"]

# Okabe and Ito's colours, which colour-blind readers tell apart; the styles serve greyscale.
_STYLES = (
    ("#000000", "-", "o"),
    ("#e69f00", "--", "s"),
    ("#56b4e9", "-.", "^"),
    ("#009e73", "-", "D"),
    ("#d55e00", "--", "v"),
    ("#0072b2", "-.", "P"),
    ("#cc79a7", ":", "X"),
)
_MARKERS_SHOWN = 8
_BAND_POINTS = 200
_DOTS_PER_INCH = 150
_LOGARITHMIC_ABOVE = 10
"""How many times longer the slowest run takes than the fastest before one linear axis shows neither."""


def plot_accuracy(cells: Mapping[str, Sequence[Outcome]], target_accuracy: float, title: str, file: Path) -> None:
    """Draw the runs of each cell, by label: the run of the median seed, and the band between all seeds.

    Between evaluations the band interpolates; a run that has ended keeps its last accuracy.
    """
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for index, (label, runs) in enumerate(cells.items()):
        colour, line, marker = _STYLES[index % len(_STYLES)]
        curves = [
            (
                np.array([each.train_seconds for each in run.evaluations]),
                np.array([each.test_accuracy for each in run.evaluations]),
            )
            for run in runs
        ]
        seconds = np.linspace(max(times[0] for times, _ in curves), max(times[-1] for times, _ in curves), _BAND_POINTS)
        accuracies = np.stack([np.interp(seconds, *curve) for curve in curves])
        axes.fill_between(seconds, accuracies.min(0), accuracies.max(0), color=colour, alpha=0.12, linewidth=0)
        times, accuracy = curves[runs.index(median_run(runs))]
        axes.plot(
            times,
            accuracy,
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=5,
            markevery=max(1, len(times) // _MARKERS_SHOWN),
            linewidth=1.5,
            label=f"{label} (n = {len(runs)})",
        )
    axes.axhline(target_accuracy, color="0.2", linestyle=(0, (8, 4)), linewidth=1, label="target")
    axes.set(xlabel="training time without evaluation (s)", ylabel="test accuracy", title=title)
    ends = [run.evaluations[-1].train_seconds for runs in cells.values() for run in runs]
    if max(ends) > _LOGARITHMIC_ABOVE * min(ends):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=_DOTS_PER_INCH)


def median_run(runs: Sequence[Outcome]) -> Outcome:
    """Return the run whose seconds to the target are the (lower) median."""
    middle = statistics.median_low(run.seconds for run in runs)
    return next(run for run in runs if run.seconds == middle)
