"""Optimizers on toy landscapes: `python -m benchmarks.toy -o DIR`.

Logistic regression of two weights, Beale's function and the saddle y⁴ - x⁴ (`toy_landscapes`) are gone down by every
optimizer that the trainer builds for two weights, each with the learning rate of a grid that serves it best
(`toy_trajectories`). For every landscape it prints a table of where they got to, and draws where they went
(`toy_plot`), with --animate in motion. Nothing here is timed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from allreduce_sgd.errors import ConfigError
from benchmarks.arguments import Parser, check_plotting, check_writable, names, positive_int, positive_number
from benchmarks.record import write_record
from benchmarks.table import format_table
from benchmarks.toy_landscapes import LANDSCAPES, Landscape
from benchmarks.toy_trajectories import (
    LEARNING_RATES,
    Contender,
    Trajectory,
    best,
    contenders,
    known_contenders,
    lowest_value,
    steps_to,
    without_noise,
)

__all__ = ["main", "row_of", "table"]

_STEPS = 200
_FARTHEST = 100.0


def main(arguments: Sequence[str]) -> int:
    """Go down, print and draw, and return the exit status: 0, or 2 for bad arguments."""
    try:
        options = _parse(arguments)
    except ConfigError as problem:
        print(f"toy: error: {problem}", file=sys.stderr, flush=True)
        return 2
    rows = []
    threads = torch.get_num_threads()
    # Steps are so short that threads would mostly wait for one another.
    torch.set_num_threads(1)
    try:
        for name, landscape in options.landscapes.items():
            found = _go_down(name, landscape, [*without_noise(landscape), *options.optimizers], options)
            _draw(name, landscape, found, options)
            these = [row_of(name, landscape, who, gone, options.steps, options.seed) for who, gone in found.items()]
            print(f"{landscape.title} ({options.output / name}.png)\n\n{table(these)}\n", flush=True)
            rows += these
    finally:
        torch.set_num_threads(threads)
    if options.json is not None:
        write_record(options.json, "toy", arguments, rows)
    return 0


def row_of(
    name: str, landscape: Landscape, contender: Contender, trajectory: Trajectory, steps: int, seed: int
) -> dict[str, Any]:
    """Return the record's row. JSON has no infinity: where a trajectory diverged, its end and all of it are None."""
    lowest = lowest_value(landscape)
    end = None if trajectory.diverged else [float(part) for part in trajectory.points[-1]]
    value = None if end is None else float(trajectory.values[-1])
    minimum = None if landscape.minimum is None else landscape.minimum()
    return {
        "landscape": name,
        "optimizer": contender.name,
        "lr": trajectory.lr,
        "lrs_tried": list(LEARNING_RATES),
        "steps_allowed": steps,
        "steps": trajectory.steps,
        "gradients": trajectory.gradients,
        "start": list(landscape.start),
        "noise": landscape.noise if contender.noisy else 0.0,
        "seed": seed,
        "end": end,
        "value": value,
        "gap": None if value is None or lowest is None else value - lowest,
        "distance": None if end is None or minimum is None else _distance(end, minimum),
        "steps_to_bottom": None if landscape.bottom is None else steps_to(trajectory, landscape.bottom),
        "diverged": trajectory.diverged,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of one landscape as a table; a * marks a learning rate at the edge of the grid."""
    ends = (LEARNING_RATES[0], LEARNING_RATES[-1])
    downhill = any(row["steps_to_bottom"] is not None for row in rows)
    header = ["optimizer", "lr", "steps", "gradients", "end", "value"]
    lines = []
    for row in rows:
        end = "diverged" if row["end"] is None else "({:.3f}, {:.3f})".format(*row["end"])
        line = [
            row["optimizer"],
            f"{row['lr']:g}{'*' if row['lr'] in ends else ''}",
            str(row["steps"]),
            str(row["gradients"]),
            end,
            _short(row["value"]),
        ]
        line += (
            ["never" if row["steps_to_bottom"] is None else str(row["steps_to_bottom"])]
            if downhill
            else [
                _short(row["gap"]),
                _short(row["distance"]),
            ]
        )
        lines.append(line)
    return format_table([*header, *(["steps until down"] if downhill else ["above minimum", "distance"])], lines)


def _short(value: float | None) -> str:
    return "∞" if value is None else f"{value:.3g}"


def _distance(point: Sequence[float], other: Sequence[float]) -> float:
    return float((torch.tensor(point, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)).norm())


def _go_down(
    name: str, landscape: Landscape, who: Sequence[Contender], options: argparse.Namespace
) -> dict[Contender, Trajectory]:
    with tqdm(who, unit="optimizer", leave=False, desc=name, disable=not sys.stderr.isatty()) as bar:
        return {contender: best(landscape, contender, options.steps, options.seed) for contender in bar}


def _draw(name: str, landscape: Landscape, found: Mapping[Contender, Trajectory], options: argparse.Namespace) -> None:
    from benchmarks.toy_plot import animate, draw

    draw(landscape, found, options.output / f"{name}.png")
    if options.animate:
        animate(landscape, found, options.output / f"{name}.gif")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("toy", "Watch optimizers go down toy landscapes, each with its best learning rate of a grid.")
    add = parser.add_argument
    add("--landscapes", metavar="NAMES", default=",".join(LANDSCAPES), help=f"of {', '.join(LANDSCAPES)}")
    add(
        "--optimizers",
        metavar="NAMES",
        help="of those that the trainer has, as they are named in the table; all: also those that the course does not "
        "speak of; not set: the course's",
    )
    add("--steps", type=positive_int, default=_STEPS, metavar="N", help="steps of each trajectory")
    add("--start", metavar="X,Y", help="where to start, on all landscapes; not set: a place of each")
    add(
        "--noise",
        type=_not_negative,
        metavar="X",
        help="standard deviation of noise in gradients; not set: by landscape",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the noise")
    add("-o", "--output", type=Path, default=Path("runs") / "toy", metavar="DIR", help="folder of the pictures")
    add("--animate", action="store_true", help="draw animations (GIF) too")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    changed: dict[str, Any] = {} if options.noise is None else {"noise": options.noise}
    if options.start is not None:
        changed["start"] = _point(options.start)
    options.landscapes = {
        name: replace(LANDSCAPES[name], **changed)
        for name in names("--landscapes", options.landscapes, list(LANDSCAPES))
    }
    known = list(known_contenders())
    if options.optimizers is None:
        options.optimizers = contenders()
    else:
        chosen = names("--optimizers", options.optimizers, ["all", *known])
        options.optimizers = contenders(known if "all" in chosen else chosen)
    check_plotting("--output", options.output)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(f"--output {options.output}: cannot be made a folder: {problem.strerror}") from problem
    check_writable("--json", options.json)
    return options


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        x = y = float("inf")
    if not max(abs(x), abs(y)) < _FARTHEST:
        raise ConfigError(f"--start: {text!r} is not two numbers between -{_FARTHEST:g} and {_FARTHEST:g}, such as 0,1")
    return x, y


def _not_negative(text: str) -> float:
    return 0.0 if text.strip() == "0" else positive_number(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
