"""Kill and resume: bit-identical on the same ranks, the same samples on others."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launching import finish, mpirun, start
from tests.test_train import TRAIN, lines_of, summary_of, train

SLOW = ["--model", "tests.parts:slow_model", "--checkpoint-every", "7", "--log-every", "1", "--batch-size", "16"]


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def kill_between_steps(ranks: int, folder: Path, flags: list[str], after_step: int) -> None:
    """Train until `after_step` has been logged, then kill -9 the launcher and every rank."""
    process = start(ranks, [*TRAIN, *flags, "--output", str(folder)], environment={"TEST_STEP_SECONDS": "0.05"})
    wait_for_step(process, folder, after_step)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.send_signal(signal.SIGKILL)
    assert finish(process, time.monotonic(), 30).status != 0
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "adam", "--lr-schedule", "cosine"],
        ["--strategy", "local", "--period", "5", "--momentum", "0.9"],
    ],
    ids=["sync", "local"],
)
def test_killed_and_resumed_equals_undisturbed_bit_for_bit(tmp_path: Path, flags: list[str]) -> None:
    # 45 steps are two epochs of 45 steps at 2 x 16 samples less some: the end lies within an epoch.
    flags = [*SLOW, *flags, "--steps", "40"]
    whole = train(2, tmp_path / "whole", *flags)
    kill_between_steps(2, tmp_path / "killed", flags, after_step=17)
    done = mpirun(2, [*TRAIN, "--resume", str(tmp_path / "killed")])
    assert done.status == 0, done.errors
    assert "at step 14" in done.output
    resumed = summary_of(tmp_path / "killed")
    assert resumed["parameters_sha256"] == whole["parameters_sha256"]
    for key in ("steps", "samples", "train_loss", "test_loss", "test_accuracy"):
        assert resumed[key] == whole[key]
    steps = [line["step"] for line in lines_of(tmp_path / "killed") if line["event"] == "train"]
    assert steps == list(range(1, 41))


# In a ring the order of summation depends on where in a bucket a gradient lies.
ORDERED = ["--model", "tests.parts:last_declared_first", "--algorithm", "ring", "--no-shard-optimizer"]


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (3, [*ORDERED, "--bucket-mb", "0.03", "--first-bucket-mb", "0.01"]),
        (2, ["--compression", "top-k", "--compression-ratio", "0.05"]),
    ],
    ids=["order of buckets", "residuals"],
)
def test_from_an_earlier_checkpoint_the_same_bits_come_out(tmp_path: Path, ranks: int, flags: list[str]) -> None:
    flags = [*flags, "--steps", "12", "--checkpoint-every", "5"]
    whole = train(ranks, tmp_path / "whole", *flags)
    checkpoint = str(tmp_path / "whole" / "checkpoints" / "step-00000005")
    done = mpirun(ranks, [*TRAIN, "--resume", checkpoint, "--output", str(tmp_path / "resumed")])
    assert (done.status, done.errors) == (0, "")
    assert summary_of(tmp_path / "resumed")["parameters_sha256"] == whole["parameters_sha256"]
    if "--compression" in flags:
        told = refused(tmp_path / "whole", "--bucket-mb", "1", "--steps", "14")
        assert "--bucket-mb 1.0: the run being resumed has 25.0; start a new run to change it" in told
        done = mpirun(1, [*TRAIN, "--resume", checkpoint, "--output", str(tmp_path / "alone")])
        assert done.status == 0, done.errors
        assert "what compression had left to send is lost: it belonged to other ranks" in done.output


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines_of(folder) if line["event"] == "train"}


@pytest.mark.parametrize("strategy", ["sync", "local"])
def test_on_other_ranks_it_goes_on_at_the_same_samples(tmp_path: Path, strategy: str) -> None:
    flags = ["--batch-size", "16", "--log-every", "1", "--strategy", strategy, "--momentum", "0"]
    flags += ["--period", "1"] if strategy == "local" else []
    whole = train(2, tmp_path / "whole", *flags, "--steps", "60")
    train(2, tmp_path / "half", *flags, "--steps", "50")
    for ranks in (1, 3):
        folder = tmp_path / f"on {ranks}"
        done = mpirun(ranks, [*TRAIN, "--resume", str(tmp_path / "half"), "--steps", "60", "--output", str(folder)])
        assert done.status == 0, done.errors
        resumed = summary_of(folder)
        assert (resumed["world_size"], resumed["global_batch_size"]) == (ranks, 32)
        assert resumed["samples"] == whole["samples"]
        assert resumed["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-4)
        for step, loss in losses(folder).items():
            assert step > 50
            assert loss == pytest.approx(losses(tmp_path / "whole")[step], rel=1e-3)
    assert summary_of(tmp_path / "half")["steps"] == 50


def test_another_target_or_end_on_resume_counts(tmp_path: Path) -> None:
    flags = ["--evaluate-every", "10", "--log-every", "7", "--lr-schedule", "linear"]
    short = train(1, tmp_path / "short", *flags, "--steps", "40", "--target-accuracy", "0.5")
    assert short["reached_target"]
    assert short["steps"] < 40
    done = mpirun(1, [*TRAIN, "--resume", str(tmp_path / "short"), "--target-accuracy", "1", "--steps", "80"])
    assert done.status == 0, done.errors
    longer = summary_of(tmp_path / "short")
    assert (longer["steps"], longer["reached_target"]) == (80, False)
    rates = {line["step"]: line["learning_rate"] for line in lines_of(tmp_path / "short") if line["event"] == "train"}
    assert rates[70] == pytest.approx(0.05 * 10 / 80)
    assert all(rate > 0 for step, rate in rates.items() if step < 80)


def test_figures_do_not_depend_on_where_a_run_was_interrupted(tmp_path: Path) -> None:
    flags = ["--log-every", "10", "--checkpoint-every", "7"]
    whole = train(1, tmp_path / "whole", *flags, "--steps", "24")
    train(1, tmp_path / "part", *flags, "--steps", "14")
    done = mpirun(1, [*TRAIN, "--resume", str(tmp_path / "part"), "--steps", "24"])
    assert done.status == 0, done.errors
    assert summary_of(tmp_path / "part")["train_loss"] == whole["train_loss"]
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def refused(folder: Path, *flags: str) -> str:
    done = mpirun(2, [*TRAIN, "--resume", str(folder), *flags])
    assert done.status == 2
    assert len(done.errors.strip().splitlines()) == 1
    return done.errors


def test_what_a_resumed_run_cannot_do_is_refused(tmp_path: Path) -> None:
    flags = ["--checkpoint-every", "5", "--steps", "10"]
    summary: dict[str, Any] = train(2, tmp_path / "run", *flags)
    assert "--lr 0.5: the run being resumed has its default; start a new run to change it" in refused(
        tmp_path / "run", "--lr", "0.5"
    )
    assert "--global-batch-size 32" in refused(tmp_path / "run", "--global-batch-size", "32")
    newest = tmp_path / "run" / "checkpoints" / "step-00000010"
    (newest / "rank-00001.pt").write_bytes((newest / "rank-00001.pt").read_bytes()[:-9])
    told = refused(tmp_path / "run")
    assert f"checkpoint {newest} is truncated: rank-00001.pt" in told
    earlier = told.split("--resume ")[-1].strip()
    assert earlier == str(newest.with_name("step-00000005"))
    # What was offered works, and comes to the same end.
    done = mpirun(2, [*TRAIN, "--resume", earlier])
    assert done.status == 0, done.errors
    assert summary_of(tmp_path / "run")["parameters_sha256"] == summary["parameters_sha256"]
    assert json.loads((newest / "manifest.json").read_text())["step"] == 10
