"""Specs of sweeps, and what is refused in which words, before anything starts."""

from pathlib import Path

import pytest

from allreduce_sgd.sweep.__main__ import main
from allreduce_sgd.sweep.plan import check_flags
from allreduce_sgd.sweep.search import all_trials
from allreduce_sgd.sweep.spec import read_spec, shipped

GRID = 'method = "grid"\n'
LIST = "[parameters]\nlr = [0.1, 0.2]\n"
HALVING = 'method = "halving"\n[halving]\nsmallest = 1\nlargest = 4\n'


@pytest.mark.parametrize("name", shipped())
def test_the_shipped_specs_are_ones_that_training_takes(name: str) -> None:
    spec, _ = read_spec(name)
    assert spec.name == name
    assert [check_flags(spec, trial) for trial in all_trials(spec)] == [None] * 24


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method =", "is not valid TOML"),
        (LIST, "method: is missing"),
        ('method = "magic"\n' + LIST, "method: unknown value 'magic'; choose from grid, random, halving"),
        (GRID, "parameters: there are none"),
        ("colour = 1\n" + GRID + LIST, "colour: unknown key; allowed are"),
        (GRID + 'metric = "beauty"\n' + LIST, "metric: unknown value 'beauty'; choose from test_accuracy, test_loss"),
        (GRID + 'metric = "validation_loss"\n' + LIST, "validation_loss: no validation set; give validation-fraction"),
        (GRID + 'goal = "more"\n' + LIST, "goal: unknown value 'more'; choose from max, min"),
        (GRID + "seeds = 0\n" + LIST, "seeds: 0 is not a whole number of at least 1"),
        (GRID + "trials = 3\n" + LIST, "trials: a grid tries all combinations"),
        (GRID + 'name = "../up"\n' + LIST, "name: '../up' does not serve for a folder"),
        (GRID + LIST + "[trainer]\nmomentun = 1\n", "trainer.momentun: is no flag of the trainer"),
        (GRID + LIST + '[trainer]\nmomentum = "big"\n', "trainer: momentum: 'big' is not a number"),
        (GRID + LIST + "[trainer]\nlr = 0.1\n", "trainer.lr: stands among the parameters too"),
        (GRID + LIST + '[trainer]\noutput = "here"\n', "trainer.output: the sweep sets it itself"),
        (GRID + "[parameters]\nlr = 0.1\n", "parameters.lr: 0.1 is one value: give a list, or a range"),
        (GRID + "[parameters]\nlr = []\n", "parameters.lr: [] is not a list of values"),
        (GRID + "[parameters]\nlr = [0.1, -1.0]\n", "parameters: lr: -1.0 is out of range"),
        (GRID + "[parameters]\nlr = [0.1, 0.1]\n", "parameters.lr: a value stands there twice"),
        (GRID + '[parameters]\nstrategy = ["sync", "magic"]\n', "strategy: unknown value 'magic'; choose from"),
        (GRID + "[parameters]\nlr = {low = 0.1, high = 1.0}\n", "parameters.lr.points: is missing: a grid takes"),
        (GRID + "[parameters]\nlr = {low = 1.0, high = 0.1}\n", "parameters.lr.high: 0.1 is not more than low"),
        (GRID + "[parameters]\nlr = {low = 0.0, high = 1.0, log = true}\n", "lr.low: 0.0: a logarithmic range"),
        (GRID + "[parameters]\nlr = {low = nan, high = 1.0}\n", "parameters.lr.low: lr: nan is out of range"),
        (GRID + "[parameters]\nlr = {low = 0.1, high = 1.0, step = 1}\n", "parameters.lr.step: unknown key"),
        (GRID + '[parameters]\nhidden = {low = "1", high = "2"}\n', "--hidden is no number, so it has no range"),
        (GRID + "seeds = 2\n[parameters]\nseed = [1, 2]\n", "seeds: 2: the seed is one of the parameters"),
        ('method = "random"\n' + LIST, "trials: is missing: how many"),
        ('method = "random"\ntrials = 5\n' + LIST, "trials: 5: there are only 2 combinations"),
        (HALVING + "[parameters]\nlr = {low = 0.1, high = 1.0}\n", "trials: is missing: ranges of real numbers"),
        (HALVING + LIST + "[trainer]\nepochs = 3\n", "trainer.epochs: how far trials train is said by halving.largest"),
        (HALVING.replace("= 4", "= 1") + LIST, "halving.largest: 1 is not more than smallest, 1"),
        (HALVING + "eta = 1\n" + LIST, "halving.eta: 1: at least 2"),
        ('metric = "train_loss"\n' + HALVING + LIST, "metric: train_loss is not known before the end of a run"),
        # Only when flags meet: here in every combination.
        (GRID + LIST + "[trainer]\nperiod = 4\n", "--period: --strategy sync has no use for it"),
    ],
)
def test_a_bad_spec_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    file = tmp_path / "spec.toml"
    file.write_text(text)
    assert main([str(file), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "spec.toml" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "SPEC and --resume: give one of the two"),
        (["nowhere.toml"], "SPEC nowhere.toml: no such file; name a TOML file or one of digits, digits-halving"),
        (["digits", "--ranks", "0"], "--ranks: '0' is not a whole number of at least 1"),
        (["digits", "--ranks", "3", "--ranks-per-trial", "2"], "--ranks 3: not a multiple of --ranks-per-trial 2"),
        (["digits", "--retry-failed"], "--retry-failed: only with --resume"),
        (["--resume", "nowhere"], "--resume: nowhere is not the folder of a sweep: it has no sweep.toml"),
        (["digits", "--launcher", "srun -n 2"], "--launcher: 'srun -n 2' does not"),
        (["digits", "--launcher", "true 'a"], '--launcher: "true \'a": No closing quotation'),
        (["digits", "--output", "/dev/null"], "--output: /dev/null is a file"),
        (["digits-halving", "--write-flags", "x"], "--write-flags: which trials of halving go on"),
        (["digits", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_not_started_by_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    assert main(["digits"]) == 2
    assert "start it without a launcher" in capsys.readouterr().err


def test_trials_are_printed_and_written_as_lines_for_an_array_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "spec.toml"
    file.write_text(
        GRID + 'seeds = 2\n[trainer]\ndataset = "npz:my file"\nnesterov = true\n'
        '[parameters]\nlr = [0.1, 0.2]\nstrategy = ["sync", "local"]\nperiod = [8]\n'
    )
    assert main([str(file), "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("  0  --lr 0.1 --strategy sync --period 8   # refused: --period: --strategy sync has")
    assert printed[1] == "  1  --lr 0.1 --strategy local --period 8"
    assert "4 trials, each with 2 seeds; of all: --dataset 'npz:my file' --nesterov" in printed[4]
    lines = tmp_path / "flags.txt"
    assert main([str(file), "--write-flags", str(lines)]) == 0
    assert "8 lines: sbatch --array=1-8 slurm/sweep.sbatch" in capsys.readouterr().out
    assert lines.read_text().splitlines()[3] == (
        "--dataset 'npz:my file' --nesterov --lr 0.1 --strategy local --period 8 --seed 1 --keep-checkpoints 1"
    )
