"""What a training step is made of, from the record of `step_time`: a figure for each workload, a bar per contender."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.plot_styles import STYLES
from benchmarks.report.styles import add_legend, linear_axis, new_figure, row_axes

__all__ = ["contender_name", "draw_step", "parts_of"]

_MILLISECONDS = 1e3
_BASELINE = "no_communication"
_PARTS = (
    ("forward", STYLES[6][0], ""),
    ("backward", STYLES[2][0], "..."),
    ("optimizer", STYLES[4][0], "\\\\\\"),
    ("exposed communication", STYLES[1][0], "///"),
)


def contender_name(row: Mapping[str, Any]) -> str:
    setting = f" ({row['setting']})" if row["setting"] else ""
    return f"{row['contender']}{setting}"


def parts_of(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds of each part of a step, by name.

    Where a contender does not tell its waiting, which lies within its backward pass, then what this takes beyond the
    backward pass of the step without communication, among the `rows` of the workload, counts as exposed.
    """
    backward, exposed = row["backward_seconds"], row["exposed_seconds"]
    if row["exposed_by"] == "difference":
        without = [each["backward_seconds"] for each in rows if each["contender"] == _BASELINE]
        computing = min([backward, *without])
        backward, exposed = computing, backward - computing
    return {
        "forward": row["forward_seconds"],
        "backward": backward,
        "optimizer": row["optimizer_seconds"],
        "exposed communication": exposed,
    }


def draw_step(workload: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the rows of one workload, stacked; a line shows [min–max] of the whole step over rounds."""
    figure = new_figure(1.0)
    axes, half = row_axes(figure, [contender_name(row) for row in rows], 0.2)
    for place, row in enumerate(rows):
        left = 0.0
        parts = parts_of(row, rows)
        for name, colour, hatch in _PARTS:
            width = _MILLISECONDS * parts[name]
            axes.barh(
                place - half / 4,
                width,
                1.4 * half,
                left=left,
                color=colour,
                hatch=hatch,
                edgecolor="black",
                linewidth=0.8,
            )
            left += width
        ends = [_MILLISECONDS * row[f"{which}_seconds"] for which in ("minimum", "maximum")]
        axes.plot(ends, [place + 0.75 * half] * 2, color="black", linewidth=1.6, marker="|", markersize=7)
        axes.plot(_MILLISECONDS * row["median_seconds"], place + 0.75 * half, "D", color="black", markersize=5)
    handles: list[Artist] = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.8) for _, colour, hatch in _PARTS
    ]
    handles.append(Line2D([], [], color="black", marker="D", markersize=5, linewidth=1.6))
    labels = [*(name for name, _, _ in _PARTS), "step [min–max]"]
    ranks, rounds = rows[0]["ranks"], rows[0]["rounds"]
    axes.set_xlabel("time of a training step (ms)")
    axes.set_title(f"A training step of {workload}")
    axes.set_xlim(left=0)
    linear_axis(axes, "x")
    add_legend(figure, handles, labels, f"medians over n = {rounds} rounds, {ranks} ranks")
    return figure
