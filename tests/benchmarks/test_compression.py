"""The comparison of codecs: what it makes of the summaries of runs, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from allreduce_sgd.command_line import parse
from allreduce_sgd.config import to_toml
from benchmarks.compression import main, rows_of, table
from benchmarks.runs import Flags, words


def summary(accuracy: float, sent_bytes: int | None, seconds: float = 10.0) -> dict[str, Any]:
    return {"test_accuracy": accuracy, "communication_bytes": sent_bytes, "steps": 100, "train_seconds": seconds}


def test_codecs_are_compared_with_the_runs_that_compress_nothing() -> None:
    runs = {
        "none": [summary(0.90, 4000), summary(0.88, 4000), summary(0.89, 4000)],
        "fp16": [summary(0.885, 2000), summary(0.89, 2000), summary(0.80, 2000, 30.0)],
        "sign": [summary(0.879, 125), summary(0.879, 125), summary(0.95, 125)],
    }
    rows = {row["codec"]: row for row in rows_of(runs)}
    assert rows["none"]["points"] == 0
    assert rows["none"]["ratio"] == 1
    assert rows["fp16"]["points"] == pytest.approx(-0.5)
    assert rows["fp16"]["close"]
    assert rows["fp16"]["bytes_per_step"] == 20
    assert rows["fp16"]["ratio"] == 2
    assert rows["fp16"]["train_seconds"] == 10
    assert rows["sign"]["points"] == pytest.approx(-1.1)
    assert not rows["sign"]["close"]
    lines = table(list(rows.values())).splitlines()
    assert lines[3].split()[0] == "fp16"
    assert "-0.50" in lines[3]
    assert lines[4].split()[4] == "no"


def test_back_ends_that_count_no_bytes_have_no_ratio() -> None:
    (none, cast) = rows_of({"none": [summary(0.9, None)], "fp16": [summary(0.9, None)]})
    assert none["bytes_per_step"] is None
    assert cast["ratio"] is None
    assert "–" in table([none, cast])


def test_runs_with_other_flags_are_not_taken_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def train(ranks: int, flags: Flags, timeout_seconds: int) -> None:
        folder = Path(str(flags["output"]))
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(to_toml(parse(words(flags))[0]))
        (folder / "summary.json").write_text(json.dumps(summary(0.9, 4000)))
        started.append(folder.name)

    monkeypatch.setattr("benchmarks.compression.train", train)
    monkeypatch.setenv("MPIRUN", "true")
    arguments = ["--codecs", "none,fp16", "--seeds", "1", "--output", str(tmp_path / "out")]
    assert main(arguments) == main(arguments) == 0
    assert started == ["none-seed0", "fp16-seed0"]
    assert main([*arguments, "--epochs", "3"]) == 2
    assert "--epochs" in capsys.readouterr().err.splitlines()[-1]
    assert len(started) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--codecs", "zip"], "--codecs: unknown value 'zip'"),
        (["--ranks", "1"], "--ranks 1: one rank alone sends nothing"),
        (["--lr", "0.1,0.2"], "--lr: give one number"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1
