"""Where does the time go until ranks have taken their first step? `python -m benchmarks.startup`.

Started without mpirun. Every round starts a training of one step as a user does, and reads the clock, which all
processes of a machine share, at the points that end these phases; a phase's time is the maximum over ranks:

- launch       until Python runs in the rank: mpirun or another launcher, and the interpreter
- imports      torch and all modules of this package that a training needs
- MPI          reading the command line, initialising MPI, finding out about ranks and nodes
- data         agreeing on the configuration, loading the data set
- building     model, communicator (with the measurement of its algorithms where its file is not there yet), strategy
- first step   the first optimizer step: the first mini-batch, and all that happens only once
- total        from the start to the end of the first step, of the slowest rank

- help         a whole `python -m allreduce_sgd.train --help`, which needs neither torch nor MPI
- interpreter  a whole `python -c pass`, for comparison

Reported are medians over rounds with [minimum–maximum]. Trainings import what they need later than here, after they
have initialised MPI; the sum is the same. That the run took its step on all ranks is checked.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allreduce_sgd.errors import ConfigError
from benchmarks.arguments import Parser, check_writable, positive_int
from benchmarks.interrupts import ended_in_order
from benchmarks.record import write_record
from benchmarks.runs import Flags, RunFailed, train
from benchmarks.startup_rank import MARKS
from benchmarks.table import format_range, format_table

__all__ = ["main", "measure", "table"]

_COMMANDS = {"help": ["-m", "allreduce_sgd.train", "--help"], "interpreter": ["-c", "pass"]}


def main(arguments: Sequence[str]) -> int:
    """Measure, and return the exit status: 0, 1 where a run failed, or 2 for bad arguments."""
    try:
        options = _parse(arguments)
        rows = measure(options.ranks, options.rounds, options.dataset, options.timeout_seconds)
    except ConfigError as problem:
        print(f"startup: error: {problem}", file=sys.stderr, flush=True)
        return 2
    except RunFailed as problem:
        print(f"startup: a run {problem}", file=sys.stderr, flush=True)
        return 1
    print(f"{options.ranks} ranks, {options.dataset}, {options.rounds} rounds; median [min–max]\n")
    print(table(rows))
    if options.json is not None:
        write_record(options.json, "startup", arguments, rows)
    return 0


def measure(ranks: int, rounds: int, dataset: str, timeout_seconds: int) -> list[dict[str, Any]]:
    """Return a row for each phase. Raises RunFailed."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for phase, one in {**_training(ranks, dataset, timeout_seconds), **_commands(timeout_seconds)}.items():
            seconds.setdefault(phase, []).append(one)
    return [
        {
            "phase": phase,
            "dataset": dataset,
            "ranks": 1 if phase in _COMMANDS else ranks,
            "rounds": rounds,
            "median_seconds": statistics.median(times),
            "seconds": times,
        }
        for phase, times in seconds.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    return format_table(["phase", "seconds"], [[row["phase"], format_range(row["seconds"])] for row in rows])


def _training(ranks: int, dataset: str, timeout_seconds: int) -> dict[str, float]:
    """Return the seconds of each phase of one training, the maximum over ranks."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        launched = time.monotonic()
        flags: Flags = {"marks": folder, "launched": launched, "output": str(run), "dataset": dataset, "steps": 1}
        train(ranks, flags, timeout_seconds, "benchmarks.startup_rank")
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        if (summary["world_size"], summary["steps"]) != (ranks, 1):
            raise RunFailed(f"took {summary['steps']} steps on {summary['world_size']} ranks, not 1 on {ranks}")
        found = [json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).glob("rank-*.json")]
    phases = {phase: max(one[phase] for one in found) for phase in MARKS}
    return {**phases, "total": max(sum(one.values()) for one in found)}


def _commands(timeout_seconds: int) -> dict[str, float]:
    seconds = {}
    for name, words in _COMMANDS.items():
        started = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, *words], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, timeout=timeout_seconds
            )
        except subprocess.TimeoutExpired:
            raise RunFailed(f"not finished after {timeout_seconds} s: python {' '.join(words)}") from None
        if done.returncode != 0:
            raise RunFailed(f"ended with status {done.returncode}: python {' '.join(words)}")
        seconds[name] = time.monotonic() - started
    return seconds


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("startup", "Measure the time from the start of ranks to their first step; it starts mpirun itself.")
    add = parser.add_argument
    add("--ranks", type=positive_int, default=2, metavar="N", help="ranks of the training")
    add("--dataset", default="digits", metavar="NAME", help="data set of the training, found in its usual folder")
    add("--rounds", type=positive_int, default=7, metavar="N", help="rounds, of which the median counts")
    add("--timeout-seconds", type=positive_int, default=120, metavar="N", help="deadline of each start")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    check_writable("--json", options.json)
    return options


if __name__ == "__main__":
    with ended_in_order():
        sys.exit(main(sys.argv[1:]))
