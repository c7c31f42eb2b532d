"""The pictures of scaling: speed-up and efficiency, stacked step time, predicted against measured, published figures.

Lines and bars are told apart by marker, style and hatching as well as by colour. Whatever is simulated says so in its
title.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from benchmarks.plot_styles import STYLES
from benchmarks.scaling.tables import TARGET

__all__ = ["draw"]

_PARTS = (
    ("forward", "#0072b2", ""),
    ("backward", "#56b4e9", "//"),
    ("optimizer", "#009e73", ".."),
    ("straggler", "#e69f00", "xx"),
    ("exposed", "#d55e00", "\\\\"),
)
_MEANINGS = {"straggler": "waiting for the slowest", "exposed": "communication not hidden"}
_DOTS_PER_INCH = 150

Row = Mapping[str, Any]


def draw(rows: Sequence[Row], folder: Path) -> list[tuple[Path, str]]:
    """Draw what the rows have into the folder, which exists; return each file with a caption.

    Rows of other kinds are ignored; without any of a picture, it is not drawn.
    """
    drawn = []
    predictions = [row for row in rows if row["kind"] == "prediction"]
    validations = [row for row in rows if row["kind"] == "validation"]
    published = [row for row in rows if row["kind"] == "published"]
    if predictions:
        path = folder / "scaling_speed_up.png"
        _speed_up(predictions).savefig(path, dpi=_DOTS_PER_INCH)
        drawn.append((path, f"Simulated speed-up and efficiency against ranks; {predictions[0]['network']}."))
        path = folder / "scaling_step_time.png"
        _step_time(predictions).savefig(path, dpi=_DOTS_PER_INCH)
        drawn.append((path, f"Simulated parts of a step against ranks; {predictions[0]['network']}."))
    if any(row.get("speed_up_to_accuracy") is not None for row in predictions):
        path = folder / "scaling_to_accuracy.png"
        _to_accuracy(predictions).savefig(path, dpi=_DOTS_PER_INCH)
        drawn.append((path, "Simulated speed-up to accuracy, over one rank at its best batch."))
    if validations:
        path = folder / "scaling_validation.png"
        _validation(validations).savefig(path, dpi=_DOTS_PER_INCH)
        drawn.append((path, f"Predicted against measured step times of workloads held out; band ±{TARGET:.0%}."))
    if published:
        path = folder / "scaling_published.png"
        _published(published).savefig(path, dpi=_DOTS_PER_INCH)
        drawn.append((path, "Simulated against published scaling efficiencies."))
    return drawn


def _speed_up(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(9.2, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (label, mine) in enumerate(_lines(rows).items()):
        ranks = [row["ranks"] for row in mine]
        style = _style(index)
        left.plot(ranks, [row["speed_up"] for row in mine], **style, label=f"{label} (n = {len(mine)} simulated)")
        right.plot(ranks, [row["scaling_efficiency"] for row in mine], **style)
    ends = sorted({row["ranks"] for row in rows})
    left.plot(ends, ends, color="0.5", linestyle=(0, (8, 4)), linewidth=1, label="ideal")
    right.axhline(1.0, color="0.5", linestyle=(0, (8, 4)), linewidth=1)
    left.set(yscale="log", ylabel="speed-up in samples/s over one rank")
    right.set(ylabel="scaling efficiency: speed-up ÷ ranks", ylim=(0, 1.08))
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, right):
        _rank_axis(axes, rows)
    _finish(figure, left, f"simulated; {rows[0]['network']}")
    return figure


def _to_accuracy(rows: Sequence[Row]) -> Figure:
    known = [row for row in rows if row.get("speed_up_to_accuracy") is not None]
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for index, (label, mine) in enumerate(_lines(known).items()):
        basis = ", steps as of sync" if any(row["steps_basis"] == "assumed" for row in mine) else ""
        values = [row["speed_up_to_accuracy"] for row in mine]
        name = f"{label}{basis} (n = {len(mine)} simulated)"
        axes.plot([row["ranks"] for row in mine], values, **_style(index), label=name)
    ends = sorted({row["ranks"] for row in known})
    axes.plot(ends, ends, color="0.5", linestyle=(0, (8, 4)), linewidth=1, label="ideal")
    axes.set(yscale="log", ylabel="speed-up to accuracy")
    _rank_axis(axes, known)
    _finish(figure, axes, f"simulated; target: {known[0]['target']}")
    return figure


def _step_time(rows: Sequence[Row]) -> Figure:
    groups = list(_lines(rows).items())[:4]
    figure = Figure(figsize=(max(6.0, 4.6 * len(groups)), 4.8), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (label, mine) in zip(panels, groups, strict=True):
        names = [f"{row['ranks']:,}" for row in mine]
        floor = [0.0] * len(mine)
        for part, colour, hatch in _PARTS:
            heights = [1e3 * row[f"{part}_seconds"] for row in mine]
            name = _MEANINGS.get(part, part)
            axes.bar(names, heights, bottom=floor, color=colour, hatch=hatch, edgecolor="white", label=name)
            floor = [low + height for low, height in zip(floor, heights, strict=True)]
        axes.set(xlabel="ranks (simulated)", title=f"{label} (n = {len(mine)})")
        axes.title.set_fontsize("medium")
        axes.tick_params(axis="x", rotation=45)
        axes.grid(color="0.9", axis="y")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("step time (ms)")
    _finish(figure, panels[0], f"simulated; {rows[0]['network']}")
    return figure


def _validation(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    axes = figure.add_subplot()
    groups: dict[str, list[Row]] = {}
    for row in rows:
        crowded = "" if row["oversubscription"] is None else ", more ranks than cores"
        groups.setdefault(f"{row['ranks']} ranks, computing {row['computing']}{crowded}", []).append(row)
    for index, (label, mine) in enumerate(groups.items()):
        colour, _, marker = STYLES[index % len(STYLES)]
        measured = [1e3 * row["measured_seconds"] for row in mine]
        spread = [
            [1e3 * (row["measured_seconds"] - row["minimum_seconds"]) for row in mine],
            [1e3 * (row["maximum_seconds"] - row["measured_seconds"]) for row in mine],
        ]
        predicted = [1e3 * row["predicted_seconds"] for row in mine]
        axes.errorbar(
            measured,
            predicted,
            xerr=spread,
            color=colour,
            marker=marker,
            markerfacecolor="none" if index % 2 else colour,
            linestyle="none",
            elinewidth=0.8,
            label=f"{label} (n = {len(mine)})",
        )
    keys = ("minimum_seconds", "maximum_seconds", "predicted_seconds")
    values = [1e3 * row[key] for row in rows for key in keys]
    ends = [0.8 * min(values), 1.25 * max(values)]
    axes.plot(ends, ends, color="0.3", linewidth=1, label="exact")
    low, high = ([(1 + sign * TARGET) * end for end in ends] for sign in (-1, 1))
    axes.fill_between(ends, low, high, color="0.85", label=f"±{TARGET:.0%}")
    axes.set(xscale="log", yscale="log", xlabel="measured step time (ms), [min–max] over rounds", xlim=ends, ylim=ends)
    axes.set_ylabel("predicted step time (ms)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    _finish(figure, axes, "step times predicted, and measured afterwards", columns=1)
    return figure


def _published(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    pairs = (("published", "#0072b2", "", -0.2), ("predicted", "#e69f00", "//", 0.2))
    for key, colour, hatch, shift in pairs:
        label = "published" if key == "published" else "simulated"
        heights = [row[f"{key}_efficiency"] for row in rows]
        where = [place + shift for place in places]
        axes.bar(where, heights, 0.38, color=colour, hatch=hatch, edgecolor="white", label=f"{label} (n = {len(rows)})")
    names = [
        f"{row['source'].partition(',')[0]}\n{row['model']}\n{row['ranks']} GPUs{' (check)' * row['check']}"
        for row in rows
    ]
    axes.set_xticks(list(places), names, fontsize="small")
    axes.set(ylabel="scaling efficiency", ylim=(0, 1.08))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color="0.9", axis="y")
    axes.set_axisbelow(True)
    _finish(figure, axes, "scaling efficiency, simulated and published")
    return figure


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['model']}, {row['plan']}, {row['scaling']}", []).append(row)
    return groups


def _style(index: int) -> dict[str, Any]:
    colour, line, marker = STYLES[index % len(STYLES)]
    return {"color": colour, "linestyle": line, "marker": marker, "markersize": 5, "linewidth": 1.5}


def _rank_axis(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set(xscale="log", xlabel="ranks, each with a core of its own")
    axes.set_xticks(sorted({row["ranks"] for row in rows}))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(axis="x", rotation=45)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)


def _finish(figure: Figure, axes: Axes, title: str, columns: int = 2) -> None:
    figure.suptitle(title, fontsize="medium")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
