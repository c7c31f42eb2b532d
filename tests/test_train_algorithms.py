"""Training with every all-reduce algorithm. A launcher takes seconds, so one job trains many times in turn."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from allreduce_sgd.checkpoint import find
from allreduce_sgd.comm.choice import Choice
from allreduce_sgd.comm.options import ALGORITHMS
from tests.test_train import summary_of
from tests.warm_start import mpirun

# Calls the program's main once for every list of arguments; beforehand rank 0 puts the given value as
# library_up_to_bytes into all files of measured costs. Rank 0 writes what each call printed and returned.
TRAINS = """
import contextlib, io, json, os, pathlib, sys
from allreduce_sgd.train import main
from allreduce_sgd.topology import discover
runs, results = json.loads(sys.argv[1]), []
topology = discover(need_mpi=True, timeout_seconds=60.0)
for library_bytes, arguments in runs:
    if library_bytes is not None and topology.rank == 0:
        for file in pathlib.Path(os.environ["XDG_CACHE_HOME"]).glob("allreduce_sgd/*.json"):
            file.write_text(json.dumps({**json.loads(file.read_text()), "library_up_to_bytes": library_bytes}))
    topology.gather_all(None)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(arguments)
    results.append([status, out.getvalue(), errors.getvalue()])
everyones = topology.gather_all(results)
if topology.rank == 0:
    print(json.dumps(everyones))
"""

SHORT = ["--model", "tests.test_train_algorithms:many_layers", "--steps", "4", "--batch-size", "8", "--seed", "5"]
# Eight buckets of odd sizes.
SHORT += ["--bucket-mb", "0.03", "--first-bucket-mb", "0.003"]


def many_layers(classes: int) -> nn.Module:
    """A model of 26 tensors, some 55,000 parameters in all."""
    inner = [layer for _ in range(11) for layer in (nn.Linear(67, 67), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 67), nn.ReLU(), *inner, nn.Linear(67, classes))


@dataclass(frozen=True)
class Run:
    """What a call of main gave: its exit status, and all that all ranks printed."""

    status: int
    output: str
    errors: str


def train_in_turn(
    ranks: int, folder: Path, runs: Sequence[Sequence[str]], library_bytes: Sequence[int | None] = ()
) -> list[Run]:
    calls = [[limit, run] for limit, run in zip([*library_bytes] or [None] * len(runs), runs, strict=True)]
    done = mpirun(ranks, ["-c", TRAINS, json.dumps(calls)], environment={"XDG_CACHE_HOME": str(folder / "cache")})
    assert done.status == 0, done.errors
    everyones: list[list[list[Any]]] = json.loads(done.output.splitlines()[-1])
    made = []
    for per_rank in zip(*everyones, strict=True):
        assert len({status for status, _, _ in per_rank}) == 1
        made.append(Run(per_rank[0][0], "".join(out for _, out, _ in per_rank), "".join(err for *_, err in per_rank)))
    return made


def run_flags(folder: Path, name: str, *flags: str) -> list[str]:
    return [*SHORT, "--output", str(folder / name), *flags]


def bucket_lines(run: Run) -> list[str]:
    return [line for line in run.output.splitlines() if line.startswith("bucket ")]


def test_two_ranks_come_to_the_same_bits_by_every_algorithm(tmp_path: Path) -> None:
    flags: list[tuple[str, ...]] = [("--algorithm", name, "--verbose") for name in ALGORITHMS]
    flags += [("--deterministic", "--algorithm", name, "--verbose") for name in ("auto", "chain")]
    refused = [("--deterministic", "--algorithm", name) for name in ("ring", "segmented-ring", "mpi")]
    runs = train_in_turn(2, tmp_path, [run_flags(tmp_path, " ".join(each), *each) for each in [*flags, *refused]])
    for each, run in zip(flags, runs, strict=False):
        assert (run.status, run.errors) == (0, ""), each
    summaries = [summary_of(tmp_path / " ".join(each)) for each in flags]
    # The sum of two has one order.
    assert len({summary["parameters_sha256"] for summary in summaries}) == 1
    for each, run, summary in zip(flags, runs, summaries, strict=False):
        name = each[each.index("--algorithm") + 1]
        assert summary["algorithm"] == ("shared-memory" if name == "auto" else name)
        assert summary["communication_bytes"] > 0
        lines = bucket_lines(run)
        assert len(lines) > 3
        for index, line in enumerate(lines):
            pattern = rf"bucket {index}: [\d,]+ bytes by {'(mpi|shared-memory)' if name == 'auto' else name}\b.*"
            assert re.fullmatch(pattern, line), line
        assert ("alpha µs" in run.output) == (each == ("--algorithm", "auto", "--verbose"))
    for each, run in zip(refused, runs[len(flags) :], strict=True):
        assert run.status == 2
        line = rf"allreduce-sgd: error: --deterministic: {each[2]} adds in an order .* choose --algorithm auto, .*\n"
        assert re.fullmatch(line, run.errors), run.errors
        assert not (tmp_path / " ".join(each)).exists()


def test_deterministic_bits_do_not_depend_on_buckets(tmp_path: Path) -> None:
    cuts = [("25", "1"), ("0.03", "0.003")]
    algorithms = ["auto", "halving-doubling"]
    flags: list[tuple[str, ...]] = [
        ("--deterministic", "--algorithm", name, "--bucket-mb", most, "--first-bucket-mb", first, "--verbose")
        for name in algorithms
        for most, first in cuts
    ]
    # The bits could differ, as these show.
    flags += [("--algorithm", "ring", "--bucket-mb", most, "--first-bucket-mb", first) for most, first in cuts]
    runs = train_in_turn(3, tmp_path, [run_flags(tmp_path, " ".join(each), *each) for each in flags])
    assert [run.status for run in runs] == [0] * len(flags)
    hashes: dict[str, set[str]] = {}
    for each in flags:
        name = each[each.index("--algorithm") + 1]
        hashes.setdefault(name, set()).add(summary_of(tmp_path / " ".join(each))["parameters_sha256"])
    assert {name: len(different) for name, different in hashes.items()} == {
        **dict.fromkeys(algorithms, 1),
        "ring": len(cuts),
    }
    assert len({tuple(bucket_lines(run)) for run in runs[: len(cuts)]}) == len(cuts)


def test_a_resumed_run_keeps_its_table(tmp_path: Path) -> None:
    always, never = 2**30, 0
    steps = {
        "warm-up": run_flags(tmp_path, "warm-up"),
        "first": run_flags(tmp_path, "first", "--verbose"),
        "resumed": ["--resume", str(tmp_path / "first"), "--steps", "6", "--verbose"],
        "new": run_flags(tmp_path, "new", "--verbose"),
        "on its own": [
            *("--resume", str(tmp_path / "first"), "--output", str(tmp_path / "own")),
            *("--steps", "8", "--verbose", "--algorithm", "auto"),
        ],
        "tree": [
            *("--resume", str(tmp_path / "first"), "--output", str(tmp_path / "tree")),
            *("--steps", "8", "--verbose", "--algorithm", "tree"),
        ],
    }
    limits = [None, never, always, always, always, always]
    runs = dict(zip(steps, train_in_turn(2, tmp_path, list(steps.values()), limits), strict=True))
    for name, run in runs.items():
        assert (run.status, run.errors) == (0, ""), name
    used = {name: {line.split(" bytes by ")[1] for line in bucket_lines(run)} for name, run in runs.items()}
    assert used["first"] == {"shared-memory"}
    # Costs that have changed meanwhile change a new run, or one that is told to choose again, but not a resumed one.
    assert used["resumed"] == {"shared-memory"}
    assert used["new"] == used["on its own"] == {"mpi"}
    assert used["tree"] == {"tree"}
    for name, folder in (("shared-memory", "first"), ("mpi", "new"), ("mpi", "own"), ("tree", "tree")):
        saved = find(tmp_path / folder).shared()
        assert Choice.from_lists(saved["algorithm_table"]).for_message(100_000).algorithm == name
