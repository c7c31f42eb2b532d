"""--check-finite and --check-sync end all ranks with status 1, the cause named once; other flags of the engine."""

import re
from pathlib import Path

import pytest

from allreduce_sgd.command_line import parse
from tests.test_train import TRAIN, lines_of, summary_of, train_all
from tests.warm_start import mpirun


def failing(folder: Path, ranks: int, model: str, *flags: str) -> str:
    """Train to the failure, and return what was written to standard error, the cause in the first line."""
    fixed = ["--model", f"tests.parts:{model}", "--batch-size", "8", "--output", str(folder / "run")]
    done = mpirun(ranks, [*TRAIN, *fixed, *flags])
    assert done.status == 1, done.errors
    assert done.errors.count("Traceback") == 1
    assert not (folder / "run" / "summary.json").exists()
    return done.errors.strip()


@pytest.mark.parametrize("flags", [["--bucket-mb", "0.001"], ["--strategy", "local"]])
def test_check_finite_names_parameter_rank_and_step(tmp_path: Path, flags: list[str]) -> None:
    errors = failing(tmp_path, 3, "nan_gradient_model", "--check-finite", *flags)
    what = "the gradient of head.bias of rank 1" if "local" in flags else "the gradient of rank 1: head.bias"
    told = rf"^rank \d of 3 on \S+: NonFiniteError: step 3: NaN or Inf in {what}$"
    assert len(re.findall(told, errors, re.MULTILINE)) == 1


def test_check_sync_names_the_parameter_and_the_ranks(tmp_path: Path) -> None:
    # With shared parameters all ranks see what one writes.
    errors = failing(tmp_path, 3, "drifting_model", "--check-sync", "3", "--no-shard-optimizer")
    told = r"^rank 0 of 3 on \S+: MismatchError: after step 6: ranks no longer hold the same model: parameter "
    told += r"'head\.weight' differs \(digests: ranks 0, 2: \w{16}; rank 1: \w{16}\), no other of the 4 compared$"
    assert len(re.findall(told, errors, re.MULTILINE)) == 1


EQUAL = [
    ["--model", "resnet20", "--sync-batch-norm", "--buffers", "average", "--shard-optimizer"],
    ["--model", "cnn", "--compression", "powersgd", "--compression-rank", "1", "--shard-optimizer"],
    ["--strategy", "local", "--period", "2", "--compression", "int8", "--error-feedback", "--check-finite"],
    ["--optimizer", "adam", "--shard-optimizer", "--algorithm", "ring", "--static-graph", "--clip-norm", "1"],
    ["--model", "tests.parts:sparse_model", "--momentum", "0", "--backend", "gloo"],
]


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each of EQUAL, by its place there, on 3 ranks."""
    folder = tmp_path_factory.mktemp("equal")
    shared = ["--steps", "8", "--check-sync", "1"]
    train_all(3, [[*shared, *flags, "--output", str(folder / str(place))] for place, flags in enumerate(EQUAL)])
    return folder


@pytest.mark.parametrize("place", range(len(EQUAL)), ids=[" ".join(flags) for flags in EQUAL])
def test_three_ranks_stay_equal(equal: Path, place: int) -> None:
    summary = summary_of(equal / str(place))
    assert summary["sharded_optimizer"] == ("--shard-optimizer" in EQUAL[place])
    first = next(line["loss"] for line in lines_of(equal / str(place)) if line["event"] == "train")
    assert summary["test_loss"] < 2 * first


def test_deep_gradient_compression_takes_the_momentum_from_the_optimizer() -> None:
    assert parse(["--compression", "dgc"])[0].optimizer.momentum == 0.0
    assert parse(["--compression", "dgc", "--optimizer", "adam"])[0].optimizer.momentum is None
    assert parse(["--compression", "top-k"])[0].optimizer.momentum is None
