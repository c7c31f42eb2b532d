"""What a learning-rate sweep leaves behind: lr-finder.json, the picture lr-finder.png, and lines to read."""

import importlib.util
import math
from pathlib import Path

from allreduce_sgd.metrics import write_json
from allreduce_sgd.probes.lr_finder import Sweep

__all__ = ["report_sweep"]


def report_sweep(sweep: Sweep, folder: Path) -> str:
    """Write the files into `folder`, and return what to tell. One rank calls. Raises OutputError."""
    write_json(folder / "lr-finder.json", sweep.figures())
    end = "where the loss diverged" if sweep.diverged else "without diverging"
    lines = [f"{len(sweep.rates)} learning rates tried, up to {sweep.rates[-1]:.2g}, {end}"]
    if sweep.steepest is None or sweep.tenth_of_lowest is None:
        lines.append("none is suggested: the loss never fell")
    else:
        lines.append(
            f"suggested --lr: {sweep.steepest:.2g}, where the loss falls most steeply, or {sweep.tenth_of_lowest:.2g}, "
            f"a tenth of where it is lowest"
        )
    # Of the extra `report`; it takes a second to load.
    if importlib.util.find_spec("matplotlib") is None:
        lines.append("lr-finder.png is left out: it needs matplotlib; pip install 'allreduce_sgd[report]'")
    else:
        _draw(sweep, folder / "lr-finder.png")
    lines.append(f"results: {folder / 'lr-finder.json'}")
    return "\n".join(lines)


def _draw(sweep: Sweep, file: Path) -> None:
    """Write the losses over the rates, and the suggestions, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(sweep.rates, sweep.losses, color="0.7", linewidth=1, label="loss of each mini-batch")
    axes.plot(sweep.rates, sweep.smoothed, color="tab:blue", linewidth=2, label="smoothed")
    for rate, color, what in (
        (sweep.steepest, "tab:green", "steepest fall"),
        (sweep.tenth_of_lowest, "tab:orange", "a tenth of the lowest"),
    ):
        if rate is not None:
            axes.axvline(rate, color=color, linestyle="--", label=f"{what}: {rate:.2g}")
    finite = [loss for loss in sweep.smoothed if math.isfinite(loss)]
    if finite:
        # What diverges would leave no room for the rest.
        low, start = min(finite), finite[0]
        margin = 0.1 * (start - low) or 0.1
        axes.set_ylim(low - margin, start + 5 * margin)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150, metadata={"Software": None})
