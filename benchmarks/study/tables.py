"""The tables of a study for people: what each cell took to reach the target, and what that gains over serial SGD."""

import dataclasses
from collections.abc import Mapping, Sequence

from benchmarks.speedup import best_serial, by_cell, speed_up, speed_up_range
from benchmarks.study.cells import OURS, SERIAL, TORCH
from benchmarks.study.results import Cell, Run
from benchmarks.study.tuning import Choice, choices
from benchmarks.table import format_number, format_range, format_table

__all__ = ["tables"]


def tables(runs: Sequence[Run]) -> str:
    """Return the two tables of the measured runs, and a line for whatever a reader should know besides."""
    cells = by_cell(runs)
    chosen = choices(runs)
    took, gained = [], []
    for cell, own in cells.items():
        megabytes = [run.bytes / 1e6 for run in own if run.bytes is not None]
        took.append(
            [
                cell.label,
                f"{own[0].lr:.3g}{'*' if cell in chosen and chosen[cell].on_edge else ''}",
                f"{sum(run.reached for run in own)}/{len(own)}",
                format_range([run.seconds for run in own]),
                format_range([run.wall_seconds for run in own]),
                format_range([run.samples for run in own]),
                format_range([run.steps for run in own]),
                format_range(megabytes) if megabytes else "–",
                format_range([run.samples_per_second for run in own]),
            ]
        )
        gain = speed_up(own, cells)
        extent = speed_up_range(own, cells)
        told = "–" if extent is None else f"[{format_number(extent[0])}–{format_number(extent[1])}]"
        numbers = [format_number(value) for value in dataclasses.astuple(gain)]
        gained.append([cell.label, *numbers[:5], told, *numbers[5:]])
    first = ["cell", "lr", "reached", "train s", "wall s", "samples", "steps", "MB sent per rank", "samples/s"]
    second = ["speed-up", "same batch", "epoch ÷ b=1", "epoch ÷ best", "accuracy ÷ b=1", "accuracy ÷ best"]
    second += ["[min–max]", "= hardware", "× statistical"]
    parts = [format_table(first, took), format_table(second, gained), "\n".join(_notes(cells, chosen))]
    return "\n\n".join(filter(None, parts))


def _notes(cells: Mapping[Cell, Sequence[Run]], chosen: Mapping[Cell, Choice]) -> list[str]:
    notes = []
    baseline = best_serial(cells)
    if baseline is not None:
        notes.append(f"best serial batch, the baseline of “÷ best”: {baseline.label}")
    for contender in (TORCH, OURS):
        best = _soonest(cells, contender)
        if best is not None and baseline is not None:
            gain = speed_up(cells[best], cells).accuracy_over_best
            notes.append(f"soonest of {contender}: {best.label}, speed-up to accuracy {format_number(gain)}")
    if baseline is None and any(cell.contender == SERIAL for cell in cells):
        notes.append("no serial baseline reaches the target, so that there is no speed-up to it")
    for cell, choice in chosen.items():
        if cell in cells and choice.on_edge:
            rates = ", ".join(f"{rate:.3g}" for rate in choice.rates)
            notes.append(f"* {cell.label}: lr {choice.lr:.3g} is on the edge of its grid ({rates}); widen the grid")
    return notes


def _soonest(cells: Mapping[Cell, Sequence[Run]], contender: str) -> Cell | None:
    gains = {
        cell: speed_up(runs, cells).accuracy_over_best or 0.0
        for cell, runs in cells.items()
        if cell.contender == contender
    }
    best = max(gains, key=lambda cell: gains[cell], default=None)
    return best if best is not None and gains[best] > 0 else None
