"""Steps and samples to the target against batch size: the runs, the fitted hyperbola and the measured noise scale."""

import statistics
from collections.abc import Sequence
from math import isinf

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from benchmarks.hyperbola import Fit, fit_hyperbola, points_of
from benchmarks.plot_styles import STYLES
from benchmarks.report.styles import add_legend, log_axis, new_figure
from benchmarks.study.results import Study
from benchmarks.table import format_number, format_range

__all__ = ["draw_hyperbola", "fit_of", "noise_scales"]

_CURVE_POINTS = 100
_PANEL_INCHES = 2.7
_LARGEST_AXIS_RATIO = 1e4


def fit_of(study: Study) -> Fit | None:
    """Return the fit of the study's runs, None where they reached the target at fewer than three batch sizes."""
    try:
        return fit_hyperbola(points_of(study))
    except ValueError:
        return None


def noise_scales(study: Study) -> list[float]:
    """Return the gradient noise scales that the measured runs tell, in samples."""
    return [run.noise_scale for run in study.runs if run.phase == "measured" and run.noise_scale is not None]


def draw_hyperbola(points: Sequence[tuple[int, float]], fit: Fit, noise: Sequence[float]) -> Figure:
    """Draw every run's steps and samples, the fit, the 95 % range of B_crit, and the range of the noise scales."""
    # An estimate from few steps may be negative, for which logarithmic axes have no place.
    noise = [scale for scale in noise if scale > 0]
    figure = new_figure(2 * _PANEL_INCHES)
    panels = figure.subplots(2, 1, sharex=True)
    reached = [(batch, steps) for batch, steps in points if not isinf(steps)]
    batches = np.array([batch for batch, _ in reached], dtype=float)
    steps = np.array([count for _, count in reached])
    interesting = [*batches, fit.b_crit, *noise]
    low, high = min(interesting) / 1.5, min(max(interesting), max(batches) * _LARGEST_AXIS_RATIO) * 1.5
    grid = np.geomspace(low, high, _CURVE_POINTS)
    handles: list[Artist] = []
    panel_data = ((steps, fit.steps, "steps to the target"), (batches * steps, fit.samples, "samples to the target"))
    for axes, (found, curve, what) in zip(panels, panel_data, strict=True):
        (dots,) = axes.plot(batches, found, "o", color=STYLES[2][0], markersize=6, alpha=0.6, markeredgewidth=0)
        predicted = [curve(batch) for batch in grid]
        (line,) = axes.plot(grid, predicted, "-", color="black", linewidth=1.6)
        left, right = (min(max(end, low), high) for end in fit.b_crit_range)
        band = axes.axvspan(left, right, color=STYLES[4][0], alpha=0.25, linewidth=0)
        critical = axes.axvline(fit.b_crit, color=STYLES[1][0], linestyle="--", linewidth=1.6)
        handles = [dots, line, critical, band]
        if noise:
            handles.append(axes.axvspan(min(noise), max(noise), facecolor="none", edgecolor="0.45", hatch="///"))
            handles.append(axes.axvline(statistics.median(noise), color="0.25", linestyle=":", linewidth=2))
        axes.set_ylabel(what)
        log_axis(axes, "x", [low, high])
        log_axis(axes, "y", [*found, *predicted])
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.set_xlim(low, high)
    panels[1].set_xlabel("global batch size (samples)")
    panels[0].set_title("What the target takes against batch size")
    missed = f"; {fit.missed} more missed the target and are left out" if fit.missed else ""
    labels = [
        f"a run (n = {fit.n}{missed})",
        f"fit S = S_min (1 + B_crit / B), S_min = {format_number(fit.s_min)} steps",
        f"B_crit = {format_number(fit.b_crit)} samples",
        f"95 % range of B_crit: {'–'.join(map(format_number, fit.b_crit_range))}",
        f"noise scale while training, range of n = {len(noise)} runs",
        f"its median and range: {format_range(noise) if noise else ''} samples",
    ]
    add_legend(figure, handles, labels[: len(handles)])
    return figure
