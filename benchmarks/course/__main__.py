"""The course's pictures: `python -m benchmarks.course [FIGURES...]`, without mpirun.

Each is drawn from real runs, `python -m allreduce_sgd.train` as a user starts it, of a network with two hidden layers
on Fashion-MNIST where --data-dir has it, on the small digits else. Runs that are there already are not run again.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.errors import ConfigError
from benchmarks.arguments import Parser, check_plotting, check_writable, fraction, positive_int, positive_ints
from benchmarks.course.figures import FIGURES, timed_batch_sizes
from benchmarks.course.runs import Course, Job
from benchmarks.interrupts import ended_in_order
from benchmarks.record import write_record
from benchmarks.runs import RunFailed, find_mpirun
from benchmarks.table import format_number, format_table

__all__ = ["main", "table"]

# Epochs and target accuracy where they are not given.
_LENGTHS: Mapping[str, tuple[int, float]] = MappingProxyType({"fashion-mnist": (5, 0.87), "digits": (20, 0.95)})
_ELSEWHERE = (5, 0.9)
_COLUMNS = 8
_FEWEST_SAMPLES = 32
"""Two of the smallest batches."""


def main(arguments: Sequence[str]) -> int:
    """Train and draw, and return the exit status: 0, 1 where a run failed, 2 for bad arguments."""
    try:
        options = _parse(arguments)
        rows = _draw_all(options.figures, _course(options), options.figures_dir)
    except ConfigError as problem:
        print(f"course: error: {problem}", file=sys.stderr, flush=True)
        return 2
    except RunFailed as problem:
        print(f"course: a run {problem}", file=sys.stderr, flush=True)
        return 1
    if options.json is not None:
        write_record(options.json, "course", arguments, rows)
    return 0


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the points of a figure, or of longer lines a few of them, the last among them."""
    longest = max(len(row["x"]) for row in rows)
    places = sorted({(longest - 1) * part // (_COLUMNS - 1) for part in range(_COLUMNS)})
    x = next(row["x"] for row in rows if len(row["x"]) == longest)
    # Where batches differ, so do the samples of a point, a little.
    header = [f"{rows[0]['y_label']} | {rows[0]['x_label']}", "n", *(f"{x[place]:,}" for place in places)]
    lines = []
    for row in rows:
        y = [inf if value is None else value for value in row["y"]]
        shown = [format_number(y[place]) if place < len(y) else "" for place in places]
        lines.append([row["series"], "–" if row["n"] is None else str(row["n"]), *shown])
    return format_table(header, lines)


def _draw_all(figures: Sequence[str], course: Course, folder: Path) -> list[dict[str, Any]]:
    from benchmarks.course.figure import draw

    jobs = {name: list(dict.fromkeys(FIGURES[name].jobs(course))) for name in figures}
    rows = []
    with tqdm(
        total=course.seeds * sum(map(len, jobs.values())), unit="run", leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        for name in figures:
            for seed in range(course.seeds):
                for job in jobs[name]:
                    bar.set_postfix_str(f"{name}: {job.name}, seed {seed}")
                    course.run(job, seed)
                    bar.update()
            found = FIGURES[name].rows(course)
            draw(found, folder / f"{name}.png")
            bar.clear()
            print(f"{found[0]['title']} ({folder / name}.png)\n{found[0]['note']}\n\n{table(found)}\n", flush=True)
            rows += [{**_trained(course, jobs[name]), **row} for row in found]
    return rows


def _trained(course: Course, jobs: Sequence[Job]) -> dict[str, Any]:
    """Return what rows tell of the network that was trained, nothing where there was none."""
    flags = course.flags(jobs[0], 0) if jobs else {}
    return {name: flags[name] for name in ("dataset", "model", "hidden") if name in flags}


def _course(options: argparse.Namespace) -> Course:
    data = DataOptions(options.dataset, None if options.data_dir is None else str(options.data_dir))
    epochs, target_accuracy = _LENGTHS.get(options.dataset.lower(), _ELSEWHERE)
    train_samples = len(load_dataset(data, 0).train)
    if train_samples < _FEWEST_SAMPLES:
        raise ConfigError(
            f"--dataset {options.dataset}: has {train_samples} training samples; at least {_FEWEST_SAMPLES} are needed"
        )
    course = Course(
        dataset=options.dataset,
        data_dir=options.data_dir,
        train_samples=train_samples,
        hidden=options.hidden,
        target_accuracy=options.target_accuracy or target_accuracy,
        epochs=options.epochs or epochs,
        seeds=options.seeds,
        ranks=options.ranks,
        timeout_seconds=options.timeout_seconds,
        output=options.output,
    )
    seen = course.epochs * train_samples
    if seen < course.fewest_samples and any(FIGURES[name].series for name in options.figures):
        raise ConfigError(
            f"--epochs {course.epochs}: {seen} samples make no point of a loss curve; at least "
            f"{course.fewest_samples} are needed"
        )
    for ranks in options.ranks if "epoch_time" in options.figures else ():
        if not timed_batch_sizes(course, ranks):
            raise ConfigError(f"--ranks {ranks}: no mini-batch of epoch_time has a sample for each of them here")
    return course


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("course", "Draw the course's pictures from runs of the trainer; it starts mpirun itself.")
    add = parser.add_argument
    add("figures", nargs="*", metavar="FIGURES", help=f"of {', '.join(FIGURES)}; none named: all")
    add(
        "--dataset", metavar="NAME", help="data set, as for training; not set: fashion-mnist with --data-dir, or digits"
    )
    add("--data-dir", type=Path, metavar="DIR", help="folder with the data set's files")
    add("--hidden", default="512,512", metavar="WIDTHS", help="widths of the network's hidden layers")
    add("--seeds", type=positive_int, default=5, metavar="N", help="runs of each case, with the seeds 0 to N-1")
    add("--epochs", type=positive_int, metavar="N", help="epochs of a loss curve; not set: 5, for digits 20")
    add("--target-accuracy", type=fraction, metavar="X", help="for epochs_to_target; not set: by data set")
    add("--ranks", type=positive_ints, default=(1, 2, 4), metavar="NUMBERS", help="numbers of ranks in epoch_time")
    add("--timeout-seconds", type=positive_int, default=1800, metavar="N", help="deadline of each run")
    add("--output", type=Path, metavar="DIR", help="folder of the runs; finished ones in it are not run again")
    add("--figures-dir", type=Path, metavar="DIR", help="folder of the pictures; not set: figures, beside the runs")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    for name in options.figures:
        if name not in FIGURES:
            raise ConfigError(f"FIGURES: unknown value {name!r}; choose from {', '.join(FIGURES)}")
    options.figures = list(dict.fromkeys(options.figures or FIGURES))
    check_writable("--json", options.json)
    check_plotting("FIGURES", options.figures)
    if max(options.ranks) > 1 and "epoch_time" in options.figures:
        find_mpirun()
    options.dataset = options.dataset or ("digits" if options.data_dir is None else "fashion-mnist")
    options.output = options.output or Path("runs") / f"course-{re.sub('[^A-Za-z0-9.,-]+', '.', options.dataset)}"
    options.figures_dir = options.figures_dir or options.output / "figures"
    for flag, folder in (("--output", options.output), ("--figures-dir", options.figures_dir)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ConfigError(f"{flag} {folder}: cannot be made a folder: {problem.strerror}") from problem
    return options


if __name__ == "__main__":
    with ended_in_order():
        sys.exit(main(sys.argv[1:]))
