"""How soon is a target accuracy reached, and what do ranks gain? `python -m benchmarks.time_to_accuracy SPEC`.

Started without mpirun. A study is a grid of cells, read from a TOML file:

- serial                one rank, one thread, at each of the serial mini-batches: the baseline is the best of them
- one_rank_all_cores    one rank whose library computes in as many threads as there are cores
- torch_ddp_gloo        torch's DistributedDataParallel over Gloo, one thread per rank
- allreduce_sgd         every combination of ranks, strategy, mini-batch, algorithm, codec and network; likewise

Every run is a training in processes of its own, as a user starts it, and ends at the first evaluation that reaches the
target accuracy. First every cell chooses its learning rate: each tries as many rates with as many seeds, which do not
count afterwards; see `study/tuning.py`. Then each runs with the seeds that count. Seeds are the outer loop, so that the
drift of a noisy machine hits all cells alike. Evaluations stand on one grid of samples for all cells. Reported are
medians over seeds with [minimum–maximum], where a run that misses the target counts as infinite, and the speed-ups of
`speedup.py`. Two clocks: training seconds, which leave evaluation out, and wall seconds since the trainer was built,
which include it; neither has the start of Python or of MPI.

OUTPUT/results.jsonl gets a line for every run, whose folder is in OUTPUT/runs. A study that was ended goes on where it
stopped when it is started again: finished runs are read, not repeated, and keep the commit that made them.
"""

import argparse
import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from allreduce_sgd.errors import ConfigError, counted
from allreduce_sgd.topology import announced_size, launcher_rank
from benchmarks.arguments import Parser, check_writable, fraction, positive_int
from benchmarks.interrupts import ended_in_order
from benchmarks.record import provenance, write_record
from benchmarks.runs import RunFailed, find_mpirun
from benchmarks.study.cells import all_cells, check_cells, rates_of
from benchmarks.study.progress import Progress
from benchmarks.study.results import Cell, Phase, ResultsFile, Run, fields_of
from benchmarks.study.spec import Spec, read_spec, shipped
from benchmarks.study.tables import tables
from benchmarks.study.training import RUNS, check_finished, is_finished, run_cell
from benchmarks.study.tuning import FIRST_TUNING_SEED, choices
from benchmarks.table import format_table

__all__ = ["main", "row"]

_EPILOG = """\
A spec is a TOML file. Its keys, with [...] for what may be left out:

  name, dataset, model, [hidden = "512,512"]     what is trained, as for training; the name is that of the study
  target_accuracy, epochs                        the test accuracy to reach, and where a run ends that misses it
  evaluate_every_samples                         samples between two evaluations: a multiple of every mini-batch
  [seeds = 5, timeout_seconds = 900]             runs of each cell, and the deadline of each run
  [noise_scale = false]                          measure the gradient noise scale in synchronous cells, 16 times
                                                 between two evaluations (or in every step)

  [trainer]      further flags of training for all cells (default: momentum = 0.9, device = "cpu")
  [tuning]       lr = [...], ascending: every cell tries each in as many runs, and takes the one that needs
                 fewest samples to the target
                 [scaling = "none", batch_size = B]   "linear" or "sqrt": lr is for updates made from B samples
                                                      (of one rank's part of the mini-batch in hogwild,
                                                      server-async and server-staleness)
                 [seeds = 1]                          runs of each cell with each rate
  [grid]         ranks = [...], strategies = [...], global_batch_sizes = [...], [algorithms], [compressions],
                 [networks = ["none"]]: every combination is a cell. A strategy is a name, or
                 {name = "local", label = "local, period 8", flags = {period = 8}}. A network is a rate such as
                 "1gbit", of links between virtual hosts with one rank each (needs root), or "none"
  [baselines]    [serial_batches = [1, 64]]           one rank, one thread. {batch = 1, lr = [...]} has rates of its
                                                      own, as many as the others: for a mini-batch that the
                                                      scaling does not fit
                 [all_cores, torch_ddp = false]       also one rank with all cores, and torch's DDP, at the grid's
                                                      mini-batches (and ranks and networks)

Exit status: 0 done, 1 a run failed, 2 bad arguments or a bad spec."""


def main(arguments: Sequence[str]) -> int:
    """Run the study, and return the exit status: 0 done, 1 a run failed, 2 bad arguments or a bad spec."""
    try:
        options = _parse(arguments)
        spec = _overridden(read_spec(options.spec), options)
        cells = _cells(spec, options)
        if options.list:
            print(_listing(spec, cells))
            return 0
        _check_machine(cells)
        output = options.output or Path("runs") / f"study-{spec.name}"
        head = provenance("time_to_accuracy", arguments)
        runs = _run_all(spec, cells, output, options.data_dir, head, options.tune_only)
    except ConfigError as problem:
        if launcher_rank(os.environ) == 0:
            print(f"time_to_accuracy: error: {problem}", file=sys.stderr, flush=True)
        return 2
    except RunFailed as problem:
        print(f"time_to_accuracy: a run {problem}", file=sys.stderr, flush=True)
        return 1
    if options.tune_only:
        print(_chosen(runs, output))
        return 0
    heading = f"{spec.name}: {spec.model} on {spec.dataset} to {100 * spec.target_accuracy:g} % test accuracy"
    print(f"{heading}; median [min–max] over {counted(spec.seeds, 'seed')}\n\n{tables(runs)}\n\n{output}/results.jsonl")
    if options.json is not None:
        rows = [row(one, spec) for one in runs if one.phase == "measured"]
        write_record(options.json, "time_to_accuracy", arguments, rows)
    return 0


def row(run: Run, spec: Spec) -> dict[str, Any]:
    """Return the record's row of a run; null stands for what it took to reach a target that was not reached."""
    fields = fields_of(run)
    del fields["evaluations"]
    task = {"dataset": spec.dataset, "model": spec.model, "target_accuracy": spec.target_accuracy}
    return {**task, **fields, "final_accuracy": run.final_accuracy}


def _cells(spec: Spec, options: argparse.Namespace) -> list[Cell]:
    cells = all_cells(spec, len(os.sched_getaffinity(0)))
    check_cells(options.spec, spec, cells)
    if options.only is not None:
        cells = [cell for cell in cells if options.only in cell.label]
        if not cells:
            raise ConfigError(f"--only {options.only}: no cell's label contains it; --list shows them")
    return cells


def _overridden(spec: Spec, options: argparse.Namespace) -> Spec:
    given = {name: getattr(options, name) for name in ("seeds", "epochs", "target_accuracy")}
    spec = dataclasses.replace(spec, **{name: value for name, value in given.items() if value is not None})
    if options.tuning_seeds is not None:
        spec = dataclasses.replace(spec, tuning=dataclasses.replace(spec.tuning, seeds=options.tuning_seeds))
    return spec


def _check_machine(cells: Iterable[Cell]) -> None:
    """Raise ConfigError where this machine cannot run the cells: better now than after an hour."""
    cells = list(cells)
    launched = announced_size(os.environ)
    if launched is not None and launched[1] > 1:
        raise ConfigError(f"{launched[0]} started {launched[1]} of this; start one, it calls mpirun itself")
    if any(cell.ranks > 1 for cell in cells):
        find_mpirun()
    limited = next((cell for cell in cells if cell.network != "none"), None)
    if limited is not None and os.geteuid() != 0:
        raise ConfigError(
            f"grid.networks: {limited.network}: making virtual hosts needs root; leave it out with --only"
        )


def _tuning(spec: Spec, cells: Sequence[Cell]) -> list[tuple[Cell, float, int]]:
    """Return the runs by which cells choose their rates; none where there is no choice."""
    if len(spec.tuning.lr) == 1:
        return []
    return [
        (cell, rates_of(spec, cell)[index], FIRST_TUNING_SEED + seed)
        for seed in range(spec.tuning.seeds)
        for index in range(len(spec.tuning.lr))
        for cell in cells
    ]


def _run_all(
    spec: Spec, cells: Sequence[Cell], output: Path, data_dir: Path | None, head: dict[str, Any], tune_only: bool
) -> list[Run]:
    """Run the study, and return its runs. The file of results has them all at any time."""
    tuning = _tuning(spec, cells)
    seeds = range(0 if tune_only else spec.seeds)
    measured = [(cell, lr, seed) for cell in cells for lr in rates_of(spec, cell) for seed in seeds]
    for each in (*tuning, *measured):
        check_finished(spec, output, *each)
    rates_of_all = {cell: rates_of(spec, cell) for cell in all_cells(spec, len(os.sched_getaffinity(0)))}
    try:
        (output / RUNS).mkdir(parents=True, exist_ok=True)
        results = ResultsFile(output / "results.jsonl", {**head, "spec": dataclasses.asdict(spec)}, rates_of_all)
    except OSError as problem:
        raise ConfigError(f"--output {output}: cannot write there: {problem.strerror}") from problem
    runs: list[Run] = []
    with Progress([*(cell for cell, _, _ in tuning), *(cell for cell in cells for _ in seeds)]) as progress:

        def take(todo: Iterable[tuple[Cell, float, int]], phase: Phase) -> None:
            for cell, lr, seed in todo:
                progress.starts(cell, lr, seed)
                there = is_finished(output, cell, lr, seed)
                began = time.monotonic()
                runs.append(run_cell(spec, output, data_dir, cell, phase, lr, seed, head))
                results.add(runs[-1])
                progress.ended(cell, None if there else time.monotonic() - began)

        take(tuning, "tuning")
        chosen = choices(runs)
        rates = {cell: chosen[cell].lr if cell in chosen else rates_of(spec, cell)[0] for cell in cells}
        take([(cell, rates[cell], seed) for seed in seeds for cell in cells], "measured")
    return runs


def _chosen(runs: Sequence[Run], output: Path) -> str:
    lines = []
    for cell, choice in choices(runs).items():
        best = [run for run in runs if run.cell == cell and run.lr == choice.lr]
        samples = statistics.median(run.samples for run in best)
        told = "missed" if math.isinf(samples) else f"{samples:,.0f}"
        lines.append([cell.label, f"{choice.lr:.3g}{'*' * choice.on_edge}", told])
    table = format_table(["cell", "learning rate", "samples to the target"], lines, text_columns=1)
    return f"{table}\n\n* on the edge of its grid\n\n{output}/results.jsonl"


def _listing(spec: Spec, cells: Sequence[Cell]) -> str:
    tuning, measured = len(_tuning(spec, cells)), spec.seeds * len(cells)
    lines = [[cell.label, cell.contender, ", ".join(f"{rate:.3g}" for rate in rates_of(spec, cell))] for cell in cells]
    table = format_table(["cell", "contender", "learning rates"], lines, text_columns=3)
    counts = f"{counted(len(cells), 'cell')}, {tuning} tuning and {measured} measured runs: {tuning + measured} in all"
    return f"{table}\n\n{counts}"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("time_to_accuracy", "Measure the time to a target accuracy; it starts mpirun itself.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("spec", metavar="SPEC", help=f"a TOML file, or one of {', '.join(shipped())}")
    add("--list", action="store_true", help="print the cells and the number of runs, and run nothing")
    add("--only", metavar="TEXT", help="only the cells whose label contains this")
    _add_override(add, "--seeds", "runs of each cell, with the seeds 0 to N-1")
    _add_override(
        add, "--tuning-seeds", f"runs of each cell with each rate, with the seeds from {FIRST_TUNING_SEED} on"
    )
    add(
        "--tune-only",
        action="store_true",
        help="choose the learning rates and stop: this counts samples, so the machine may do other things meanwhile; "
        "the same call without this flag goes on from there",
    )
    _add_override(add, "--epochs", "where a run ends that misses the target")
    add("--target-accuracy", type=fraction, metavar="X", help="the target, a fraction, instead of the spec's")
    add("--data-dir", type=Path, metavar="DIR", help="folder with the data set's files")
    add("--output", type=Path, metavar="DIR", help="folder of the study (default: runs/study-NAME)")
    add("--json", type=Path, metavar="FILE", help="write a record with the measured runs here")
    options = parser.parse_args(arguments)
    check_writable("--json", options.json)
    if options.tune_only and options.json is not None:
        raise ConfigError("--json: with --tune-only nothing is measured, and there is no record")
    return options


def _add_override(add: Callable[..., Any], flag: str, what: str) -> None:
    add(flag, type=positive_int, metavar="N", help=f"{what}, instead of the spec's")


if __name__ == "__main__":
    with ended_in_order():
        sys.exit(main(sys.argv[1:]))
