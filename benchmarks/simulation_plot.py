"""Simulated time against the number of ranks, both axes logarithmic: a panel for each size, a line per algorithm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.message_sizes import format_size
from benchmarks.plot_styles import STYLES

__all__ = ["plot_simulation"]

_PANEL_INCHES = 4.6
_DOTS_PER_INCH = 150


def plot_simulation(rows: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    """Draw the rows of kind `simulated`, and as hollow circles the measured ones of the same sizes."""
    simulated = [row for row in rows if row["kind"] == "simulated"]
    sizes_bytes = sorted({row["bytes"] for row in simulated})
    algorithms = list(dict.fromkeys(row["algorithm"] for row in simulated))
    figure = Figure(figsize=(_PANEL_INCHES * len(sizes_bytes), 4.8), layout="constrained")
    panels = figure.subplots(1, len(sizes_bytes), sharey=True, squeeze=False)[0]
    for axes, n_bytes in zip(panels, sizes_bytes, strict=True):
        for index, name in enumerate(algorithms):
            colour, line, marker = STYLES[index % len(STYLES)]
            points = [(row["ranks"], row["seconds"]) for row in simulated if _is(row, name, n_bytes)]
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker=marker, markersize=5, label=name)
            measured = [
                (row["ranks"], row["median_seconds"])
                for row in rows
                if row["kind"] == "measured" and row["oversubscription"] is None and _is(row, name, n_bytes)
            ]
            if measured:
                axes.scatter(*zip(*measured, strict=True), s=120, facecolors="none", edgecolors=colour)
        axes.set(xscale="log", yscale="log", xlabel="ranks, each with a core of its own", title=format_size(n_bytes))
        axes.set_xticks(sorted({row["ranks"] for row in simulated}), minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.minorticks_off()
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("seconds (○ measured)")
    figure.suptitle(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=_DOTS_PER_INCH)


def _is(row: Mapping[str, Any], algorithm: str, n_bytes: int) -> bool:
    return bool(row["algorithm"] == algorithm and row["bytes"] == n_bytes)
