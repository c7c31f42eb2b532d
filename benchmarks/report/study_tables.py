"""The tables of a study: its cells, their speed-ups, how rates were tuned, the fitted batch sizes, and every run."""

from collections.abc import Callable, Sequence
from math import isnan, nan

from benchmarks.hyperbola import Fit
from benchmarks.report.content import Link, Table
from benchmarks.report.measures import Measured, ordered_runs, tuning_of
from benchmarks.study.results import Run, Study
from benchmarks.table import format_number, format_range

__all__ = ["cell_table", "fit_table", "method_table", "run_table", "speed_up_table"]

_MEGABYTE = 1e6


def cell_table(name: str, cells: Sequence[Measured], runs_table: str) -> Table:
    """What the target took, per cell: medians over seeds with [min–max]."""
    header = (
        "method",
        "reached",
        "train s",
        "wall s",
        "samples",
        "steps",
        "MB sent per rank",
        "samples/s",
        "lr",
        "runs",
    )
    rows = tuple(
        (
            each.name,
            f"{each.n - each.missed}/{each.n}",
            format_range([run.seconds for run in each.runs]),
            format_range([run.wall_seconds for run in each.runs]),
            format_range([run.samples for run in each.runs]),
            format_range([run.steps for run in each.runs]),
            _told(each.runs, lambda run: None if run.bytes is None else run.bytes / _MEGABYTE),
            format_range([run.samples_per_second for run in each.runs]),
            ", ".join(f"{lr:g}" for lr in sorted({run.lr for run in each.runs})),
            _runs_of(each, runs_table),
        )
        for each in cells
    )
    note = (
        "Median over seeds [min–max] until the target; a run that missed it counts as ∞. Samples/s are of whole runs."
    )
    return Table(f"{name}-cells", "What the target took", header, rows, note, last_is_text=True)


def speed_up_table(name: str, cells: Sequence[Measured], runs_table: str) -> Table:
    """All three definitions, and the two factors of the last."""
    header = (
        "method",
        "1: same batch",
        "2: epoch ÷ b=1",
        "2: epoch ÷ best",
        "3: accuracy ÷ b=1",
        "3: accuracy ÷ best [min–max]",
        "hardware",
        "statistical",
        "runs",
    )
    rows: list[tuple[str | Link, ...]] = []
    for each in cells:
        times = each.speed_up
        spread = each.speed_up_range
        best = format_number(times.accuracy_over_best)
        if spread is not None and each.n > 1:
            best += f" [{format_number(spread[0])}–{format_number(spread[1])}]"
        columns = (times.same_batch, times.epoch_over_batch_1, times.epoch_over_best, times.accuracy_over_batch_1)
        factors = (times.hardware_efficiency, times.statistical_efficiency)
        rows.append(
            (each.name, *map(format_number, columns), best, *map(format_number, factors), _runs_of(each, runs_table))
        )
    note = (
        "Over serial SGD (one rank, one thread): 1 with the same global batch, 2 per epoch whatever the accuracy, 3 to "
        "the target. Accuracy ÷ best = hardware (samples per second) × statistical (samples needed). “–”: the baseline "
        "was not run or missed the target; 0: the method missed it."
    )
    return Table(f"{name}-speed-up", "Speed-up over serial SGD", header, tuple(rows), note, last_is_text=True)


def method_table(name: str, study: Study, cells: Sequence[Measured]) -> Table:
    """What each cell is, and what was spent on tuning it."""
    header = ("method", "contender", "strategy", "ranks", "threads", "batch", "algorithm", "compression", "network")
    tuned = ("learning rates tried", "tuning runs", "chosen", "seeds", "further flags")
    rows = []
    for each in cells:
        cell, tuning = each.cell, tuning_of(study, each.cell)
        rows.append(
            (
                each.name,
                cell.contender,
                cell.strategy,
                str(cell.ranks),
                str(cell.threads),
                f"{cell.global_batch_size:,}",
                cell.algorithm,
                cell.compression,
                cell.network,
                ", ".join(f"{rate:g}" for rate in tuning.rates) or "–",
                str(tuning.runs),
                ", ".join(f"{lr:g}" for lr in sorted({run.lr for run in each.runs})),
                ", ".join(str(run.seed) for run in each.runs),
                " ".join(f"--{flag} {value}" for flag, value in cell.flags) or "–",
            )
        )
    note = "Threads are those of each rank; the batch is global, of all ranks together."
    title = "What was compared, and how it was tuned"
    return Table(f"{name}-methods", title, header + tuned, tuple(rows), note, 3, last_is_text=True, collapsed=True)


def fit_table(name: str, fit: Fit, noise: Sequence[float]) -> Table:
    """The hyperbola's parameters beside the noise scale that was measured."""
    columns = {**fit.describe(), "noise scale, samples": format_range(noise) if noise else "–"}
    note = (
        "S = S_min (1 + B_crit / B), with 95 % ranges. The noise scale (McCandlish et al. 2018), where it was measured "
        "while training, is expected to be of the size of B_crit; median over runs [min–max]."
    )
    header, row = tuple(columns), tuple(columns.values())
    return Table(f"{name}-batch-sizes", "Batch sizes: the fit", header, (row,), note, text_columns=0)


def run_table(name: str, study: Study, names: dict[object, str]) -> Table:
    """Every run, measured ones first, with its folder."""
    header = ("#", "method", "phase", "lr", "seed", "reached", "train s", "wall s", "samples", "steps")
    whole = ("MB sent", "communication s", "exposed s", "samples/s", "final accuracy, %", "noise scale")
    rows = tuple(
        (
            str(number),
            names.get(run.cell, run.cell.label),
            run.phase,
            f"{run.lr:g}",
            str(run.seed),
            "yes" if run.reached else "no",
            format_number(run.seconds),
            format_number(run.wall_seconds),
            _whole(run.samples),
            _whole(run.steps),
            format_number(None if run.bytes is None else run.bytes / _MEGABYTE),
            format_number(run.communication_seconds),
            format_number(run.exposed_communication_seconds),
            format_number(run.samples_per_second),
            f"{100 * run.final_accuracy:.2f}",
            format_number(run.noise_scale),
            run.folder,
        )
        for number, run in enumerate(ordered_runs(study), start=1)
    )
    return Table(
        f"{name}-runs",
        "Every run",
        (*header, *whole, "folder"),
        rows,
        "Folders are relative to the file of the results. Communication is that of the whole run.",
        text_columns=3,
        last_is_text=True,
        numbered=True,
        collapsed=True,
    )


def _runs_of(each: Measured, runs_table: str) -> Link:
    last = each.first_row + each.n - 1
    text = f"{each.first_row}–{last}" if each.n > 1 else str(each.first_row)
    return Link(text, runs_table, each.first_row)


def _told(runs: Sequence[Run], value: Callable[[Run], float | None]) -> str:
    """Return the range of what all runs tell, "–" where one does not."""
    values = [nan if (number := value(run)) is None else number for run in runs]
    return "–" if any(map(isnan, values)) else format_range(values)


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value < float("inf") else "∞"
