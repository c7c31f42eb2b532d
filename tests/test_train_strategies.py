"""Every way to distribute SGD, through the trainer as users start it."""

import signal
import time
from pathlib import Path

import pytest

from allreduce_sgd.strategies.options import STRATEGIES
from tests.launching import finish, start
from tests.test_preemption import of_rank
from tests.test_resume import wait_for_step
from tests.test_train import TRAIN, lines_of, summary_of, train, train_all
from tests.warm_start import mpirun

# What each method needs to learn the digits in a few epochs of small mini-batches.
FLAGS = {
    "diloco": ["--period", "20", "--fragments", "2", "--delay", "3"],
    "slowmo": ["--lr", "0.02"],
    "bmuf": ["--period", "4", "--momentum", "0"],
    "adasum": ["--lr", "0.02"],
    "server-async": ["--momentum", "0"],
    "server-staleness": ["--momentum", "0"],
    "hogwild": ["--momentum", "0"],
}
CONSENSUS = {"easgd": "centre", "gossip": "average", "hogwild": "shared", "server-sync": "servers"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every strategy on 3 ranks."""
    folder = tmp_path_factory.mktemp("strategies")
    shared = ["--epochs", "6", "--batch-size", "8"]
    train_all(
        3,
        [["--strategy", name, *shared, *FLAGS.get(name, []), "--output", str(folder / name)] for name in STRATEGIES],
    )
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_learns(trained: Path, strategy: str) -> None:
    summary = summary_of(trained / strategy)
    servers = int(strategy.startswith("server"))
    assert (summary["strategy"], summary["world_size"]) == (strategy, 3)
    assert (summary["workers"], summary["servers"]) == (3 - servers, servers)
    assert summary["test_accuracy"] > 0.9
    assert CONSENSUS.get(strategy, "") in summary["consensus"]
    assert summary["samples"] == 6 * 1438
    logged = [line for line in lines_of(trained / strategy) if line["event"] == "train"]
    samples = [line["samples"] for line in logged]
    assert samples == sorted(samples)
    if strategy != "hogwild":
        causes = logged[-1]["communication"]
        assert sum(figures["bytes"] for figures in causes.values()) > 0
        assert set(causes["evaluation"]) == {"bytes", "seconds", "exposed_seconds"}


@pytest.mark.parametrize(
    ("ranks", "runs"),
    [
        (
            3,
            [
                ["--strategy", "delayed", "--delay", "2"],
                ["--strategy", "diloco", "--period", "6", "--fragments", "2", "--delay", "2"],
                ["--strategy", "local", "--period", "3"],
                ["--strategy", "gossip", "--gossip", "push-sum"],
                ["--strategy", "server-sync", "--server-tree", "1"],
            ],
        ),
        (4, [["--strategy", "server-sync", "--servers", "2"], ["--strategy", "adasum"]]),
    ],
    ids=["3 ranks", "4 ranks"],
)
def test_resumed_in_the_midst_equals_undisturbed_bit_for_bit(tmp_path: Path, ranks: int, runs: list[list[str]]) -> None:
    todo = []
    for number, flags in enumerate(runs):
        shared = [*flags, "--batch-size", "8", "--checkpoint-every", "8"]
        whole, part = str(tmp_path / f"whole{number}"), str(tmp_path / f"part{number}")
        todo.append([*shared, "--steps", "20", "--output", whole])
        todo.append([*shared, "--steps", "8", "--output", part])
        todo.append(["--resume", part, "--steps", "20"])
    train_all(ranks, todo)
    for number, flags in enumerate(runs):
        undisturbed, resumed = (summary_of(tmp_path / f"{name}{number}") for name in ("whole", "part"))
        for key in ("steps", "samples", "parameters_sha256"):
            assert resumed[key] == undisturbed[key], flags


@pytest.mark.parametrize("strategy", ["server-async", "hogwild", "easgd"])
def test_ranks_at_their_own_pace_stop_and_go_on(tmp_path: Path, strategy: str) -> None:
    flags = ["--strategy", strategy, "--model", "tests.parts:slow_model", "--log-every", "1", "--batch-size", "8"]
    if strategy == "easgd":
        flags += ["--servers", "1", "--period", "2"]
    folder = tmp_path / "run"
    process = start(
        3, [*TRAIN, *flags, "--steps", "60", "--output", str(folder)], environment={"TEST_STEP_SECONDS": "0.03"}
    )
    wait_for_step(process, folder, 5)
    # In two of them the last rank serves parameters.
    of_rank(process, 2).send_signal(signal.SIGUSR1)
    stopped = finish(process, time.monotonic(), 60)
    assert stopped.status == 75, stopped.errors
    done = mpirun(3, [*TRAIN, "--resume", str(folder)], environment={"TEST_STEP_SECONDS": "0"})
    assert done.status == 0, done.errors
    summary = summary_of(folder)
    assert summary["steps"] == 60
    workers = 3 if strategy == "hogwild" else 2
    # An epoch has 1438.
    assert (summary["workers"], summary["samples"]) == (workers, min(60 * 8 * workers, 1438))


def test_a_straggler_holds_up_only_those_who_wait_for_it(tmp_path: Path) -> None:
    shared = ["--model", "tests.parts:slow_model", "--steps", "30", "--batch-size", "8"]
    pace = {"TEST_STEP_SECONDS": "0.03"}

    def seconds(name: str, ranks: int, *flags: str) -> float:
        summary = train(ranks, tmp_path / name, *shared, *flags, environment=pace)
        return float(summary["train_seconds"])

    sync = seconds("sync", 2, "--straggler", "1:4")
    free = seconds("free", 3, "--strategy", "server-async", "--momentum", "0", "--straggler", "1:4")
    # 30 steps of a straggler take 3.6 s of sleep; shared out to whoever is free they take less than half of that.
    assert sync > 3.6
    assert free < 0.75 * sync


def test_the_noise_scale_is_told(tmp_path: Path) -> None:
    summary = train(2, tmp_path / "run", "--epochs", "4", "--noise-scale", "1", "--batch-size", "8")
    assert summary["noise_scale"] > 0
    assert summary["recommended_batch_size"] >= 1
    lines = [line for line in lines_of(tmp_path / "run") if line["event"] == "train"]
    assert any(line.get("gradient_noise_scale") for line in lines)
