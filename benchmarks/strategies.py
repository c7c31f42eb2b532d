"""Do the methods do what their papers say? `python -m benchmarks.strategies`, without mpirun.

Every run is `mpirun -np N python -m allreduce_sgd.train` as a user starts it. A study compares cases that differ in
the method alone: same data, model, samples and seeds. Studies:

- staleness    many workers and one server; step eta0 against eta0 / staleness, for n-softsync with n = workers
               (Zhang et al. 2016, arXiv 1511.05950: with eta0 CIFAR-10 diverges, with eta0 / staleness it does not)
- elastic      periods 1 to 64 of asynchronous EASGD against Downpour, which pushes and fetches as rarely
               (Zhang, Choromanska, LeCun 2015, arXiv 1412.6651: EASGD tolerates a long period, Downpour does not)
- slowmo       SlowMo against local SGD, as many exchanges (Wang et al. 2019, arXiv 1910.00643: SlowMo is no worse)
- post-local   post-local SGD against synchronous SGD with the same large batch, as many epochs (Lin et al. 2018,
               arXiv 1808.07217: post-local generalises better)
- straggler    one rank three times as slow: what synchronous, local and asynchronous methods lose of their speed
- cost         what a step of local SGD costs, against one without communication (local SGD that never exchanges)
- all          every method once, with its defaults

Columns: accuracy on the test set of the consensus model, loss on the training set, training samples per second of all
workers, kilobytes sent per step and worker; medians [min-max] over seeds. A run whose loss is not a number, or that is
no better than guessing, has diverged.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.strategies.options import STRATEGIES
from benchmarks.arguments import Parser, check_writable, names, positive_int
from benchmarks.interrupts import ended_in_order
from benchmarks.record import write_record
from benchmarks.runs import RunFailed, bytes_per_step, check_same, find_mpirun, train
from benchmarks.table import format_number, format_range, format_table

__all__ = ["STUDIES", "Case", "main", "rows_of", "table"]

Flags = dict[str, str | int | float]

_GUESSING = 0.15


@dataclass(frozen=True)
class Case:
    """One of the things compared in a study: how many ranks run it, with which flags."""

    name: str
    ranks: int
    flags: Flags = field(default_factory=dict)


def _softsync(lr: float) -> list[Case]:
    shared: Flags = {"strategy": "server-staleness", "batch-size": 4, "momentum": 0.0, "lr": lr, "steps": 500}
    return [
        Case(f"eta0 = {lr:g}", 17, {**shared, "no-staleness-lr": True}),
        Case(f"eta0 / staleness, eta0 = {lr:g}", 17, shared),
    ]


def _elastic(period: int) -> list[Case]:
    shared: Flags = {"servers": 1, "batch-size": 32, "momentum": 0.0, "lr": 0.1}
    return [
        Case(f"easgd, period {period}", 5, {**shared, "strategy": "easgd", "period": period}),
        Case(
            f"downpour, push and fetch {period}",
            5,
            {**shared, "strategy": "server-async", "push": period, "fetch": period},
        ),
    ]


def _slowed(name: str, ranks: int, flags: Flags) -> list[Case]:
    shared: Flags = {"batch-size": 32, "hidden": "1024,1024", **flags}
    return [Case(name, ranks, shared), Case(f"{name}, straggler", ranks, {**shared, "straggler": "1:3"})]


_MLP_B16: Flags = {"strategy": "local", "batch-size": 16, "hidden": "512,512", "steps": 4000, "log-every": 1000}

STUDIES: dict[str, list[Case]] = {
    "staleness": [case for lr in (0.01, 0.1) for case in _softsync(lr)],
    "elastic": [case for period in (1, 4, 16, 64) for case in _elastic(period)],
    "slowmo": [
        Case(f"{name}, lr {lr:g}", 4, {"strategy": name, "period": 12, "batch-size": 32, "lr": lr})
        for lr in (0.01, 0.05)
        for name in ("local", "slowmo")
    ],
    "post-local": [
        Case("sync, batch 2048", 4, {"strategy": "sync", "batch-size": 512, "lr": 0.2, "lr-schedule": "step"}),
        Case(
            "post-local, batch 2048",
            4,
            {"strategy": "post-local", "batch-size": 512, "period": 16, "lr": 0.2, "lr-schedule": "step"},
        ),
    ],
    "straggler": [
        *_slowed("sync", 3, {"strategy": "sync"}),
        *_slowed("local, period 8", 3, {"strategy": "local", "period": 8}),
        *_slowed("server-async", 4, {"strategy": "server-async", "servers": 1, "momentum": 0.0}),
        *_slowed("hogwild", 3, {"strategy": "hogwild", "momentum": 0.0}),
    ],
    "cost": [
        Case("no exchange", 2, {**_MLP_B16, "period": 4000}),
        Case("local, period 8", 2, {**_MLP_B16, "period": 8}),
        Case("sync", 2, {**_MLP_B16, "strategy": "sync"}),
    ],
    "all": [
        Case(
            name,
            5 if name.startswith("server") else 4,
            {"strategy": name, "batch-size": 16, **({"period": 50} if name == "diloco" else {})},
        )
        for name in STRATEGIES
    ],
}


def main(arguments: Sequence[str]) -> int:
    """Run the studies, and return the exit status: 0, 1 where a run failed, 2 for bad arguments."""
    rows = []
    try:
        options = _parse(arguments)
        for study, cases in _run_all(options):
            found = rows_of(study, cases)
            print(
                f"{study}: {options.model} on {options.dataset}, {options.seeds} seeds\n\n{table(found)}\n", flush=True
            )
            rows += found
    except ConfigError as problem:
        print(f"strategies: error: {problem}", file=sys.stderr, flush=True)
        return 2
    except RunFailed as problem:
        print(f"strategies: a run {problem}", file=sys.stderr, flush=True)
        return 1
    if options.json is not None:
        shared = {"dataset": options.dataset, "model": options.model}
        write_record(options.json, "strategies", arguments, [{**shared, **row} for row in rows])
    return 0


def rows_of(study: str, cases: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each case, given the summaries of its runs."""
    return [
        {
            "study": study,
            "case": name,
            "strategy": runs[0]["strategy"],
            "workers": runs[0]["workers"],
            "servers": runs[0]["servers"],
            "steps": runs[0]["steps"],
            "epochs": runs[0]["epochs"],
            "test_accuracies": [run["test_accuracy"] for run in runs],
            "train_losses": [run["train_loss"] for run in runs],
            "diverged": sum(_diverged(run) for run in runs),
            "samples_per_second": [run["samples_per_second"] for run in runs],
            "bytes_per_step": bytes_per_step(runs),
            "mean_staleness": [run["mean_staleness"] for run in runs if run.get("mean_staleness") is not None],
        }
        for name, runs in cases.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = [
        "case",
        "workers",
        "epochs",
        "accuracy, %",
        "training loss",
        "diverged",
        "samples/s",
        "kB per step",
        "staleness",
    ]
    lines = [
        [
            row["case"],
            str(row["workers"]),
            format_number(row["epochs"]),
            format_range([100 * accuracy for accuracy in row["test_accuracies"]]),
            format_range([float("inf") if loss is None else loss for loss in row["train_losses"]]),
            f"{row['diverged']}/{len(row['test_accuracies'])}",
            format_range(row["samples_per_second"]),
            format_number(None if row["bytes_per_step"] is None else row["bytes_per_step"] / 1e3),
            format_range(row["mean_staleness"]) if row["mean_staleness"] else "–",
        ]
        for row in rows
    ]
    return format_table(header, lines)


def _diverged(run: Mapping[str, Any]) -> bool:
    return run["train_loss"] is None or run["test_loss"] is None or run["test_accuracy"] < _GUESSING


def _run_all(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """Yield each study with the summaries of its cases, once all its runs are there."""
    total = options.seeds * sum(len(STUDIES[study]) for study in options.studies)
    with tqdm(total=total, unit="run", leave=False, disable=not sys.stderr.isatty()) as bar:
        for study in options.studies:
            summaries: dict[str, list[dict[str, Any]]] = {case.name: [] for case in STUDIES[study]}
            for seed in range(options.seeds):
                for case in STUDIES[study]:
                    bar.set_postfix_str(f"{study}: {case.name}, seed {seed}")
                    summaries[case.name].append(_run(options, study, case, seed))
                    bar.update()
            yield study, summaries


def _run(options: argparse.Namespace, study: str, case: Case, seed: int) -> dict[str, Any]:
    """Train, unless a finished run with these flags is there, and return its summary."""
    name = re.sub(r"[^a-z0-9.]+", "-", case.name.lower())
    folder = options.output / f"{study}-{name}-seed{seed}"
    flags = _flags(options, case, seed)
    if (folder / "summary.json").exists():
        check_same(folder, flags)
    else:
        # What an interrupted run left behind.
        shutil.rmtree(folder, ignore_errors=True)
        train(case.ranks, {**flags, "output": str(folder)}, options.timeout_seconds)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def _flags(options: argparse.Namespace, case: Case, seed: int) -> Flags:
    length: Flags = {} if "steps" in case.flags else {"epochs": options.epochs}
    places: Flags = {} if options.data_dir is None else {"data-dir": str(options.data_dir)}
    fixed: Flags = {"dataset": options.dataset, "model": options.model, "threads": 1, "device": "cpu", "seed": seed}
    return {**fixed, **places, **length, "log-every": 100, **case.flags}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("strategies", "Compare the ways to distribute SGD; it starts mpirun itself.")
    add = parser.add_argument
    add("--studies", default=",".join(STUDIES), metavar="NAMES", help=f"of {', '.join(STUDIES)}")
    add("--dataset", default="fashion-mnist", metavar="NAME", help="data set, as for training")
    add("--data-dir", type=Path, metavar="DIR", help="folder with the data set's files")
    add("--model", default="mlp", metavar="NAME", help="model, as for training")
    add("--epochs", type=positive_int, default=5, metavar="N", help="passes over the training set")
    add("--seeds", type=positive_int, default=3, metavar="N", help="runs of each case, with the seeds 0 to N-1")
    add("--timeout-seconds", type=positive_int, default=900, metavar="N", help="deadline of each run")
    add("--output", type=Path, metavar="DIR", help="folder of the runs; finished ones in it are not run again")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    options.studies = names("--studies", options.studies, tuple(STUDIES))
    check_writable("--json", options.json)
    find_mpirun()
    options.output = options.output or Path("runs") / f"strategies-{options.dataset.replace(':', '.')}-{options.model}"
    return options


if __name__ == "__main__":
    with ended_in_order():
        sys.exit(main(sys.argv[1:]))
