"""Bus bandwidth against message size, both axes logarithmic: ours solid, peers dashed, the limit dotted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.message_sizes import format_size

__all__ = ["plot_bandwidth"]

# Okabe and Ito's colours, which colour-blind readers tell apart; markers serve greyscale.
_COLOURS = ("#d55e00", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#000000")
_MARKERS = "os^DvPX*<>h"
_DOTS_PER_INCH = 150
_MOST_SIZES_NAMED = 9


def plot_bandwidth(rows: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    """Draw the rows of a record, a panel per operation. The limit is the bus bandwidth at `floor_seconds`."""
    operations = list(dict.fromkeys(row["op"] for row in rows))
    columns = min(2, len(operations))
    lines = -(-len(operations) // columns)
    figure = Figure(figsize=(1 + 6.5 * columns, 1.2 + 4.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, operation in zip(panels, operations, strict=False):
        _draw(axes, [row for row in rows if row["op"] == operation])
        axes.set_title(operation)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=_DOTS_PER_INCH)


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    curves: dict[tuple[str, str, bool], list[tuple[int, float]]] = {}
    limit: dict[int, float] = {}
    for row in rows:
        key = (row["contender"], row["variant"], row["ours"])
        curves.setdefault(key, []).append((row["bytes"], row["busbw_gigabytes_per_second"]))
        if row["floor_seconds"]:
            limit[row["bytes"]] = row["busbw_gigabytes_per_second"] * row["median_seconds"] / row["floor_seconds"]
    for index, ((name, variant, ours), points) in enumerate(curves.items()):
        axes.plot(
            *zip(*points, strict=True),
            label=f"{name}, {variant.replace('_', ' ')}" if ours else name,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle="-" if ours else "--",
            markersize=5,
        )
    if limit:
        what = "memory floor" if rows[0]["hosts"] == 1 else "raw TCP"
        axes.plot(*zip(*limit.items(), strict=True), label=what, color="0.2", linestyle=":", linewidth=2)
    axes.set(xlabel="message size (bytes)", ylabel="bus bandwidth (GB/s)", xscale="log", yscale="log")
    sizes = sorted({row["bytes"] for row in rows})
    axes.set_xticks(sizes[:: -(-len(sizes) // _MOST_SIZES_NAMED)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size_bytes, _: format_size(round(size_bytes))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
