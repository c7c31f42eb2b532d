"""Virtual ranks through the trainer: one training on any number of ranks, and what cannot be combined with them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from allreduce_sgd.checkpoint import find
from allreduce_sgd.checks import check_virtual_ranks
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.config import Config, config_from
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.resume import differences, resumed_config
from allreduce_sgd.train import main
from tests.test_train import summary_of, train_all

# 23 steps are an epoch of 1438 samples, of which the last mini-batch has 30: shards of unequal size.
SHARED = ["--threads", "1", "--global-batch-size", "64", "--clip-norm", "1", "--hidden", "48,48"]
RUNS = {
    "4": ["--virtual-ranks", "4", "--dropout", "0.3", "--steps", "26"],
    "6": ["--virtual-ranks", "6", "--dropout", "0.3", "--steps", "26"],
    "8": ["--virtual-ranks", "8", "--dropout", "0.3", "--steps", "26", "--bucket-mb", "0.01", "--check-sync", "5"],
    "norm": ["--virtual-ranks", "4", "--model", "tests.parts:slow_model", "--steps", "26", "--lr", "0.2"],
}
RUNS["8"] += ["--swa", "0.5"]
RUNS["norm"] += ["--ema", "0.9"]


def runs(folder: Path, ranks: int, *names: str) -> list[list[str]]:
    return [[*SHARED, *RUNS[name], "--output", str(folder / f"{name} on {ranks}")] for name in names]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs on 1 to 4 ranks; one of them was resumed from 4 ranks on 2, and from 2 on 1."""
    folder = tmp_path_factory.mktemp("virtual")
    part = str(folder / "part")
    train_all(4, [*runs(folder, 4, "4", "8", "norm"), [*SHARED, *RUNS["norm"], "--steps", "9", "--output", part]])
    train_all(2, [*runs(folder, 2, "4", "6", "norm"), ["--resume", part, "--steps", "17"]])
    train_all(3, runs(folder, 3, "6"))
    train_all(1, [*runs(folder, 1, "4", "6", "8", "norm"), ["--resume", part, "--steps", "26"]])
    return folder


@pytest.mark.parametrize(
    ("name", "ranks"), [("4", [2, 4]), ("6", [2, 3]), ("8", [4]), ("norm", [2, 4])], ids=["4", "6", "8", "norm"]
)
def test_the_bits_do_not_depend_on_the_number_of_ranks(trained: Path, name: str, ranks: list[int]) -> None:
    alone = summary_of(trained / f"{name} on 1")
    assert alone["test_accuracy"] > 0.5
    for number in ranks:
        other = summary_of(trained / f"{name} on {number}")
        assert other["world_size"] == number
        for key in ("parameters_sha256", "steps", "samples", "test_accuracy", "virtual_ranks", "global_batch_size"):
            assert other[key] == alone[key]
        # The same numbers, added up in another order in float64.
        for key in ("test_loss", "train_loss"):
            assert other[key] == pytest.approx(alone[key], rel=1e-12)


def test_other_numbers_of_virtual_ranks_round_otherwise(trained: Path) -> None:
    digests = [summary_of(trained / f"{name} on 1")["parameters_sha256"] for name in ("4", "6", "8")]
    assert len(set(digests)) == 3


def test_a_run_resumed_on_other_ranks_comes_to_the_same_end(trained: Path) -> None:
    resumed, undisturbed = summary_of(trained / "part"), summary_of(trained / "norm on 4")
    assert resumed["world_size"] == 1
    for key in ("parameters_sha256", "steps", "samples", "test_accuracy"):
        assert resumed[key] == undisturbed[key]


def test_resuming_on_other_ranks_is_not_said_to_change_bits_but_other_threads_are(trained: Path) -> None:
    saved = find(trained / "norm on 4").shared()
    config = resumed_config(config_from({}), frozenset(), saved, same_size=False)
    threads = torch.get_num_threads()
    assert differences({**saved, "threads": threads}, config, SingleCommunicator()) == ""
    told = differences({**saved, "threads": threads + 1}, config, SingleCommunicator())
    assert told == f" (sums will round differently: threads {threads + 1} -> {threads})"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--strategy", "local"], "--virtual-ranks: --strategy local has no use for it, only sync"),
        (["--shard-optimizer"], "--shard-optimizer: it cannot be combined with --virtual-ranks 4"),
        (["--compression", "sign"], "--compression: it cannot be combined with --virtual-ranks 4"),
        (["--accumulate", "2"], "--accumulate: it cannot be combined with --virtual-ranks 4"),
        (["--noise-scale", "5"], "--noise-scale: it cannot be combined with --virtual-ranks 4"),
        (["--resync-every", "5"], "--resync-every: it cannot be combined with --virtual-ranks 4"),
        (["--sync-batch-norm"], "--sync-batch-norm: it cannot be combined with --virtual-ranks 4"),
        (["--buffers", "average"], "--buffers: it cannot be combined with --virtual-ranks 4"),
        (["--static-graph"], "--static-graph: it cannot be combined with --virtual-ranks 4"),
        (["--global-batch-size", "3"], "--virtual-ranks 4: a mini-batch has only 3 samples; choose at most 3"),
        (["--batch-size", "400"], "--batch-size 400: the mini-batch of 4 virtual ranks has 1600 samples"),
        (["--virtual-ranks", "0"], "--virtual-ranks: 0 is out of range; it must be at least 1"),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_what_cannot_be_combined_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str], text: str
) -> None:
    virtual = [] if "--virtual-ranks" in flags else ["--virtual-ranks", "4"]
    assert main([*virtual, *flags, "--output", str(tmp_path / "run")]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1
    assert text in errors[0]
    assert not (tmp_path / "run").exists()


def test_ranks_must_divide_virtual_ranks() -> None:
    def config(virtual_ranks: Any) -> Config:
        return config_from({"virtual-ranks": virtual_ranks})

    with pytest.raises(ConfigError, match="--virtual-ranks 4: 3 ranks cannot share them out; choose a multiple of 3"):
        check_virtual_ranks(config(4), 3)
    check_virtual_ranks(config(6), 3)
    check_virtual_ranks(config(None), 3)
