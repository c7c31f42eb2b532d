"""FLOPs against bytes of gradient, layer by layer, both axes logarithmic, with lines of equal FLOPs per byte."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox

__all__ = ["draw"]

_FULLY_CONNECTED_PER_BYTE = 1.5
"""FLOPs per byte of gradient and sample, of a layer that is not the first: 6 per parameter of 4 bytes."""
# Marker by kind; colour by model, from dark to light for greyscale.
_MARKERS: Mapping[str, str] = MappingProxyType({"convolution": "s", "fully connected": "o"})
_COLOURS = ("#000000", "#0072b2", "#e69f00", "#f0e442", "#cc79a7", "#ffffff")
_DOTS_PER_INCH = 160
_POINTS = 12
_LABEL_POINTS = 9
_PARTS_OF_TEXT = 6
_SIDES = (
    ((8, 0), "left", "center"),
    ((-8, 0), "right", "center"),
    ((8, -3), "left", "center"),
    ((-8, 3), "right", "center"),
    ((0, 6), "center", "bottom"),
    ((0, -6), "center", "top"),
    ((0, -6), "left", "top"),
    ((0, 6), "right", "bottom"),
    ((0, 6), "left", "bottom"),
    ((0, -6), "right", "top"),
)
_MARGIN = 3.0
"""The factor by which the axes go beyond the layers."""


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw FLOPs of a step against bytes of gradient; a model's equal layers are one marker, n are all its layers."""
    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    axes = figure.add_subplot()
    counted = [row for row in rows if row["flops"] is not None]
    layers = Counter(row["model"] for row in counted)
    models = list(layers)
    points = Counter(
        (row["model"], row["kind"], row["shape"], row["bytes"], row["flops"] * row["batch_size"]) for row in counted
    )
    drawn: Counter[tuple[int, int]] = Counter()
    for model, kind, _, n_bytes, flops in points:
        drawn[n_bytes, flops] += 1
        axes.plot(
            n_bytes,
            flops,
            _MARKERS[kind],
            color=_COLOURS[models.index(model) % len(_COLOURS)],
            markeredgecolor="black",
            # Smaller on top of another model's.
            markersize=max(8 - 4 * (drawn[n_bytes, flops] - 1), 2),
            zorder=3,
        )
    _set_axes(axes, [key[3] for key in points], [key[4] for key in points], rows[0]["batch_size"])
    handles = [
        Line2D([], [], color=colour, marker=marker, markeredgecolor="black", markersize=8, linestyle="", label=label)
        for label, colour, marker in (
            *((f"{name} (n = {layers[name]})", _COLOURS[i % len(_COLOURS)], "D") for i, name in enumerate(models)),
            *((kind, "0.75", marker) for kind, marker in _MARKERS.items()),
        )
    ]
    ratio = EngFormatter("FLOP/B")(_FULLY_CONNECTED_PER_BYTE * rows[0]["batch_size"])
    handles.append(Line2D([], [], color="0.35", linewidth=1.2, label=ratio))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=_POINTS - 1, columnspacing=1.2
    )
    figure.suptitle("What the layers of a model send and compute", fontsize=_POINTS + 1)
    figure.draw_without_rendering()
    _draw_ratios(axes, rows[0]["batch_size"])
    labels = {
        (n_bytes, flops): shape + (f" ({n} ×)" if n > 1 else "") for (_, _, shape, n_bytes, flops), n in points.items()
    }
    _draw_labels(axes, labels)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _set_axes(axes: Axes, n_bytes: Sequence[int], flops: Sequence[int], batch_size: int) -> None:
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(min(n_bytes) / _MARGIN, max(n_bytes) * _MARGIN**2),
        ylim=(min(flops) / _MARGIN, max(flops) * _MARGIN**2),
        xlabel="gradient, all-reduced once a step",
        ylabel=f"forward and backward, {batch_size} samples per rank",
    )
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.yaxis.set_major_formatter(EngFormatter("FLOP"))
    axes.xaxis.label.set_fontsize(_POINTS)
    axes.yaxis.label.set_fontsize(_POINTS)
    axes.tick_params(labelsize=_POINTS - 1)
    axes.grid(color="0.93")
    axes.set_axisbelow(True)


def _draw_ratios(axes: Axes, batch_size: int) -> None:
    """Draw lines of equal FLOPs per byte, by decades and for fully connected layers."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    fully_connected = _FULLY_CONNECTED_PER_BYTE * batch_size
    powers = range(max(0, math.ceil(math.log10(bottom / right))), math.floor(math.log10(top / left)) + 1)
    axes.plot((left, right), (fully_connected * left, fully_connected * right), color="0.35", linewidth=1.2, zorder=1)
    for ratio in (10.0**power for power in powers):
        axes.plot((left, right), (ratio * left, ratio * right), color="0.75", linestyle="--", linewidth=0.8, zorder=1)
        x = min(right, top / ratio)
        (x_0, y_0), (x_1, y_1) = axes.transData.transform([(x / 2, ratio * x / 2), (x, ratio * x)])
        if x / left > _MARGIN:
            axes.annotate(
                EngFormatter("FLOP/B")(ratio),
                (x, ratio * x),
                (-6, -6),
                textcoords="offset points",
                rotation=math.degrees(math.atan2(y_1 - y_0, x_1 - x_0)),
                rotation_mode="anchor",
                horizontalalignment="right",
                verticalalignment="bottom",
                fontsize=_LABEL_POINTS,
                color="0.45",
            )


def _draw_labels(axes: Axes, labels: Mapping[tuple[float, float], str]) -> None:
    """Write each label beside its point, on the first side where it hides nothing; there may be no such side."""
    size = 9 * axes.figure.dpi / 72
    places = list(axes.transData.transform(list(labels)))
    for text in axes.texts:
        # The text runs along the diagonal of its extent.
        extent = text.get_window_extent()
        places += list(np.linspace(extent.min, extent.max, _PARTS_OF_TEXT))
    taken = [Bbox.from_bounds(x - size / 2, y - size / 2, size, size) for x, y in places]
    frame = axes.get_window_extent()
    for point, label in labels.items():
        for offset, horizontal, vertical in _SIDES:
            text = axes.annotate(
                label,
                point,
                offset,
                textcoords="offset points",
                horizontalalignment=horizontal,
                verticalalignment=vertical,
                fontsize=_LABEL_POINTS,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.3},
                zorder=2.5,
            )
            box = text.get_window_extent()
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
