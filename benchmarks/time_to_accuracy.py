"""How soon is a target accuracy reached, and what do ranks gain? `python -m benchmarks.time_to_accuracy`.

Started without mpirun. Every run is `python -m allreduce_sgd.train` in a process of its own, under mpirun where it has
several ranks, and ends at the first evaluation that reaches the target accuracy. Cells are:

- serial                one rank, one thread, at each of the serial mini-batches: the baseline is the best of them
- one_rank_all_cores    one rank whose library computes in as many threads as there are cores
- allreduce_sgd         each strategy on each number of ranks, one thread per rank

Every cell is run with every seed and every learning rate, and counts at its best rate, the baseline too. Rates are
given for the global mini-batch B; serial runs with mini-batch b take lr · b/B (the linear scaling rule). Evaluations
stand on one grid of samples for all cells. Seeds are the outer loop, so that the drift of a noisy machine hits all
cells alike. Reported are medians over seeds with [minimum–maximum], where a run that misses the target counts as
infinite, and the speed-ups of `speedup.py`. Two clocks: training seconds, which leave evaluation out, and wall seconds
since the trainer was built, which include it; neither has the start of Python or of MPI.
"""

import argparse
import dataclasses
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import isinf
from pathlib import Path
from typing import Any

from tqdm import tqdm

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.failure import INTERRUPTED
from allreduce_sgd.strategies.options import STRATEGIES
from allreduce_sgd.topology import announced_size, launcher_rank
from benchmarks.arguments import Parser, check_writable, fraction, names, positive_int, positive_ints, positive_numbers
from benchmarks.record import write_record
from benchmarks.runs import Cell, Outcome, RunFailed, Task, find_mpirun
from benchmarks.speedup import SERIAL, at_best_rate, by_cell, speed_up
from benchmarks.table import format_number, format_range, format_table

__all__ = ["cells", "label", "main", "row", "run", "tables"]

_ALL_CORES = "one_rank_all_cores"
_OURS = "allreduce_sgd"


def run() -> int:
    """Run the command line, and return the exit status."""
    # Ended by a scheduler or a time limit, it must end its ranks, as it does when interrupted by a person.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        return INTERRUPTED


def main(arguments: Sequence[str]) -> int:
    """Run the grid, and return the exit status: 0 done, 1 a run failed, 2 bad arguments."""
    try:
        options = _parse(arguments)
        outcomes = _run_all(options)
    except ConfigError as problem:
        if launcher_rank(os.environ) == 0:
            print(f"time_to_accuracy: error: {problem}", file=sys.stderr, flush=True)
        return 2
    except RunFailed as problem:
        print(f"time_to_accuracy: a run {problem}", file=sys.stderr, flush=True)
        return 1
    best = at_best_rate(by_cell(outcomes))
    heading = f"{options.model} on {options.dataset} to {100 * options.target_accuracy:g} % test accuracy"
    print(f"{heading}: median [min–max] over {options.seeds} seeds\n\n{tables(best)}")
    if options.json is not None:
        write_record(options.json, "time_to_accuracy", arguments, [row(outcome, options) for outcome in outcomes])
    if options.plot is not None:
        from benchmarks.accuracy_plot import plot_accuracy

        labelled = {label(cell): runs for cell, runs in best.items()}
        plot_accuracy(labelled, options.target_accuracy, heading, options.plot)
    return 0


def cells(options: argparse.Namespace, cores: int) -> Iterator[Cell]:
    """Return the cells to run; one rank alone is serial SGD under every strategy."""
    batch = options.global_batch_size
    if 1 in options.ranks:
        for serial_batch in sorted({*options.serial_batches, batch}):
            for rate in options.lr:
                yield Cell(SERIAL, "sync", 1, 1, serial_batch, rate * serial_batch / batch)
        if cores > 1:
            for rate in options.lr:
                yield Cell(_ALL_CORES, "sync", 1, cores, batch, rate)
    for strategy in options.strategies:
        for ranks in options.ranks:
            for rate in options.lr:
                if ranks > 1:
                    yield Cell(_OURS, strategy, ranks, 1, batch, rate)


def label(cell: Cell) -> str:
    """Return what a table or plot calls the cell, of which it shows one learning rate."""
    if cell.contender == SERIAL:
        return f"serial, batch {cell.global_batch_size}"
    if cell.contender == _ALL_CORES:
        return f"one rank, {cell.threads} threads"
    return f"{cell.strategy}, {cell.ranks} ranks"


def row(outcome: Outcome, options: argparse.Namespace) -> dict[str, Any]:
    """Return the record's row of a run; null stands for what it took to reach a target that was not reached."""
    spent = {
        "seconds": outcome.seconds,
        "wall_seconds": outcome.wall_seconds,
        "samples": outcome.samples,
        "steps": outcome.steps,
        "bytes": outcome.sent_bytes,
    }
    return {
        "dataset": options.dataset,
        "model": options.model,
        "target_accuracy": options.target_accuracy,
        **dataclasses.asdict(outcome.cell),
        "seed": outcome.seed,
        "reached": outcome.reached,
        **{name: None if value is None or isinf(value) else value for name, value in spent.items()},
        "samples_per_second": outcome.samples_per_second,
        "final_accuracy": outcome.evaluations[-1].test_accuracy,
    }


def tables(best: Mapping[Cell, Sequence[Outcome]]) -> str:
    """Return two tables: what each cell took to reach the target, and its speed-ups."""
    took, gained = [], []
    for cell, runs in best.items():
        megabytes = [run.sent_bytes / 1e6 for run in runs if run.sent_bytes is not None]
        took.append(
            [
                label(cell),
                f"{cell.lr:.3g}",
                f"{sum(run.reached for run in runs)}/{len(runs)}",
                format_range([run.seconds for run in runs]),
                format_range([run.wall_seconds for run in runs]),
                format_range([run.samples for run in runs]),
                format_range([run.steps for run in runs]),
                format_range(megabytes) if megabytes else "–",
                format_range([run.samples_per_second for run in runs]),
            ]
        )
        gained.append([label(cell), *map(format_number, dataclasses.astuple(speed_up(runs, best)))])
    first = ["cell", "lr", "reached", "train s", "wall s", "samples", "steps", "MB sent per rank", "samples/s"]
    second = ["speed-up", "same batch", "epoch ÷ b=1", "epoch ÷ best", "accuracy ÷ b=1", "accuracy ÷ best"]
    second += ["= hardware", "× statistical"]
    return f"{format_table(first, took)}\n\n{format_table(second, gained)}"


def _run_all(options: argparse.Namespace) -> list[Outcome]:
    task = Task(
        options.dataset,
        options.data_dir,
        options.model,
        options.hidden,
        options.period,
        options.target_accuracy,
        options.epochs,
        options.evaluate_every,
        options.timeout_seconds,
        options.output or Path("runs") / f"time_to_accuracy-{options.dataset.replace(':', '.')}-{options.model}",
    )
    todo = [(cell, seed) for seed in range(options.seeds) for cell in cells(options, len(os.sched_getaffinity(0)))]
    outcomes = []
    with tqdm(todo, unit="run", leave=False, disable=not sys.stderr.isatty()) as bar:
        for cell, seed in bar:
            bar.set_postfix_str(f"{label(cell)}, seed {seed}")
            outcomes.append(task.run(cell, seed))
    return outcomes


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("time_to_accuracy", "Measure the time to a target accuracy; it starts mpirun itself.")
    add = parser.add_argument
    add("--dataset", default="digits", metavar="NAME", help="data set, as for training")
    add("--data-dir", type=Path, metavar="DIR", help="folder with the data set's files")
    add("--model", default="mlp", metavar="NAME", help="model, as for training")
    add("--hidden", default="512,512", metavar="WIDTHS", help="widths of the hidden layers of --model mlp")
    add("--ranks", type=positive_ints, default="1,2", metavar="N,...", help="rank counts; 1 adds the baselines")
    add("--strategies", default="sync,local", metavar="NAMES", help="strategies, separated by commas")
    add("--period", type=positive_int, default=8, metavar="N", help="steps between averages of local strategies")
    add("--global-batch-size", type=positive_int, default=64, metavar="N", help="samples of all ranks per step")
    add("--serial-batches", type=positive_ints, default="1,16,64", metavar="N,...", help="mini-batches of serial SGD")
    add("--lr", type=positive_numbers, default="0.05", metavar="X,...", help="learning rates to choose from")
    add("--target-accuracy", type=fraction, default="0.96", metavar="X", help="test accuracy, a fraction")
    add("--epochs", type=positive_int, default=30, metavar="N", help="where a run ends that misses the target")
    add("--seeds", type=positive_int, default=5, metavar="N", help="runs of each cell, with the seeds 0 to N-1")
    add("--evaluate-every", type=positive_int, default=512, metavar="N", help="samples between two evaluations")
    add("--timeout-seconds", type=positive_int, default=900, metavar="N", help="deadline of each run")
    add("--output", type=Path, metavar="DIR", help="folder of the runs; finished ones in it are not run again")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    add("--plot", type=Path, metavar="FILE.png", help="draw accuracy against time here")
    options = parser.parse_args(arguments)
    options.strategies = names("--strategies", options.strategies, STRATEGIES)
    for batch in (options.global_batch_size, *(options.serial_batches if 1 in options.ranks else ())):
        if options.evaluate_every % batch:
            raise ConfigError(f"--evaluate-every {options.evaluate_every}: not a multiple of the mini-batch {batch}")
    check_writable("--json", options.json)
    check_writable("--plot", options.plot)
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: the package matplotlib is not installed")
    launched = announced_size(os.environ)
    if launched is not None and launched[1] > 1:
        raise ConfigError(f"{launched[0]} started {launched[1]} of this; start one, it calls mpirun itself")
    if max(options.ranks) > 1:
        find_mpirun()
    return options


if __name__ == "__main__":
    sys.exit(run())
