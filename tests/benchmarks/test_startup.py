"""Where the time goes until the first step, and what `--help` does without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import startup
from benchmarks.startup import main
from tests.launching import ROOT, environment_with

HELP = """
import runpy, sys
sys.argv = ["train", "--help"]
try:
    runpy.run_module("allreduce_sgd.train", run_name="__main__")
except SystemExit as ended:
    assert not ended.code, ended.code
print("imported", *sorted({"torch", "mpi4py", "numpy", "sklearn", "tqdm"} & sys.modules.keys()))
"""


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = environment_with({})
    for name in environment:
        monkeypatch.setenv(name, environment[name])


def test_phases_are_measured_on_all_ranks(
    own_environment: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--rounds", "1", "--json", str(tmp_path / "record.json")]) == 0
    told = capsys.readouterr().out
    rows = {row["phase"]: row for row in json.loads((tmp_path / "record.json").read_text())["rows"]}
    phases = ["launch", "imports", "MPI", "data", "building", "first step"]
    assert list(rows) == [*phases, "total", "help", "interpreter"]
    seconds = {phase: row["median_seconds"] for phase, row in rows.items()}
    assert min(seconds.values()) > 0
    # Each is the maximum over two ranks.
    assert max(seconds[phase] for phase in phases) < seconds["total"] <= sum(seconds[phase] for phase in phases)
    assert [rows[phase]["ranks"] for phase in ("total", "help")] == [2, 1]
    assert all(phase in told for phase in rows)


def test_bad_arguments_are_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "0"]) == 2
    assert capsys.readouterr().err == "startup: error: --rounds: '0' is not a whole number of at least 1\n"


def test_what_training_refuses_is_told_in_a_line(own_environment: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset", "imagenet", "--ranks", "1", "--rounds", "1"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("startup: error: --dataset imagenet: ")
    assert len(errors.splitlines()) == 1


def test_a_command_that_does_not_end_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(startup, "_training", lambda ranks, dataset, timeout_seconds: {})
    monkeypatch.setattr(startup, "_COMMANDS", {"help": ["-c", "import time; time.sleep(60)"]})
    assert main(["--rounds", "1", "--timeout-seconds", "1"]) == 1
    assert capsys.readouterr().err == "startup: a run not finished after 1 s: python -c import time; time.sleep(60)\n"


def test_help_imports_nothing_that_is_slow_to_load() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP], cwd=ROOT, env=environment_with({}), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--dataset" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["imported"]
