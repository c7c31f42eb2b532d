"""The studies of strategies: what they make of the summaries of runs, their cases, and what they refuse."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from allreduce_sgd.command_line import parse
from allreduce_sgd.config import to_toml
from benchmarks import strategies
from benchmarks.strategies import STUDIES, Case, main, rows_of, table


def summary(accuracy: float, loss: float | None, sent_bytes: int | None = 4000, **more: Any) -> dict[str, Any]:
    return {
        "strategy": "local",
        "workers": 2,
        "servers": 0,
        "steps": 100,
        "epochs": 2.0,
        "test_accuracy": accuracy,
        "test_loss": loss,
        "train_loss": loss,
        "samples_per_second": 10.0,
        "communication_bytes": sent_bytes,
        **more,
    }


def words(flag: str, value: Any) -> list[str]:
    return [f"--{flag}"] if value is True else [f"--{flag}", str(value)]


def test_runs_that_are_no_better_than_guessing_have_diverged() -> None:
    (row,) = rows_of("a study", {"a case": [summary(0.9, 0.1), summary(0.1, 2.3), summary(0.9, None)]})
    assert row["diverged"] == 2
    assert row["bytes_per_step"] == 40
    assert row["test_accuracies"] == [0.9, 0.1, 0.9]
    (_, _, line) = table([row]).splitlines()
    assert "2/3" in line
    assert line.split()[-1] == "–"


def test_staleness_and_bytes_are_told_where_they_are_known() -> None:
    (row,) = rows_of("a study", {"a case": [summary(0.9, 0.1, None, mean_staleness=1.5)]})
    assert row["bytes_per_step"] is None
    assert row["mean_staleness"] == [1.5]
    assert table([row]).splitlines()[2].split()[-1] == "1.50"


def test_the_cases_of_all_studies_are_flags_that_training_takes() -> None:
    for cases in STUDIES.values():
        for case in cases:
            words = [
                word
                for flag, value in case.flags.items()
                for word in ([f"--{flag}"] if value is True else [f"--{flag}", str(value)])
            ]
            config, _ = parse(words)
            assert config.strategy.strategy == case.flags["strategy"]
        assert len({case.name for case in cases}) == len(cases)


def test_finished_runs_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def train(ranks: int, flags: Mapping[str, Any], timeout_seconds: int) -> None:
        folder = Path(flags["output"])
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary(0.9, 0.1)))
        (folder / "config.toml").write_text(
            to_toml(parse([word for flag in flags for word in words(flag, flags[flag])])[0])
        )
        started.append(f"{ranks} {flags['strategy']} {flags['seed']}")

    cases = [Case("one", 2, {"strategy": "sync"}), Case("two", 3, {"strategy": "local"})]
    monkeypatch.setattr(strategies, "STUDIES", {"small": cases})
    monkeypatch.setattr(strategies, "train", train)
    record = tmp_path / "record.json"
    arguments = ["--studies", "small", "--seeds", "2", "--output", str(tmp_path / "runs"), "--json", str(record)]
    assert main(arguments) == 0
    assert started == ["2 sync 0", "3 local 0", "2 sync 1", "3 local 1"]
    assert main(arguments) == 0
    assert len(started) == 4
    assert main([*arguments, "--epochs", "7"]) == 2
    assert "has --epochs 5, not 7; name another folder" in capsys.readouterr().err
    rows = json.loads(record.read_text())["rows"]
    assert [row["case"] for row in rows] == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--studies", "magic"], "--studies: unknown value 'magic'"),
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
