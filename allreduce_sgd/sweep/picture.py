"""The picture of a sweep: parallel coordinates, where a trial is a line through its values on the axes.

The last axis is the metric, and the line's colour too: the better, the darker, in cividis, whose lightness changes
evenly, so that it reads the same in greyscale and to colour-blind readers. Trials that failed end before that axis,
dotted; with halving an axis says how far trials came, and their metric is the one that they had there.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from allreduce_sgd.errors import counted
from allreduce_sgd.sweep.results import Outcome
from allreduce_sgd.sweep.spec import METRICS, Parameter, Spec, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["can_draw", "draw"]

_INCHES_PER_AXIS, _HEIGHT_INCHES, _MARGIN_INCHES = 1.7, 4.6, 2.2
_DOTS_PER_INCH = 150
_TICKS = 5
# Names of more categories than these would run into one another.
_MOST_CATEGORIES = 24
_FAILED = "#555555"


def can_draw() -> bool:
    """Say whether matplotlib, of the extra `report`, is there."""
    return importlib.util.find_spec("matplotlib") is not None


@dataclass(frozen=True)
class _Axis:
    """A vertical axis: heights from 0 to 1 of values, and the ticks that are drawn there."""

    title: str
    height: Callable[[Value], float]
    ticks: Mapping[float, str]


def draw(spec: Spec, outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the picture, a PNG, of these trials, best first."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    values = [each.value for each in outcomes if each.value is not None]
    axes = [_axis_of(each, [outcome.trial.parameters[each.name] for outcome in outcomes]) for each in spec.parameters]
    if spec.halving is not None:
        reaches = sorted({each.reach for each in outcomes if each.reach is not None})
        axes.append(_categories(f"trained\n{spec.halving.unit}", reaches))
    unit = METRICS[spec.metric][1]
    metric = f"{spec.metric}\n({unit})" if unit else spec.metric
    last = _numeric(metric, values or [0.0], log=False)
    low, high = _colour_range(values, spec.goal)
    scale = Normalize(low, high)
    # The better, the darker: on white paper the light end is hard to see.
    shades = colormaps["cividis_r" if spec.goal == "max" else "cividis"]

    figure = Figure((_MARGIN_INCHES + _INCHES_PER_AXIS * len(axes), _HEIGHT_INCHES), layout="constrained")
    plot = figure.subplots()
    best = outcomes[0] if values else None
    # The better ones last, over the others.
    for outcome in reversed(outcomes):
        heights = [axis.height(value) for axis, value in zip(axes, _coordinates(spec, outcome), strict=True)]
        if outcome.value is None:
            plot.plot(range(len(heights)), heights, ":", color=_FAILED, linewidth=1)
            plot.plot(len(heights) - 1, heights[-1], "x", color=_FAILED)
            continue
        heights.append(last.height(outcome.value))
        width, marker = (3.2, "o") if outcome is best else (1.5, None)
        colour = shades(scale(outcome.value))
        plot.plot(range(len(heights)), heights, color=colour, linewidth=width, marker=marker, markersize=5)
    for position, axis in enumerate([*axes, last]):
        _draw_axis(plot, position, axis)
    plot.set_title(_title(spec, outcomes), fontsize=10, loc="left")
    plot.set_xlim(-0.35, len(axes) + 0.45)
    plot.set_ylim(-0.06, 1.06)
    plot.set_yticks([])
    plot.set_xticks(range(len(axes) + 1), [axis.title for axis in [*axes, last]])
    plot.tick_params(axis="x", length=0)
    for side in plot.spines.values():
        side.set_visible(False)
    if len(set(values)) > 1:
        label = metric.replace("\n", " ")
        extend = "min" if low > min(values) else "max" if high < max(values) else "neither"
        figure.colorbar(ScalarMappable(scale, shades), ax=plot, label=label, fraction=0.05, pad=0.02, extend=extend)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _colour_range(values: Sequence[float], goal: str) -> tuple[float, float]:
    """Return the range that colours tell apart: without the worst quarter, which would make the others alike."""
    if not values:
        return 0.0, 1.0
    ordered = sorted(values)
    worst = len(ordered) // 4
    low, high = (ordered[worst], ordered[-1]) if goal == "max" else (ordered[0], ordered[-1 - worst])
    return (low, high) if low < high else (ordered[0], ordered[-1])


def _coordinates(spec: Spec, outcome: Outcome) -> list[Value]:
    values = list(outcome.trial.parameters.values())
    return values if spec.halving is None or outcome.reach is None else [*values, outcome.reach]


def _title(spec: Spec, outcomes: Sequence[Outcome]) -> str:
    failed = sum(each.value is None for each in outcomes)
    parts = [f"{spec.name}: {counted(len(outcomes), 'trial')}, {spec.method}"]
    parts += [f"median of {spec.seeds} seeds"] if spec.seeds > 1 else []
    parts += [f"{failed} failed (dotted)"] if failed else []
    best = "" if failed == len(outcomes) else f"\nthick: the best, trial {outcomes[0].trial.number}"
    return ", ".join(parts) + best


def _axis_of(parameter: Parameter, values: Sequence[Value]) -> _Axis:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return _categories(parameter.name, [value for value in parameter.values if value in values])
    return _numeric(f"{parameter.name}\n(log)" if parameter.log else parameter.name, numbers, parameter.log)


def _categories(title: str, values: Sequence[Value]) -> _Axis:
    """Return an axis on which these values stand at equal distances."""
    heights = {value: index / max(1, len(values) - 1) if len(values) > 1 else 0.5 for index, value in enumerate(values)}
    step = -(-len(values) // _MOST_CATEGORIES)
    ticks = {heights[value]: _text(value) for value in values[::step]}
    return _Axis(title, lambda value: heights[value], ticks)


def _numeric(title: str, values: Sequence[float], log: bool) -> _Axis:
    from matplotlib.ticker import LogLocator, MaxNLocator

    scaled: Callable[[float], float] = math.log10 if log else float
    low, high = scaled(min(values)), scaled(max(values))

    def height(value: Value) -> float:
        assert isinstance(value, int | float)
        return 0.5 if low == high else (scaled(value) - low) / (high - low)

    ends = [min(values), max(values)]
    locator = LogLocator(numticks=_TICKS) if log else MaxNLocator(_TICKS)
    between = [float(each) for each in locator.tick_values(*ends) if ends[0] < each < ends[1]] if low < high else []
    few = sorted(set(values))
    # Few values are better named themselves than by round numbers beside them.
    ticks = few if len(few) <= _TICKS else [ends[0], *between, ends[1]]
    placed: dict[float, str] = {}
    for tick in sorted(ticks, key=lambda each: (each not in ends, each)):
        # An end has precedence over a round number that is too close to it.
        if all(abs(height(tick) - other) > 0.045 for other in placed):
            placed[height(tick)] = _text(tick)
    return _Axis(title, height, placed)


def _draw_axis(plot: "Axes", position: int, axis: _Axis) -> None:
    plot.plot([position, position], [0, 1], color="black", linewidth=0.8, zorder=3)
    for height, text in axis.ticks.items():
        plot.plot([position - 0.02, position + 0.02], [height, height], color="black", linewidth=0.8, zorder=3)
        plot.text(
            position + 0.04,
            height,
            text,
            fontsize=8,
            va="center",
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        )


def _text(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
