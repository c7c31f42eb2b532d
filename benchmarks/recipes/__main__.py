"""The course's experiments: `python -m benchmarks.recipes NAME`, without mpirun; without NAME it lists them.

Each says first what to expect and why, then trains, `python -m allreduce_sgd.train` as a user starts it, then prints
what was found beside what was expected, with a verdict, and draws pictures. Finished runs are not run again.
"""

import argparse
import math
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.errors import ConfigError
from benchmarks.arguments import Parser, check_plotting, check_writable, positive_int
from benchmarks.course.runs import Course
from benchmarks.interrupts import ended_in_order
from benchmarks.recipes.catalogue import RECIPES
from benchmarks.recipes.recipe import Finding, Recipe, Scale
from benchmarks.record import write_record
from benchmarks.runs import RunFailed
from benchmarks.table import format_range, format_table

__all__ = ["main", "overview", "rows_of", "table"]

_WIDTH = 100
_SEEDS = 3


def main(arguments: Sequence[str]) -> int:
    """Cook, and return the exit status: 0, 1 where a run failed, 2 for bad arguments. A verdict is no failure."""
    rows = []
    try:
        options = _parse(arguments)
        if not options.names:
            print(overview(), flush=True)
            return 0
        for name in options.names:
            rows += _cook(name, RECIPES[name], options)
    except ConfigError as problem:
        print(f"recipes: error: {problem}", file=sys.stderr, flush=True)
        return 2
    except RunFailed as problem:
        print(f"recipes: a run {problem}", file=sys.stderr, flush=True)
        return 1
    if options.json is not None:
        write_record(options.json, "recipes", arguments, rows)
    return 0


def overview() -> str:
    """Return the list of recipes."""
    told = format_table(["recipe", "what it shows"], [[name, each.title] for name, each in RECIPES.items()], 2)
    return f"{told}\n\npython -m benchmarks.recipes NAME [--quick] runs one, --help tells more"


def table(findings: Sequence[Finding]) -> str:
    """Return the claims as a table: medians [and ranges] of the numbers that are compared, and the verdict."""
    lines = [
        [
            each.claim,
            format_range([smaller for smaller, _ in each.pairs]),
            format_range([larger for _, larger in each.pairs]),
            f"{each.held} of {len(each.pairs)}",
            each.verdict,
        ]
        for each in findings
    ]
    compared = "\n".join(
        f"  {number}: {each.smaller}  <  {each.larger}" for number, each in enumerate(findings, start=1)
    )
    numbered = [[f"{number} {line[0]}", *line[1:]] for number, line in enumerate(lines, start=1)]
    return f"{format_table(['expected', 'found', '<', 'holds in', 'verdict'], numbered)}\n\nCompared are\n{compared}"


def rows_of(name: str, course: Course, findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return a row of the record for each claim. JSON has no infinity: None stands for it."""
    return [
        {
            "recipe": name,
            "dataset": course.dataset,
            "epochs": course.epochs,
            "train_samples": course.train_samples,
            "seeds": course.seeds,
            "claim": each.claim,
            "smaller": each.smaller,
            "larger": each.larger,
            "smaller_values": [_or_none(smaller) for smaller, _ in each.pairs],
            "larger_values": [_or_none(larger) for _, larger in each.pairs],
            "held": each.held,
            "verdict": each.verdict,
        }
        for each in findings
    ]


def _cook(name: str, recipe: Recipe, options: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.course.figure import draw

    course = _course(name, recipe.scale(options.dataset.lower(), options.quick), options)
    cases = recipe.cases(recipe.scale(options.dataset.lower(), options.quick))
    print(f"{recipe.title}\n\nTo expect:\n{textwrap.fill(recipe.expect, _WIDTH, break_on_hyphens=False)}\n", flush=True)
    jobs = dict.fromkeys(cases.values())
    if jobs:
        print(
            f"{len(jobs)} trainings on {course.dataset}, with {course.seeds} seed{'s' if course.seeds > 1 else ''} "
            f"each, {course.epochs} epochs of {course.train_samples:,} samples, in {course.output}\n",
            flush=True,
        )
    with tqdm(total=course.seeds * len(jobs), unit="run", leave=False, disable=not sys.stderr.isatty()) as bar:
        for seed in range(course.seeds):
            for job in jobs:
                bar.set_postfix_str(f"{job.name}, seed {seed}")
                course.run(job, seed)
                bar.update()
    figures = recipe.figures(cases, course)
    findings = recipe.findings(cases, course, figures)
    for figure, rows in figures.items():
        draw(rows, course.output / f"{figure}.png")
    pictures = ", ".join(str(course.output / f"{figure}.png") for figure in figures)
    print(f"{table(findings)}\n\nPictures: {pictures}\n", flush=True)
    return rows_of(name, course, findings)


def _course(name: str, scale: Scale, options: argparse.Namespace) -> Course:
    data = DataOptions(options.dataset, None if options.data_dir is None else str(options.data_dir))
    samples = len(load_dataset(data, 0).train)
    output = options.output / name
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(f"--output {output}: cannot be made a folder: {problem.strerror}") from problem
    return Course(
        dataset=options.dataset,
        data_dir=options.data_dir,
        train_samples=samples if scale.train_samples is None else min(samples, scale.train_samples),
        hidden=options.hidden or scale.hidden,
        target_accuracy=1.0,
        epochs=options.epochs or scale.epochs,
        seeds=options.seeds or (1 if options.quick else _SEEDS),
        ranks=(1,),
        timeout_seconds=options.timeout_seconds,
        output=output,
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("recipes", "Run an experiment of the course, and see whether it shows what is expected.")
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; none: list them")
    add("--quick", action="store_true", help="one seed, fewer epochs: for a first look, in a minute or two")
    add(
        "--dataset", metavar="NAME", help="data set, as for training; not set: fashion-mnist with --data-dir, or digits"
    )
    add("--data-dir", type=Path, metavar="DIR", help="folder with the data set's files")
    add("--hidden", metavar="WIDTHS", help="widths of the network's hidden layers; not set: by recipe")
    add("--seeds", type=positive_int, metavar="N", help=f"runs of each case; not set: {_SEEDS}, with --quick 1")
    add("--epochs", type=positive_int, metavar="N", help="epochs of each run; not set: by recipe and data set")
    add("--timeout-seconds", type=positive_int, default=3600, metavar="N", help="deadline of each run")
    add("-o", "--output", type=Path, metavar="DIR", help="folder of runs and pictures, a folder for each recipe")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in RECIPES:
            raise ConfigError(f"NAME: unknown value {name!r}; choose from {', '.join(RECIPES)}")
    check_writable("--json", options.json)
    check_plotting("NAME", options.names or None)
    options.dataset = options.dataset or ("digits" if options.data_dir is None else "fashion-mnist")
    plain = re.sub("[^A-Za-z0-9.,-]+", ".", options.dataset)
    options.output = options.output or Path("runs") / f"recipes-{plain}{'-quick' if options.quick else ''}"
    return options


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    with ended_in_order():
        sys.exit(main(sys.argv[1:]))
