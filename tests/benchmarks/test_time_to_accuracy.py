import json
import math
from pathlib import Path

import pytest

from benchmarks.runs import Cell, outcome_of
from benchmarks.time_to_accuracy import main
from tests.launching import find_mpirun

CELL = Cell("serial", "sync", 1, 1, 10, 0.1)


def write_run(folder: Path, accuracies: list[float]) -> None:
    """The files of a run that evaluated every 10 samples, which took a second of training and one of evaluation."""
    lines = [{"event": "train", "step": 1, "loss": 1.0}]
    for index, accuracy in enumerate(accuracies, start=1):
        times = {"train_seconds": float(index), "wall_seconds": 2.0 * index}
        lines.append({"event": "evaluation", "step": index, "samples": 10 * index, "test_accuracy": accuracy, **times})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "summary.json").write_text(json.dumps({"communication_bytes": 8, "samples_per_second": 10.0}))


def test_the_first_evaluation_at_the_target_counts(tmp_path: Path) -> None:
    write_run(tmp_path, [0.5, 0.9, 0.8, 0.95])
    outcome = outcome_of(tmp_path, CELL, seed=3, target_accuracy=0.9)
    assert outcome.reached
    assert (outcome.seconds, outcome.wall_seconds, outcome.samples, outcome.steps) == (2.0, 4.0, 20, 2)
    assert outcome.sent_bytes == 8
    assert len(outcome.evaluations) == 4


def test_a_missed_target_is_infinite(tmp_path: Path) -> None:
    write_run(tmp_path, [0.5])
    outcome = outcome_of(tmp_path, CELL, seed=3, target_accuracy=0.9)
    assert not outcome.reached
    assert outcome.seconds == outcome.samples == outcome.sent_bytes == math.inf


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ranks", "0,2"],
        ["--strategies", "sync,guessing"],
        ["--evaluate-every", "100"],
        ["--target-accuracy", "1.5"],
        ["--lr", "0.1,none"],
        ["--plot", "/no/such/folder/plot.png"],
        ["--unheard-of"],
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert arguments[0] in captured.err


def test_what_training_refuses_is_one_line_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--dataset", "nothing", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_small_grid_runs_once_and_is_read_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    find_mpirun()
    record, plot, runs = tmp_path / "record.json", tmp_path / "plot.png", tmp_path / "runs"
    flags = "--dataset synthetic:320,8,4 --hidden 16 --ranks 2 --strategies sync --global-batch-size 32 --epochs 2 "
    flags += "--evaluate-every 64 --seeds 1 --target-accuracy 0.2"
    arguments = [*flags.split(), "--output", str(runs), "--json", str(record), "--plot", str(plot)]
    assert main(arguments) == 0
    assert "sync, 2 ranks" in capsys.readouterr().out
    (row,) = json.loads(record.read_text())["rows"]
    assert row["reached"]
    assert (row["contender"], row["ranks"], row["samples"], row["steps"]) == ("allreduce_sgd", 2, 64, 2)
    assert row["bytes"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")

    (folder,) = runs.iterdir()
    changed = (folder / "summary.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (folder / "summary.json").stat().st_mtime_ns == changed
    capsys.readouterr()
    assert main([*arguments, "--epochs", "3"]) == 2
    assert "--epochs" in capsys.readouterr().err
