"""A run that pauses goes on as if it had not, also where its learning rate depends on the end."""

import json
from pathlib import Path

import pytest

from allreduce_sgd.command_line import parse
from allreduce_sgd.errors import ConfigError
from tests.warm_start import mpirun, python

PROGRAM = """
import sys
from allreduce_sgd.train import main

def trained(*flags):
    return main(sys.argv[1:] + list(flags))

def resumed(*flags):
    return main(["--resume", "parts", *flags])

statuses = [trained("--output", "whole"), trained("--output", "parts", PAUSE)]
statuses += [resumed(PAUSE), resumed()]
assert statuses == [0, 75, 75, 0], statuses
"""
FLAGS = ["--model", "linear", "--lr-schedule", "cosine", "--log-every", "2", "--device", "cpu", "--threads", "1"]


def evaluations(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["event"] == "evaluation"]


def hashes(tmp_path: Path) -> set[str]:
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts")]
    assert len({summary["test_loss"] for summary in summaries}) == 1
    return {summary["parameters_sha256"] for summary in summaries}


def test_a_paused_run_comes_to_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    program = PROGRAM.replace("PAUSE", "'--pause-after-steps=3'")
    flags = [*FLAGS, "--steps", "7", "--evaluate-every", "2"]
    done = python(["-c", program, *flags], cwd=tmp_path)
    assert (done.status, done.errors) == (0, "")
    assert len(hashes(tmp_path)) == 1
    assert evaluations(tmp_path / "whole") == [2, 4, 6, 7]
    assert evaluations(tmp_path / "parts") == [2, 3, 4, 6, 7]
    # What the pause was is of no concern to who runs the configuration again.
    assert "\npause" not in (tmp_path / "parts" / "config.toml").read_text()


def test_epochs_count_at_any_mini_batch_and_ranks_pause_together(tmp_path: Path) -> None:
    program = PROGRAM.replace("PAUSE", "'--pause-after-epochs=1'")
    flags = [*FLAGS, "--epochs", "2", "--batch-size", "256", "--strategy", "local", "--period", "2"]
    done = mpirun(2, ["-c", program, *flags], cwd=tmp_path)
    assert (done.status, done.errors) == (0, "")
    assert len(hashes(tmp_path)) == 1
    assert evaluations(tmp_path / "parts") == [3, 6]


def test_ranks_at_their_own_pace_pause_at_the_step(tmp_path: Path) -> None:
    program = PROGRAM.replace("PAUSE", "'--pause-after-steps=4'")
    flags = [*FLAGS, "--steps", "6", "--strategy", "server-async", "--evaluate-every", "3", "--lr", "0.01"]
    done = mpirun(2, ["-c", program, *flags], cwd=tmp_path)
    assert (done.status, done.errors) == (0, "")
    assert evaluations(tmp_path / "parts") == [3, 4, 6]


def test_one_pause_is_enough() -> None:
    with pytest.raises(ConfigError, match="--pause-after-steps and --pause-after-epochs: give one of the two"):
        parse(["--pause-after-steps", "2", "--pause-after-epochs", "1"])
