import json
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from benchmarks.course import noise_ball as noise
from benchmarks.course.__main__ import main, table
from benchmarks.course.figure import draw
from benchmarks.course.figures import FIGURES
from benchmarks.course.runs import Course, Job, training_losses

TINY = ["--dataset", "synthetic:64,8,2", "--hidden", "4", "--seeds", "1", "--epochs", "1", "--ranks", "1"]


def course(output: Path, **changed: Any) -> Course:
    whole = Course(
        dataset="digits",
        data_dir=None,
        train_samples=1024,
        hidden="8",
        target_accuracy=0.9,
        epochs=2,
        seeds=3,
        ranks=(1, 2),
        timeout_seconds=60,
        output=output,
    )
    return replace(whole, **changed)


def write_run(folder: Path, events: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def train_event(samples: int, loss: float | None) -> dict[str, Any]:
    return {"event": "train", "samples": samples, "loss": loss}


def evaluation(epoch: float, accuracy: float, train_seconds: float = 0.0) -> dict[str, Any]:
    return {"event": "evaluation", "epoch": epoch, "test_accuracy": accuracy, "train_seconds": train_seconds}


def rows_with(**changed: Any) -> list[dict[str, Any]]:
    row = {
        "figure": "made_up",
        "series": "one",
        "x": [16, 64, 256],
        "y": [1.0, 2.0, None],
        "low": [0.5, 1.0, None],
        "high": [1.5, None, None],
        "x_label": "batch",
        "y_label": "epochs",
        "n": 3,
        "x_log": True,
        "y_log": True,
        "note": "",
        "runs": [],
    }
    return [{**row, **changed}, {**row, **changed, "series": "two"}]


def test_a_loss_curve_is_the_median_and_range_of_its_runs(tmp_path: Path) -> None:
    whole = course(tmp_path)
    for job in FIGURES["lr"].jobs(whole):
        for seed, folder in enumerate(whole.folders(job)):
            lost = None if seed == 2 and dict(job.flags)["lr"] == 1.0 else 1.0
            write_run(folder, [train_event(256, 4.0 + seed), train_event(512, lost)])
    rows = FIGURES["lr"].rows(whole)
    assert [row["series"] for row in rows] == [f"η = {lr:g}" for lr in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)]
    first, last = rows[0], rows[-1]
    assert (first["x"], first["y"], first["low"], first["high"]) == ([256, 512], [5.0, 1.0], [4.0, 1.0], [6.0, 1.0])
    assert (last["y"], last["high"]) == ([5.0, 1.0], [6.0, None])
    assert last["n"] == 3
    assert last["runs"] == [str(tmp_path / f"p1-b64-optimizer-sgd-lr-1.0-momentum-0.0-seed{seed}") for seed in range(3)]
    json.dumps(rows, allow_nan=False)


def test_what_is_logged_at_the_end_of_an_epoch_joins_the_next_point(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [train_event(100, 2.0), train_event(120, 7.0), train_event(200, 2.0)])
    assert training_losses(tmp_path / "run", 100) == ([100, 200], [2.0, pytest.approx(3.0)])


def test_a_loss_that_is_no_number_is_infinite(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [train_event(100, None), train_event(200, 1.0)])
    assert training_losses(tmp_path / "run", 100) == ([100, 200], [inf, 1.0])


def test_epochs_to_the_target_are_those_of_the_first_evaluation_that_reaches_it(tmp_path: Path) -> None:
    whole = course(tmp_path)
    jobs = FIGURES["epochs_to_target"].jobs(whole)
    assert [job.batch_size for job in jobs] == 2 * [16, 64, 256]
    for job in dict.fromkeys(jobs):
        for seed, folder in enumerate(whole.folders(job)):
            best = 0.95 if job.batch_size < 256 or seed == 0 else 0.85
            write_run(folder, [evaluation(0.5, 0.5), evaluation(1.5 + seed, best), evaluation(9.0, best)])
    fixed, scaled = FIGURES["epochs_to_target"].rows(whole)
    assert fixed["x"] == [16, 64, 256]
    assert (fixed["y"], fixed["low"], fixed["high"]) == ([2.5, 2.5, None], [1.5, 1.5, 1.5], [3.5, 3.5, None])
    assert fixed["note"].endswith("by 2 of 3 with η = 0.1, batch 256; 2 of 3 with η = 0.1 · B / 64, batch 256")
    assert scaled["note"] == fixed["note"]
    # The learning rates meet at batch 64, whose runs are shared.
    assert set(fixed["runs"]) & set(scaled["runs"]) == {str(folder) for folder in whole.folders(jobs[1])}
    assert table([fixed]).splitlines()[2].split()[-3:] == ["2.50", "2.50", "∞"]


def test_the_time_of_an_epoch_is_that_of_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})
    whole = course(tmp_path, seeds=2)
    for job in FIGURES["epoch_time"].jobs(whole):
        for seed, folder in enumerate(whole.folders(job)):
            write_run(folder, [evaluation(1.0, 0.5, 7.0), evaluation(2.0, 0.5, 8.0 + 2 * seed)])
    alone, together = FIGURES["epoch_time"].rows(whole)
    assert (alone["y"][0], alone["low"][0], alone["high"][0]) == (2.0, 1.0, 3.0)
    assert alone["x"] == [16, 32, 64, 128, 256, 512]
    assert [alone["series"], together["series"]] == ["1 rank", "2 ranks on 1 core"]


@pytest.mark.parametrize(
    ("sampling", "subsets", "batch"), [("replacement", False, 16), ("uniform", True, 128), ("epoch", True, 128)]
)
def test_the_noise_ball_is_as_large_as_theory_says(sampling: str, subsets: bool, batch: int) -> None:
    """Permutations keep x nearer than random subsets do: half as far at half of all samples."""
    found = noise.mean_squares(sampling, batch, 6, seed=3)
    standard_error = float(found.std()) / 6**0.5
    theory = noise.formula(batch, subsets)
    if sampling == "epoch":
        assert float(found.mean()) < 0.6 * theory
    else:
        assert float(found.mean()) == pytest.approx(theory, abs=4 * standard_error)
        assert standard_error < 0.05 * theory


def test_the_rows_of_the_noise_ball_are_points_with_errors_and_formulas() -> None:
    rows = noise.noise_ball(2, batch_sizes=(64, 128))
    assert [row["n"] for row in rows] == [2, 2, 2, None, None]
    for row in rows[:3]:
        assert all(low <= y <= high for low, y, high in zip(row["low"], row["y"], row["high"], strict=True))
    assert rows[3]["y"] == [pytest.approx(1 / (batch * 0.75)) for batch in (64, 128)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        rows_with(),
        rows_with(x_log=False, y_log=False),
        rows_with(x=[16], y=[0.01], low=[0.01], high=[0.01]),
        rows_with(y=[0.0, 1.0, None], low=None, high=None),
        rows_with(y=[-1.0, 1.0, 2.0], low=None, high=None, y_log=False),
        rows_with(y=[None] * 3, low=None, high=None),
        rows_with(x=list(range(100)), y=[*map(float, range(1, 100)), None], low=None, high=None, x_log=False),
        [*rows_with(y=[1.0, 2.0, 3.0]), *rows_with(n=None, y=[1.0, 2.0, 3.0], low=None, high=None)],
    ],
)
def test_any_rows_can_be_drawn(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    draw(rows, tmp_path / "figure.png")
    picture = imread(tmp_path / "figure.png")
    assert picture.shape[:2] == (864, 1024)
    # Nothing reaches the edges, where it would be cut.
    assert all(edge[..., :3].min() == 1 for edge in (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:]))


def test_every_figure_names_what_training_takes(tmp_path: Path) -> None:
    whole = course(tmp_path)
    for figure in FIGURES.values():
        jobs = figure.jobs(whole)
        assert all(job.batch_size <= whole.train_samples and job.ranks <= job.batch_size for job in jobs)
        assert len({job.name for job in jobs}) == len(set(jobs))
    assert Job(16, (("lr", 0.1),)).name != Job(16, (("lr", 0.01),)).name


def test_a_figure_from_start_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["epoch_time", *TINY, "--output", str(tmp_path / "runs"), "--json", str(tmp_path / "course.json")]
    assert main(arguments) == 0
    picture = tmp_path / "runs" / "figures" / "epoch_time.png"
    assert "Time of an epoch" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "course.json").read_text())["rows"]
    assert (row["series"], row["x"], row["n"]) == ("1 rank", [16], 1)
    assert row["y"][0] > 0
    assert (Path(row["runs"][0]) / "summary.json").exists()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("benchmarks.course.runs.train", fail)
    picture.unlink()
    assert main(arguments) == 0
    assert picture.exists()
    assert main([*arguments, "--hidden", "5"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("course: error: --output: ")
    assert "--hidden 4, not 5" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bach"], "FIGURES: unknown value 'bach'; choose from batch, lr, momentum"),
        (["--seeds", "0"], "--seeds: '0' is not a whole number"),
        (["--target-accuracy", "87"], "--target-accuracy: '87' is not a fraction"),
        (["noise_ball", "--json", "missing/course.json"], "--json missing/course.json: name a file"),
        (["noise_ball", "--figures-dir", __file__], f"--figures-dir {__file__}: cannot be made a folder"),
        (["noise_ball", "--dataset", "imagenet"], "--dataset imagenet: "),
        (["noise_ball", "--dataset", "synthetic:8,4,2"], "--dataset synthetic:8,4,2: "),
        (["lr", "--dataset", "synthetic:100,8,2", "--epochs", "2"], "--epochs 2: 160 samples make no point of a loss"),
        (["epoch_time", "--dataset", "synthetic:100,8,2", "--ranks", "1,2048"], "--ranks 2048: no mini-batch of"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"course: error: {said}")
    assert len(error.splitlines()) == 1
