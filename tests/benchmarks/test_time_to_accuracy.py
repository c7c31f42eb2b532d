"""Studies as a whole: the budget of every cell, going on after an interruption, and one that really trains."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from allreduce_sgd.command_line import parse
from allreduce_sgd.config import to_toml
from benchmarks.runs import Flags, words
from benchmarks.study import training
from benchmarks.study.results import read_study
from benchmarks.study.training import read_run
from benchmarks.time_to_accuracy import main
from tests.benchmarks.study_runs import cell
from tests.launching import find_mpirun
from tests.warm_start import mpirun

SPEC = """
name = "small"
dataset = "digits"
model = "mlp"
target_accuracy = 0.9
epochs = 2
seeds = 3
evaluate_every_samples = 64
[tuning]
lr = [0.01, 0.02, 0.04]
batch_size = 64
scaling = "linear"
seeds = 2
[grid]
ranks = [2]
strategies = ["sync"]
global_batch_sizes = [64]
[baselines]
serial_batches = [16, 64]
torch_ddp = true
"""
CELLS, TUNING, MEASURED = 4, 4 * 3 * 2, 4 * 3


def write_run(folder: Path, accuracies: list[float], batch: int = 10) -> None:
    """The files of a run that evaluated every 10 steps, which took a second of training and one of evaluation."""
    lines: list[dict[str, Any]] = []
    for index, accuracy in enumerate(accuracies, start=1):
        at = {"step": index, "samples": batch * index, "train_seconds": float(index), "wall_seconds": 2.0 * index}
        lines.append({"event": "train", "loss": 1.0, "communication_bytes": 8 * index, **at})
        lines.append({"event": "evaluation", "test_accuracy": accuracy, "test_loss": None, **at})
    summary = {
        "communication_bytes": 8 * len(accuracies),
        "samples_per_second": 10.0,
        "communication_seconds": 0.5,
        "exposed_communication_seconds": 0.25,
        "train_seconds": float(len(accuracies)),
    }
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "summary.json").write_text(json.dumps(summary))


class FakeTraining:
    """Stands in for mpirun: the rate 0.02 at mini-batch 64 reaches the target soonest. Ends at the run `dies_at`."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.dies_at: int | None = None

    def __call__(self, ranks: int, flags: Flags, timeout_seconds: int, program: str, rate: str | None) -> None:
        folder = Path(str(flags["output"]))
        assert not folder.exists()
        folder.mkdir()
        if len(self.started) == self.dies_at:
            raise KeyboardInterrupt
        self.started.append(f"{program} {ranks} {flags['global-batch-size']} {flags['lr']} {flags['seed']}")
        (folder / "config.toml").write_text(to_toml(parse(words(flags))[0]))
        best = math.isclose(float(flags["lr"]) * 64, 0.02 * int(flags["global-batch-size"]))
        write_run(folder, [0.5, 0.95] if best else [0.5, 0.6, 0.7, 0.95])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    fake = FakeTraining()
    monkeypatch.setattr(training, "train", fake)
    monkeypatch.setenv("MPIRUN", "true")
    return fake


@pytest.fixture
def spec(tmp_path: Path) -> str:
    file = tmp_path / "small.toml"
    file.write_text(SPEC)
    return str(file)


def test_the_first_evaluation_at_the_target_counts(tmp_path: Path) -> None:
    write_run(tmp_path, [0.5, 0.9, 0.8, 0.95])
    run = read_run(tmp_path, ".", cell("serial", 10), "measured", 0.1, 3, target_accuracy=0.9)
    assert run.reached
    assert (run.seconds, run.wall_seconds, run.samples, run.steps) == (2.0, 4.0, 20, 2)
    assert run.bytes == 32
    assert [each.bytes for each in run.evaluations] == [8, 16, 24, 32]
    assert run.final_accuracy == 0.95


def test_a_missed_target_is_infinite(tmp_path: Path) -> None:
    write_run(tmp_path, [0.5])
    run = read_run(tmp_path, ".", cell("serial", 10), "measured", 0.1, 3, target_accuracy=0.9)
    assert not run.reached
    assert run.seconds == run.samples == run.bytes == math.inf


def test_all_cells_are_tuned_alike_before_any_is_measured(
    trained: FakeTraining, spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, record = tmp_path / "out", tmp_path / "record.json"
    assert main([spec, "--output", str(output), "--json", str(record)]) == 0
    told = capsys.readouterr().out
    assert "sync, 2 ranks, batch 64" in told
    assert "edge" not in told
    runs = read_study(output / "results.jsonl").runs
    assert [run.phase for run in runs] == ["tuning"] * TUNING + ["measured"] * MEASURED
    for phase, count in (("tuning", TUNING), ("measured", MEASURED)):
        of_cell = [run.cell for run in runs if run.phase == phase]
        assert {of_cell.count(each) for each in of_cell} == {count // CELLS}
    assert {run.seed for run in runs[:TUNING]} == {1000, 1001}
    assert [run.seed for run in runs[TUNING:]] == [0] * CELLS + [1] * CELLS + [2] * CELLS
    assert {run.cell.label: run.lr for run in runs[TUNING:]} == {
        "serial, batch 16": 0.005,
        "serial, batch 64": 0.02,
        "torch DDP, 2 ranks, batch 64": 0.02,
        "sync, 2 ranks, batch 64": 0.02,
    }
    assert sum(each.startswith("benchmarks.study.torch_ddp 2 64") for each in trained.started) == 6 + 3
    rows = json.loads(record.read_text())["rows"]
    assert len(rows) == MEASURED
    columns = "contender strategy ranks threads global_batch_size lr seed reached seconds wall_seconds samples steps"
    assert {*columns.split(), "bytes", "label", "network", "final_accuracy"} <= set(rows[0])


def test_tuning_may_go_before_and_is_not_done_again(
    trained: FakeTraining, spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [spec, "--output", str(tmp_path / "out")]
    assert main([*flags, "--tune-only"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert next(line for line in told if line.startswith("serial, batch 16")).split()[-2:] == ["0.005", "20"]
    assert len(trained.started) == TUNING
    assert main(flags) == 0
    assert len(trained.started) == TUNING + MEASURED
    assert main([*flags, "--tune-only", "--json", str(tmp_path / "record.json")]) == 2
    assert "--json" in capsys.readouterr().err


def test_an_ended_study_goes_on_where_it_stopped(trained: FakeTraining, spec: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = [spec, "--output", str(output)]
    trained.dies_at = TUNING + 2
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert len(read_study(output / "results.jsonl").runs) == TUNING + 2
    trained.dies_at = None
    assert main(arguments) == 0
    assert len(trained.started) == len(set(trained.started)) == TUNING + MEASURED
    first = (output / "results.jsonl").read_text().splitlines()
    assert main(arguments) == 0
    assert len(trained.started) == TUNING + MEASURED
    assert (output / "results.jsonl").read_text().splitlines()[1:] == first[1:]


def test_runs_of_another_study_are_not_taken_for_its_own(
    trained: FakeTraining, spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [spec, "--output", str(tmp_path / "out"), "--only", "sync", "--tuning-seeds", "1"]
    assert main(arguments) == 0
    assert len(trained.started) == 3 + 3
    capsys.readouterr()
    before = (tmp_path / "out" / "results.jsonl").read_text()
    assert main([*arguments, "--epochs", "3"]) == 2
    assert "has --epochs 2, not 3; name another folder" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.jsonl").read_text() == before


def test_a_smaller_part_of_a_study_leaves_the_rest_in_the_file(
    trained: FakeTraining, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [spec, "--output", str(tmp_path / "out"), "--only", "sync", "--tuning-seeds", "1"]
    assert main(arguments) == 0
    before = read_study(tmp_path / "out" / "results.jsonl")
    monkeypatch.setattr("benchmarks.time_to_accuracy.provenance", lambda *_: {"commit": "another"})
    assert main([*arguments, "--tune-only"]) == 0
    assert main([*arguments, "--seeds", "1"]) == 0
    after = read_study(tmp_path / "out" / "results.jsonl")
    assert len(after.runs) == 3 + 3
    assert {run.folder: run for run in after.runs} == {run.folder: run for run in before.runs}
    assert {run.commit for run in after.runs} == {before.head["commit"]} != {"another"}


def test_the_list_of_cells_runs_nothing(
    trained: FakeTraining, spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main([spec, "--list", "--seeds", "1", "--output", str(output)]) == 0
    assert (
        f"{CELLS} cells, {TUNING} tuning and {CELLS} measured runs: {TUNING + CELLS} in all" in capsys.readouterr().out
    )
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "SPEC nothing: "),
        ([], "SPEC"),
        (["digits", "--seeds", "0"], "--seeds"),
        (["digits", "--target-accuracy", "1.5"], "--target-accuracy"),
        (["digits", "--only", "magic"], "--only magic"),
        (["digits", "--json", "/no/such/folder/record.json"], "--json"),
        (["digits", "--unheard-of"], "--unheard-of"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said.lower() in captured.err.lower()


def test_what_training_refuses_is_one_line_too(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(spec).write_text(SPEC.replace('"digits"', '"nothing"'))
    assert main([spec, "--output", str(tmp_path / "out"), "--only", "serial, batch 64"]) == 2
    errors = capsys.readouterr().err
    assert "--dataset" in errors
    assert errors.count("\n") == 1


def test_a_study_trains_ours_and_torchs_ddp_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find_mpirun()
    arguments = ["digits-quick", "--only", "2 ranks", "--target-accuracy", "0.5", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert "torch DDP, 2 ranks" in capsys.readouterr().out
    peer, ours = read_study(tmp_path / "results.jsonl").runs
    assert (peer.cell.contender, ours.cell.contender) == ("torch_ddp_gloo", "allreduce_sgd")
    assert peer.reached
    assert ours.reached
    assert peer.bytes is None
    assert ours.bytes is not None
    assert ours.bytes > 0
    assert (peer.samples, peer.steps) == (ours.samples, ours.steps)
    assert peer.final_accuracy == pytest.approx(ours.final_accuracy, abs=0.02)
    losses = [
        [
            entry["loss"]
            for entry in map(json.loads, (tmp_path / run.folder / "metrics.jsonl").open())
            if "loss" in entry
        ]
        for run in (peer, ours)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lr-schedule plateau --plateau-patience 2", "--lr-schedule plateau: the loop with torch's DDP"),
        ("--optimizer lbfgs", "--optimizer lbfgs: the loop with torch's DDP computes one gradient a step"),
        ("--precision bf16", "--precision bf16: the loop with torch's DDP has no use for it"),
    ],
)
def test_the_loop_with_torchs_ddp_refuses_what_it_would_do_otherwise(tmp_path: Path, flags: str, said: str) -> None:
    arguments = ["-m", "benchmarks.study.torch_ddp", *flags.split(), "--output", str(tmp_path / "run")]
    finished = mpirun(2, arguments)
    assert finished.status == 2, finished.errors
    assert finished.errors.count(said) == 1
    assert not (tmp_path / "run").exists()
