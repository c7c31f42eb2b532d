"""The table and the picture of a sweep, and the file they are made from."""

import csv
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.sweep.picture import draw
from allreduce_sgd.sweep.results import Outcome, Result, Results, outcomes
from allreduce_sgd.sweep.search import Trial, all_trials
from allreduce_sgd.sweep.spec import Spec, parse_spec
from allreduce_sgd.sweep.table import as_csv, as_markdown

PARAMETERS = {
    "lr": {"low": 0.001, "high": 1.0, "log": True},
    "strategy": ["sync", "local"],
    "nesterov": [True, False],
    "batch-size": {"low": 8, "high": 64},
}


def spec_of(**values: object) -> tuple[Spec, tuple[Trial, ...]]:
    spec = parse_spec(Path("spec.toml"), {"method": "random", "trials": 8, "parameters": PARAMETERS, **values})
    return spec, all_trials(spec)


def result(trial: Trial, value: float | None, seed: int = 0, reach: int | None = None) -> Result:
    error = None if value is not None else "status 1: a | b"
    return Result(trial.number, seed, reach, trial.parameters, value, error, 1.5, 1)


def test_the_median_over_seeds_counts_and_one_that_fails_fails_the_trial(tmp_path: Path) -> None:
    spec, trials = spec_of(seeds=3, metric="test_loss")
    results = Results(tmp_path, trials)
    for trial, values in zip(trials, [(3, 1, 2), (0.5, None, 0.1), (9, 0.1, 0.2)], strict=False):
        for seed, value in enumerate(values):
            results.append(result(trial, value, seed))
    found = outcomes(spec, trials, results)
    assert [(each.trial.number, each.value) for each in found] == [(2, 0.2), (0, 2), (1, None)]
    lines = as_markdown(spec, found).splitlines()
    assert [line.count(" | ") for line in lines] == [9] * 5
    assert "test_loss (median of 3)" in lines[0]
    assert "| 0.2 " in lines[2]
    assert "[0.1–9]" in lines[2]
    assert "a \\| b" in lines[4]
    rows = list(csv.DictReader(as_csv(spec, found).splitlines()))
    assert [(row["trial"], row["test_loss"], row["min"], row["max"]) for row in rows] == [
        ("2", "0.2", "0.1", "9"),
        ("0", "2", "1", "3"),
        ("1", "", "0.1", "0.5"),
    ]
    assert float(rows[0]["lr"]) == trials[2].parameters["lr"]


def test_of_halving_those_that_came_further_stand_before_those_that_did_not(tmp_path: Path) -> None:
    halving = {"smallest": 1, "largest": 9}
    spec, trials = spec_of(method="halving", halving=halving)
    results = Results(tmp_path, trials)
    for trial, values in zip(trials, [(0.9,), (0.5, 0.6), (0.7, 0.4)], strict=False):
        for reach, value in zip((1, 3), values, strict=False):
            results.append(result(trial, value, reach=reach))
    found = outcomes(spec, trials, results)
    assert [(each.trial.number, each.reach, each.value) for each in found] == [(1, 3, 0.6), (2, 3, 0.4), (0, 1, 0.9)]
    assert found[0].seconds == 3.0
    assert "| epochs |" in as_markdown(spec, found)


def test_a_line_that_was_cut_short_is_dropped_and_other_damage_told(tmp_path: Path) -> None:
    _, trials = spec_of()
    results = Results(tmp_path, trials)
    results.append(result(trials[0], 0.5))
    results.append(result(trials[1], None))
    file = tmp_path / "results.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[:40])
    again = Results(tmp_path, trials)
    assert again.get(0, 0, None) == result(trials[0], 0.5)
    assert file.read_text() == whole
    retried = Results(tmp_path, trials, retry_failed=True)
    assert retried.get(1, 0, None) is None
    assert file.read_text() == whole.splitlines(keepends=True)[0]
    file.write_text(whole[:40] + "\n" + whole)
    with pytest.raises(ConfigError, match=r"results\.jsonl: line 1 is no result of a sweep"):
        Results(tmp_path, trials)
    entry = {**json.loads(whole.splitlines()[0]), "parameters": {"lr": 0.7}}
    file.write_text(json.dumps(entry) + "\n")
    with pytest.raises(ConfigError, match=r"trial 0 had .*, which the spec beside it does not say"):
        Results(tmp_path, trials)


@pytest.mark.parametrize("values", [(0.5, 0.9, None, 0.7), (0.5,), (None, None)], ids=["several", "one", "none"])
def test_the_picture_is_a_png_of_a_sensible_size(tmp_path: Path, values: Sequence[float | None]) -> None:
    spec, trials = spec_of()
    found = [
        Outcome(trial, (result(trial, value),), 1.0)
        for trial, value in sorted(zip(trials, values, strict=False), key=lambda pair: -(pair[1] or 0))
    ]
    draw(spec, found, tmp_path / "parallel.png")
    data = (tmp_path / "parallel.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    # Five axes.
    assert 1000 < width < 2000
    assert 500 < height < 1000
    assert len(data) > 10_000
