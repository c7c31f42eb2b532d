"""The sentences at the head of a report: they say what the runs bear out, and no more."""

import math
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.hyperbola import Fit
from benchmarks.report.measures import fastest_serial, measure
from benchmarks.report.record_summary import summarise_record
from benchmarks.report.sources import Record
from benchmarks.report.study_summary import summarise_study
from benchmarks.report.words import count, listing
from benchmarks.study.results import Run, Study
from tests.benchmarks.synthetic_study import CELLS, HEAD, STEPS, make_run, study_runs


@pytest.fixture
def study() -> Study:
    return Study(HEAD, tuple(study_runs()))


def summary_of(runs: list[Run], **head: Any) -> str:
    study = Study({**HEAD, **head}, tuple(runs))
    return " ".join(summarise_study(study, measure(study)))


def test_the_summary_says_what_was_soonest_and_what_missed(study: Study) -> None:
    text = " ".join(summarise_study(study, measure(study)))
    cells = {each.name: each for each in measure(study)}
    local, serial = cells["local, period 8, 2 ranks, batch 32"], cells["serial, batch 64"]
    assert "Soonest was “local, period 8, 2 ranks, batch 32”" in text
    assert f"That is {serial.seconds / local.seconds:.2f} [0–" in text
    assert "overlap" in text
    assert "PyTorch's DDP over Gloo took" in text
    assert "and so slower" in text
    assert "1 of 40 measured runs missed the target: “local, period 8, 2 ranks, batch 32” (1 of 5). It counts" in text
    assert "on one machine, with 5 seeds" in text


def test_the_summary_does_not_claim_what_was_not_run() -> None:
    sync = CELLS[4]
    alone = summary_of([make_run(sync, 4, 0)])
    assert "(1 run)" in alone
    assert "Serial SGD was not run, so that there is no speed-up" in alone
    assert "DDP was not part of this study" in alone
    assert "The only run reached the target." in alone
    assert "with 1 seed" in alone
    assert "Fewer than 5 seeds" in alone
    missing = summary_of([make_run(CELLS[2], 2, 0, reaches=False), make_run(sync, 4, 0)])
    assert "Serial SGD missed the target at every batch" in missing
    none = summary_of([make_run(sync, 4, seed, reaches=False) for seed in range(2)])
    assert "No method did so" in none
    assert "2 of 2 measured runs missed the target: “sync, 2 ranks, batch 64” (2 of 2). They count" in none
    assert "No measured run is there yet" in summary_of([])


def test_the_summary_admits_when_serial_is_soonest_and_what_bounds_the_result() -> None:
    slow = [replace(make_run(CELLS[4], 4, seed), seconds=100.0 + seed) for seed in range(5)]
    serial = [replace(make_run(CELLS[2], 2, seed), seconds=50.0, lr=0.5) for seed in range(5)]
    tuning = [replace(serial[0], phase="tuning", lr=lr) for lr in (0.1, 0.5)]
    text = summary_of([*serial, *slow, *tuning], commit="abc-dirty", machine={"cores": 1})
    assert "which nothing that was tried made sooner. The nearest, “sync, 2 ranks, batch 64”, took 2.04 times" in text
    assert "Tuning was not equal: between 0 and 2 runs" in text
    assert "The learning rate chosen for 1 of 2 methods is the smallest or largest" in text
    assert "1 method ran more threads than the machine has cores (1)" in text
    assert "differed from the commit" in text


def test_the_summary_says_what_larger_batches_still_save(study: Study) -> None:
    fit = Fit(
        s_min=200.0, b_crit=300.0, s_min_range=(180.0, 220.0), b_crit_range=(250.0, 350.0), residual=0.1, n=35, missed=0
    )
    cells = measure(study)
    without, alone, beside = (
        summarise_study(study, cells),
        summarise_study(study, cells, fit),
        summarise_study(study, cells, fit, [100.0, 200.0, 400.0]),
    )
    (added,) = set(alone) - set(without)
    assert "S_min = 200 [180–220] and B_crit = 300 [250–350] samples (95 % ranges, 35 runs)" in added
    assert "noise" not in added
    assert "The gradient noise scale, which is to foretell B_crit, was 200 [100–400] samples in 3 runs." in " ".join(
        beside
    )


def test_words() -> None:
    assert [count(n, "run") for n in range(3)] == ["no runs", "1 run", "2 runs"]
    assert [listing(list(names)) for names in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]


def test_the_fastest_serial_cell_is_the_baseline(study: Study) -> None:
    best = fastest_serial(measure(study))
    assert best is not None
    assert best.name == "serial, batch 64"
    assert not math.isinf(best.seconds)


def test_sentences_of_records() -> None:
    steps = [{**row, "ratio": ratio} for row, ratio in zip(STEPS, (1.0, 1.25, 2.5), strict=True)]
    assert summarise_record(Record({"benchmark": "step_time"}, tuple(steps))) == (
        "Beside one that does not communicate, a training step takes 1.25 times as long with this package and 2.50 "
        "times as long with PyTorch's DDP over Gloo (mlp)."
    )
    cases = [("sync", [0.9, 0.8, 0.7], 0), ("local", [0.5, 0.1, 0.6], 1)]
    rows = [{"study": "s", "case": case, "test_accuracies": found, "diverged": n} for case, found, n in cases]
    assert summarise_record(Record({"benchmark": "strategies"}, tuple(rows))) == (
        "Study s: of 2 cases with 3 runs each, “sync” was the most accurate at the end, 80 %, and “local” the least, "
        "50 %. 1 of 6 runs diverged."
    )
    validation = {"kind": "validation", "oversubscription": None, "computing": "modelled"}
    errors: list[dict[str, Any]] = [{**validation, "error": each} for each in (-0.3, 0.1, 0.05)]
    errors += [{**validation, "computing": "measured", "oversubscription": 1.2, "error": 0.02}]
    errors += [{"kind": "prediction", "ranks": 1024, "error": None}]
    assert summarise_record(Record({"benchmark": "scaling"}, tuple(errors))) == (
        "Step times predicted from other models and batches are off by 10.0 % in the median and by 30.0 % at most with "
        "at most as many ranks as cores (3 cases). Step times given their computing alone are off by 2.0 % in the "
        "median and by 2.0 % at most with more ranks than cores (1 case). 1 point of up to 1,024 ranks: simulated, "
        "not measured."
    )
    plan = {"kind": "advice", "choice": "recommended", "ranks": 2, "global_batch": 4096.0, "seconds_to_target": 5.25}
    assert summarise_record(Record({"benchmark": "scaling"}, ({**plan, "speed_up_to_accuracy": 1.5},))) == (
        "Simulated, not measured, recommended: 2 ranks with batch 4,096 reach the target in 5.25 s, 1.50 times as soon "
        "as one rank at its best batch."
    )
    assert summarise_record(Record({"benchmark": "other"}, ({"a": 1},))) == "1 row; see the section."


def summary_of_record(benchmark: str, rows: list[dict[str, Any]]) -> str:
    return summarise_record(Record({"benchmark": benchmark}, tuple(rows)))


def test_sentences_of_what_a_run_withstands_and_takes() -> None:
    harms: list[dict[str, Any]] = [
        {"rounds": 3, "finished": 1, "slowest_end_seconds": 2.0, "problems": []},
        {"rounds": 2, "finished": 2, "slowest_end_seconds": None, "problems": ["late"]},
    ]
    assert summary_of_record("chaos", harms) == (
        "A training was started, harmed and resumed in 5 rounds; the slowest ended 2.00 s after the harm. 3 runs came "
        "to the end with the parameters of the undisturbed one, bit for bit. Problems: 1."
    )
    assert summary_of_record("chaos", harms[1:]).startswith("A training was started, harmed and resumed in 2 rounds. 2")
    assert summary_of_record("chaos", harms[:1]).endswith("Problems: none.")
    phases = {"launch": 0.02, "imports": 2.5, "total": 3.0, "help": 0.125, "interpreter": 9.0}
    shared = {"ranks": 2, "rounds": 7, "dataset": "digits"}
    assert summary_of_record("startup", [{**shared, "phase": p, "median_seconds": s} for p, s in phases.items()]) == (
        "2 ranks end their first step on digits 3.00 s after the launch (median of 7 rounds); the longest part is "
        "imports, 2.50 s. --help takes 0.125 s."
    )


def test_sentences_of_what_steps_cost_and_what_was_expected() -> None:
    steps: list[dict[str, Any]] = [
        {"workload": "mlp", "period": period, "delay": delay, "ratio": ratio}
        for period, delay, ratio in ((None, 0, 1.0), (1, 0, 1.25), (8, 1, 1.1))
    ]
    assert summary_of_record("local_steps", steps) == (
        "Beside one that never exchanges, a step takes 1.25 times as long with an average after every step and 1.10 "
        "times as long with an average every 8 steps, 1 step late (mlp)."
    )
    assert summary_of_record("local_steps", steps[:1]) == "1 row; see the section."
    virtual: list[dict[str, Any]] = [
        {"workload": "mlp", "virtual_ranks": ranks, "ratio": ratio, "wrong": ratio > 2}
        for ranks, ratio in ((None, 1.0), (2, 1.5), (4, 1.75))
    ]
    assert summary_of_record("virtual_ranks", virtual) == (
        "With virtual ranks, a step takes, beside synchronous SGD, 1.50 times as long with 2 of them and 1.75 times as "
        "long with 4 of them (mlp); all ended in the bits they should."
    )
    assert summary_of_record("virtual_ranks", [{**virtual[1], "wrong": True}]).endswith("; 1 case ended in wrong bits.")
    claims: list[dict[str, Any]] = [
        {"recipe": "r", "claim": claim, "held": held, "smaller_values": [1.0, 2.0]}
        for claim, held in (("A", 2), ("B", 1))
    ]
    assert summary_of_record("recipes", claims) == "1 of 2 expectations were seen. Not seen: “B” (r)."
