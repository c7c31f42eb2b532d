"""Pictures of trajectories on a landscape: a column for each family of optimizers, the landscape above, values below.

Contours are grey, so that the lines, which differ by colour, style and marker, are told apart without colour too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from benchmarks.plot_styles import STYLES
from benchmarks.toy_landscapes import Landscape
from benchmarks.toy_trajectories import FAMILIES, Contender, Trajectory, lowest_value

__all__ = ["animate", "draw"]

Found = Mapping[Contender, Trajectory]

_COLUMN_INCHES = 4.6
_DOTS_PER_INCH = 140
_POINTS = 11
_GRID = 151
_LEVELS = 16
_LEAST_GAP = 1e-12
_FRAMES = 30
_FRAMES_PER_SECOND = 8
_FRAME_DOTS_PER_INCH = 70
_LAST_FRAMES = 8
"""How often the last frame is repeated, so that it can be looked at."""


def draw(landscape: Landscape, found: Found, path: Path) -> None:
    """Draw all trajectories into the file."""
    families = _families(found)
    figure = Figure(figsize=(max(2, len(families)) * _COLUMN_INCHES, 9.4), layout="constrained")
    panels = figure.subplots(2, len(families), squeeze=False, sharey="row")
    for column, (family, members) in enumerate(families.items()):
        above, below = panels[:, column]
        _draw_landscape(above, landscape)
        above.set_title(family, fontsize=_POINTS + 1)
        for index, (contender, trajectory) in enumerate(members.items()):
            colour, line, marker = STYLES[index % len(STYLES)]
            look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 5, "linewidth": 1.6}
            # Paths are long at first.
            every = [0, *(2**power for power in range(trajectory.steps.bit_length()))]
            label = f"{contender.name}, lr {trajectory.lr:g}"
            above.plot(*trajectory.points.T, markevery=every, label=label, zorder=3, **look)
            above.plot(*trajectory.points[-1], color=colour, marker=marker, markersize=10, zorder=4, **_HOLLOW)
            below.plot(_heights(landscape, trajectory), markevery=every, **look)
        _draw_values_axes(below, landscape, max(trajectory.steps for trajectory in found.values()))
        above.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=_POINTS - 2.5)
    for axes in panels[:, 1:].flat:
        axes.set_ylabel("")
    figure.suptitle(f"{landscape.title}  (large hollow marker: the end)", fontsize=_POINTS + 3)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


_HOLLOW = {"linestyle": "", "markerfacecolor": "white", "markeredgewidth": 1.8}


def animate(landscape: Landscape, found: Found, path: Path) -> None:
    """Draw the trajectories growing, into a GIF that repeats."""
    families = _families(found)
    figure = Figure(figsize=(max(2, len(families)) * _COLUMN_INCHES, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(families), squeeze=False)[0]
    growing: list[tuple[Trajectory, Line2D, Line2D]] = []
    for axes, (family, members) in zip(panels, families.items(), strict=True):
        _draw_landscape(axes, landscape)
        axes.set_title(family, fontsize=_POINTS + 1)
        for index, (contender, trajectory) in enumerate(members.items()):
            colour, line, marker = STYLES[index % len(STYLES)]
            (path_line,) = axes.plot([], [], color=colour, linestyle=line, linewidth=1.6, zorder=3)
            (head,) = axes.plot([], [], color=colour, marker=marker, linestyle="", markersize=7, zorder=4)
            axes.plot(
                [], [], color=colour, linestyle=line, marker=marker, label=f"{contender.name}, lr {trajectory.lr:g}"
            )
            growing.append((trajectory, path_line, head))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=_POINTS - 2.5)
    for axes in panels[1:]:
        axes.set_ylabel("")
    title = figure.suptitle(landscape.title, fontsize=_POINTS + 3)
    figure.draw_without_rendering()
    # Nothing that moves takes room, and to lay out a frame takes longer than to draw it.
    figure.set_layout_engine("none")
    longest = max(trajectory.steps for trajectory in found.values())
    frames = sorted({round(step) for step in np.linspace(0, longest, _FRAMES)})
    writer = PillowWriter(fps=_FRAMES_PER_SECOND)
    with writer.saving(figure, str(path), dpi=_FRAME_DOTS_PER_INCH):
        for step in [*frames, *([longest] * _LAST_FRAMES)]:
            for trajectory, path_line, head in growing:
                points = trajectory.points[: step + 1]
                path_line.set_data(*points.T)
                head.set_data(*points[-1:].T)
            title.set_text(f"{landscape.title}, step {step}")
            writer.grab_frame()


def _families(found: Found) -> dict[str, dict[Contender, Trajectory]]:
    """Return the trajectories by family, in the order of families; those that have none are left out."""
    sorted_out = {
        family: {contender: each for contender, each in found.items() if contender.family == family}
        for family in FAMILIES
    }
    return {family: members for family, members in sorted_out.items() if members}


def _draw_landscape(axes: Axes, landscape: Landscape) -> None:
    (left, right), (bottom, top) = landscape.box
    x, y = torch.meshgrid(
        torch.linspace(left, right, _GRID, dtype=torch.float64),
        torch.linspace(bottom, top, _GRID, dtype=torch.float64),
        indexing="xy",
    )
    values = landscape.value(torch.stack([x, y], dim=-1)).numpy()
    axes.contour(x.numpy(), y.numpy(), values, levels=_levels(landscape, values), colors="0.75", linewidths=0.8)
    axes.plot(*landscape.start, "o", color="black", markersize=8, zorder=5)
    axes.annotate("start", landscape.start, (8, 6), textcoords="offset points", fontsize=_POINTS, zorder=5)
    if landscape.minimum is not None:
        axes.plot(*landscape.minimum(), "*", color="black", markersize=13, zorder=5)
        axes.annotate("minimum", landscape.minimum(), (8, -14), textcoords="offset points", fontsize=_POINTS, zorder=5)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel=landscape.axes[0], ylabel=landscape.axes[1])


def _levels(landscape: Landscape, values: NDArray[np.float64]) -> Sequence[float]:
    """Return where contours are drawn: evenly, or above a minimum closer, the nearer it is."""
    lowest = lowest_value(landscape)
    if lowest is None:
        # Both branches of the quartic are flat in the middle.
        half = np.linspace(0, 1, _LEVELS // 2 + 1)[1:] ** 3 * np.abs(values).max()
        return [float(level) for level in (*-half[::-1], 0.0, *half)]
    gaps = values - lowest
    return [lowest + float(gap) for gap in np.geomspace(np.quantile(gaps, 0.002), gaps.max(), _LEVELS)]


def _heights(landscape: Landscape, trajectory: Trajectory) -> NDArray[np.float64]:
    lowest = lowest_value(landscape)
    heights: NDArray[np.float64] = trajectory.values.numpy()
    return heights if lowest is None else np.maximum(heights - lowest, _LEAST_GAP)


def _draw_values_axes(axes: Axes, landscape: Landscape, steps: int) -> None:
    axes.set(xlabel="step", xlim=(-0.03 * steps, 1.03 * steps))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    if landscape.bottom is None:
        axes.set_yscale("log")
        axes.set_ylabel(f"value above the minimum (not below {_LEAST_GAP:g})")
    else:
        axes.set_ylim(1.5 * landscape.bottom, 1.1)
        axes.set_ylabel("value")
