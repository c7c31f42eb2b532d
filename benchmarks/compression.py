"""What does a codec cost in accuracy, and what does it save? `python -m benchmarks.compression`.

Trains the same model with the same seeds, batches and epochs under every codec, each a run of `mpirun -np N python -m
allreduce_sgd.train` as a user starts it, and compares with the runs that compress nothing:

- accuracy        of the final model on the test set; median [min-max] over the seeds
- points          the codec's median accuracy minus that of `none`, in percentage points; `close` says whether it lost
                  no more than 1 point
- kB per step     what a rank sent, counted where it is sent, divided by the steps; `ratio` is that of `none` divided
                  by it. On one node a rank's bytes are those it reads out of its peers' memory
- train s         seconds of training, evaluation excluded

dgc brings its own momentum, so it runs with the optimizer's set to 0 (Lin et al. 2018), and warms up for
`--warmup-steps`.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from allreduce_sgd.compression.options import CODECS
from allreduce_sgd.errors import ConfigError
from benchmarks.arguments import Parser, check_writable, names, positive_int, positive_numbers
from benchmarks.interrupts import ended_in_order
from benchmarks.record import write_record
from benchmarks.runs import RunFailed, bytes_per_step, check_same, find_mpirun, train
from benchmarks.table import format_number, format_range, format_table

__all__ = ["main", "rows_of", "table"]

_CLOSE_POINTS = 1.0
_MOMENTUM = 0.9


def main(arguments: Sequence[str]) -> int:
    """Measure, and return the exit status: 0, 1 where a run failed, 2 for bad arguments."""
    try:
        options = _parse(arguments)
        summaries = _run_all(options)
    except ConfigError as problem:
        print(f"compression: error: {problem}", file=sys.stderr, flush=True)
        return 2
    except RunFailed as problem:
        print(f"compression: a run {problem}", file=sys.stderr, flush=True)
        return 1
    rows = rows_of(summaries)
    shared = {"dataset": options.dataset, "model": options.model, "ranks": options.ranks, "epochs": options.epochs}
    print(
        f"{options.model} on {options.dataset}, {options.ranks} ranks, {options.epochs} epochs, "
        f"{options.seeds} seeds\n\n{table(rows)}"
    )
    if options.json is not None:
        write_record(options.json, "compression", arguments, [{**shared, **row} for row in rows])
    return 0


def rows_of(summaries: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each codec, given the summaries of its runs; `none` must be among them."""
    plain_accuracy = statistics.median(run["test_accuracy"] for run in summaries["none"])
    plain_bytes = bytes_per_step(summaries["none"])
    rows = []
    for codec, runs in summaries.items():
        accuracies = [run["test_accuracy"] for run in runs]
        points = 100 * (statistics.median(accuracies) - plain_accuracy)
        sent_bytes = bytes_per_step(runs)
        rows.append(
            {
                "codec": codec,
                "test_accuracy": statistics.median(accuracies),
                "test_accuracies": accuracies,
                "points": points,
                "close": points >= -_CLOSE_POINTS,
                "bytes_per_step": sent_bytes,
                "ratio": plain_bytes / sent_bytes if plain_bytes and sent_bytes else None,
                "train_seconds": statistics.median(run["train_seconds"] for run in runs),
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["codec", "accuracy, %", "points", "close", "kB per step", "ratio", "train s"]
    lines = [
        [
            row["codec"],
            format_range([100 * accuracy for accuracy in row["test_accuracies"]]),
            f"{row['points']:+.2f}",
            "yes" if row["close"] else "no",
            format_number(None if row["bytes_per_step"] is None else row["bytes_per_step"] / 1e3),
            format_number(row["ratio"]),
            format_number(row["train_seconds"]),
        ]
        for row in rows
    ]
    return format_table(header, lines)


def _run_all(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    todo = [(codec, seed) for seed in range(options.seeds) for codec in options.codecs]
    summaries: dict[str, list[dict[str, Any]]] = {codec: [] for codec in options.codecs}
    with tqdm(todo, unit="run", leave=False, disable=not sys.stderr.isatty()) as bar:
        for codec, seed in bar:
            bar.set_postfix_str(f"{codec}, seed {seed}")
            folder = options.output / f"{codec}-seed{seed}"
            flags = dict(_flags(options, codec, seed))
            if (folder / "summary.json").exists():
                check_same(folder, flags)
            else:
                # What an interrupted run left behind.
                shutil.rmtree(folder, ignore_errors=True)
                train(options.ranks, {**flags, "output": str(folder)}, options.timeout_seconds)
            summaries[codec].append(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    return summaries


def _flags(options: argparse.Namespace, codec: str, seed: int) -> Iterator[tuple[str, str | int | float]]:
    yield "dataset", options.dataset
    if options.data_dir is not None:
        yield "data-dir", str(options.data_dir)
    yield "model", options.model
    yield "epochs", options.epochs
    yield "global-batch-size", options.global_batch_size
    yield "optimizer", "sgd"
    yield "lr", options.lr[0]
    yield "momentum", 0.0 if codec == "dgc" else _MOMENTUM
    yield "threads", 1
    yield "device", "cpu"
    yield "seed", seed
    yield "compression", codec
    if codec == "dgc":
        yield "compression-warmup-steps", options.warmup_steps
    yield "log-every", 100


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("compression", "Compare codecs by final accuracy and bytes sent; it starts mpirun itself.")
    add = parser.add_argument
    add("--codecs", default=",".join(CODECS), metavar="NAMES", help="codecs, separated by commas; none is added")
    add("--dataset", default="digits", metavar="NAME", help="data set, as for training")
    add("--data-dir", type=Path, metavar="DIR", help="folder with the data set's files")
    add("--model", default="mlp", metavar="NAME", help="model, as for training")
    add("--ranks", type=positive_int, default=2, metavar="N", help="ranks of each run, at least 2")
    add("--epochs", type=positive_int, default=5, metavar="N", help="passes over the training set")
    add("--global-batch-size", type=positive_int, default=64, metavar="N", help="samples of all ranks per step")
    add("--lr", type=positive_numbers, default="0.05", metavar="X", help="learning rate")
    add("--warmup-steps", type=positive_int, default=500, metavar="N", help="steps of dgc's warm-up")
    add("--seeds", type=positive_int, default=3, metavar="N", help="runs of each codec, with the seeds 0 to N-1")
    add("--timeout-seconds", type=positive_int, default=900, metavar="N", help="deadline of each run")
    add("--output", type=Path, metavar="DIR", help="folder of the runs; finished ones in it are not run again")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    options.codecs = tuple(dict.fromkeys(("none", *names("--codecs", options.codecs, CODECS))))
    if len(options.lr) != 1:
        raise ConfigError("--lr: give one number")
    if options.ranks < 2:
        raise ConfigError(f"--ranks {options.ranks}: one rank alone sends nothing; give at least 2")
    check_writable("--json", options.json)
    find_mpirun()
    options.output = options.output or Path("runs") / f"compression-{options.dataset.replace(':', '.')}-{options.model}"
    return options


if __name__ == "__main__":
    with ended_in_order():
        sys.exit(main(sys.argv[1:]))
