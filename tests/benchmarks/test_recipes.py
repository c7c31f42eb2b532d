"""Recipes: their flags, what they make of runs whose numbers are known, and one from start to end."""

import json
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import pytest

from allreduce_sgd.command_line import parse
from benchmarks.course.noise_ball import formula
from benchmarks.course.runs import Course, Job
from benchmarks.recipes.__main__ import main, rows_of, table
from benchmarks.recipes.catalogue import RECIPES
from benchmarks.recipes.measures import curve, final, last, lowest, over_first_epoch, over_last_epoch
from benchmarks.recipes.noise_ball import findings_of
from benchmarks.recipes.recipe import Finding
from benchmarks.runs import Flags, words
from tests import warm_start


def course(output: Path, seeds: int = 2) -> Course:
    return Course("digits", None, 100, "8", 1.0, 3, seeds, (1,), 60, output)


def write_run(folder: Path, test_losses: Sequence[float | None], train_losses: Sequence[float], **summary: Any) -> None:
    """Write a run of epochs of 10 samples, each epoch logged after 4 samples and at its end."""
    folder.mkdir(parents=True)
    events: list[dict[str, Any]] = []
    for epoch, loss in enumerate(train_losses):
        for samples, value in ((4, 0.0), (10, loss)):
            at = {"samples": 10 * epoch + samples, "epoch": epoch + samples / 10}
            events.append({"event": "train", "loss": value, **at})
    for epoch, test_loss in enumerate(test_losses, start=1):
        events.append({"event": "evaluation", "epoch": float(epoch), "test_loss": test_loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_trainer_knows_all_flags(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    assert {"quick", ""} <= set(recipe.scales)
    for scale in recipe.scales.values():
        cases = recipe.cases(scale)
        whole = course(tmp_path)
        for job in cases.values():
            config, given = parse(words(whole.flags(job, 1)))
            assert set(dict(job.flags)) <= given
            assert config.training.seed == 1
        assert len({job.name for job in cases.values()}) == len(set(cases.values()))


@pytest.mark.parametrize("name", list(RECIPES))
def test_an_expectation_says_what_and_why(name: str) -> None:
    assert len(RECIPES[name].expect.split()) > 40
    assert RECIPES[name].scale("imagenet", quick=False) == RECIPES[name].scales[""]
    assert RECIPES[name].scale("digits", quick=True) == RECIPES[name].scales["quick"]


def test_measures_are_read_from_the_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [3.0, 1.0, None], [5.0, 2.0], test_loss=1.0, epochs=2.0)
    found = {
        each.name: each.of(tmp_path / "run")
        for each in (
            final("final", "test_loss"),
            last("last", "test_loss"),
            lowest("lowest", "test_loss"),
            over_first_epoch("first epoch", "loss"),
            over_last_epoch("last epoch", "loss"),
        )
    }
    # Of 10 samples 6 had the loss.
    assert found == {"final": 1.0, "last": inf, "lowest": 1.0, "first epoch": 3.0, "last epoch": pytest.approx(1.2)}


def test_a_curve_goes_as_far_as_all_its_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "long", [3.0, 1.0, 7.0], [5.0])
    write_run(tmp_path / "short", [5.0, None], [10.0])
    folders = [tmp_path / "long", tmp_path / "short"]
    found = curve(folders, "evaluation", "test_loss")
    assert found == {"x": [1.0, 2.0], "y": [4.0, None], "low": [3.0, 1.0], "high": [5.0, None]}
    assert curve(folders, "train", "loss")["y"] == [pytest.approx(4.5)]


def overfitted(output: Path, decayed_losses: list[list[float | None]]) -> tuple[Course, Mapping[str, Job]]:
    whole = course(output)
    cases = RECIPES["overfitting"].cases(RECIPES["overfitting"].scales["quick"])
    plain, decayed = cases.values()
    for seed, losses in enumerate(decayed_losses):
        write_run(whole.folder(plain, seed), [1.0, 0.8, 0.9], [1.0, 0.01])
        write_run(whole.folder(decayed, seed), losses, [1.0, 0.1])
    return whole, cases


def test_what_holds_for_every_seed_is_as_expected(tmp_path: Path) -> None:
    whole, cases = overfitted(tmp_path, [[1.0, 0.5], [1.0, 0.6]])
    figures = RECIPES["overfitting"].figures(cases, whole)
    findings = RECIPES["overfitting"].findings(cases, whole, figures)
    assert [each.verdict for each in findings] == ["as expected"] * 3
    assert [smaller for smaller, _ in findings[0].pairs] == pytest.approx([0.84, 0.84])
    assert [larger for _, larger in findings[0].pairs] == [0.9, 0.9]
    assert [row["series"] for row in figures["test_loss"]] == list(cases)
    lines = table(findings).splitlines()
    assert lines[4].split()[-5:] == ["2", "of", "2", "as", "expected"]
    assert "0.550 [0.500–0.600]" in lines[4]


def test_what_fails_for_a_seed_is_not_seen_here(tmp_path: Path) -> None:
    whole, cases = overfitted(tmp_path, [[1.0, 0.5], [1.0, None]])
    findings = RECIPES["overfitting"].findings(cases, whole, {})
    assert [each.held for each in findings] == [2, 2, 1]
    assert findings[2].verdict == "not seen here"
    (*_, row) = rows_of("overfitting", whole, findings)
    assert row["smaller_values"] == [0.5, None]
    assert "∞" in table(findings)
    json.dumps(row, allow_nan=False)


def test_equal_numbers_and_none_bear_no_claim_out() -> None:
    assert Finding("a < a", "a", "a", ((1.0, 1.0),)).verdict == "not seen here"
    assert Finding("a < a", "a", "a", ((inf, inf),)).verdict == "not seen here"


def test_a_run_that_diverged_bears_out_that_a_rate_is_too_large_but_not_that_a_network_overfits() -> None:
    pairs = ((1.0, inf), (1.0, 2.0))
    assert Finding("a < b", "a", "b", pairs).verdict == "as expected"
    assert Finding("a < b", "a", "b", pairs, finite=True).held == 1


def test_the_noise_ball_is_judged_by_the_formula() -> None:
    batches = [1, 2, 4]

    def rows(error: float) -> list[dict[str, Any]]:
        values = {
            "with replacement": [formula(batch, False) * error for batch in batches],
            "random subsets": [formula(batch, True) for batch in batches],
            "permutation per epoch": [formula(batch, True) / 2 for batch in batches],
        }
        return [{"series": name, "x": batches, "y": y} for name, y in values.items()]

    assert [each.verdict for each in findings_of(rows(1.02))] == ["as expected"] * 4
    assert [each.verdict for each in findings_of(rows(1.2))] == ["not seen here", *["as expected"] * 3]


def test_a_recipe_from_start_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(ranks: int, flags: Flags, timeout_seconds: int) -> None:
        done = warm_start.python(["-m", "allreduce_sgd.train", *words(flags)], timeout_seconds)
        assert done.status == 0, done.errors

    monkeypatch.setattr("benchmarks.course.runs.train", train)
    tiny = ["--dataset", "synthetic:128,8,2", "--hidden", "4", "--seeds", "1", "--epochs", "2"]
    arguments = ["generalisation", *tiny, "-o", str(tmp_path / "out"), "--json", str(tmp_path / "recipes.json")]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    parts = ("To expect:", "2 trainings on synthetic:128,8,2, with 1 seed each", "verdict")
    assert [told.count(part) for part in parts] == [1, 1, 1]
    assert sorted(parts, key=told.index) == list(parts)
    folder = tmp_path / "out" / "generalisation"
    assert {path.name for path in folder.glob("*.png")} == {"train_loss.png", "test_accuracy.png"}
    record = json.loads((tmp_path / "recipes.json").read_text())
    assert record["benchmark"] == "recipes"
    assert {row["verdict"] for row in record["rows"]} <= {"as expected", "not seen here"}
    assert all(row["held"] == (row["smaller_values"] < row["larger_values"]) for row in record["rows"])

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("benchmarks.course.runs.train", fail)
    assert main(arguments) == 0
    assert main([*arguments, "--epochs", "3"]) == 2
    assert "--epochs 2, not 3" in capsys.readouterr().err


def test_without_a_name_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    told = capsys.readouterr().out
    assert all(name in told and recipe.title in told for name, recipe in RECIPES.items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["soup"], "NAME: unknown value 'soup'; choose from overfitting, curves"),
        (["noise-ball", "--seeds", "0"], "--seeds: '0' is not a whole number"),
        (["noise-ball", "--json", "missing/x.json"], "--json missing/x.json: name a file"),
        (["noise-ball", "--dataset", "imagenet"], "--dataset imagenet: "),
        (["noise-ball", "--output", __file__], f"--output {__file__}"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "runs"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"recipes: error: {said}")
    assert len(error.splitlines()) == 1
