"""The sentences at the head of a report: they say what the runs bear out, and no more."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
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
    assert "Serial SGD was not part of this study, so that there is no speed-up" in alone
    assert "DDP was not part of this study" in alone
    assert "The only run reached the target." in alone
    assert "with 1 seed" in alone
    assert "Fewer than 5 seeds" in alone
    missing = summary_of([make_run(CELLS[2], 2, 0, reaches=False), make_run(sync, 4, 0)])
    assert "Serial SGD missed the target at every batch that was tried, in the median of its runs" in missing
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


def timed(place: int, *seconds: float) -> list[Run]:
    """Return runs of the cell at that place, a seed for each of the seconds to the target."""
    return [
        replace(make_run(CELLS[place], place, seed), seconds=each, reached=not math.isinf(each))
        for seed, each in enumerate(seconds)
    ]


SERIAL, CORES, SYNC, TORCH = timed(2, 60, 61, 62), timed(3, 40, 41, 42), timed(4, 41.5, 50, 51), timed(7, 70, 71, 72)


def test_the_summary_names_ours_where_a_baseline_or_the_peer_is_soonest() -> None:
    ours = "Of this package on several ranks, “sync, 2 ranks, batch 64” was soonest: "
    text = summary_of([*SERIAL, *CORES, *SYNC, *TORCH])
    assert "Soonest was “one rank, 2 threads, batch 64”: 41.0 [40.0–42.0] s" in text
    assert "It is a baseline on one rank, with 2 threads. That is 1.49 [1.45–1.52] times as fast as serial SGD" in text
    assert f"{ours}50.0 [41.5–51.0] s of training (median of 3 runs), 1.22 [1.20–1.47] times as fast as serial" in text
    text = summary_of([*timed(2, 30, 31, 32), *CORES, *SYNC, *TORCH])
    assert "It is a baseline on one rank, serial SGD (one rank, one thread), which nothing that was tried" in text
    assert f"{ours}50.0" in text
    text = summary_of([*timed(7, 30, 31, 32), *SYNC])
    assert "Soonest was “torch DDP over Gloo, 2 ranks, batch 64”" in text
    assert f"{ours}50.0 [41.5–51.0] s of training (median of 3 runs). " in text
    assert "This package on several ranks was not part of this study." in summary_of([*SERIAL, *CORES])
    lost = summary_of([*SERIAL, *timed(4, 50, math.inf)])
    assert "No method of this package on several ranks reached the target in the median of its runs." in lost
    assert ours not in summary_of([*SERIAL, *timed(4, 30, 31, 32)])


def test_the_summary_names_those_whose_ranges_overlap_the_winners() -> None:
    text = summary_of([*SERIAL, *CORES, *SYNC, *TORCH])
    assert (
        "The range over seeds of “one rank, 2 threads, batch 64” overlaps that of “sync, 2 ranks, batch 64”, so that "
        "there is no difference to report between them."
    ) in text
    text = summary_of([*timed(2, 42, 43, 44), *timed(3, 40, 41, 42), *SYNC, *timed(7, 42, math.inf, math.inf)])
    assert "overlaps those of “serial, batch 64” and “sync, 2 ranks, batch 64”, so that" in text
    assert "overlap" not in summary_of([*CORES, *SERIAL, *TORCH])


def test_a_peer_that_misses_the_target_or_was_not_measured() -> None:
    half = summary_of([*SYNC, *timed(7, 50, math.inf)])
    assert "PyTorch's DDP over Gloo did not reach the target in the median of its runs. " in half
    other = [replace(run, cell=replace(run.cell, label="other")) for run in timed(7, math.inf)]
    both = summary_of([*SYNC, *timed(7, math.inf), *other])
    assert (
        "PyTorch's DDP over Gloo did not reach the target in the median of its runs, in any of its 2 settings." in both
    )
    tuned = [replace(run, phase="tuning") for run in TORCH]
    asked = {**HEAD["spec"], "baselines": {"torch_ddp": True, "serial_batches": [64]}}
    for text in (summary_of([*SYNC, *tuned]), summary_of(SYNC, spec=asked)):
        assert "PyTorch's DDP has no measured run." in text
    assert "Serial SGD has no measured run, so that there is no speed-up" in summary_of(SYNC, spec=asked)


def test_a_study_with_runs_missing_is_called_unfinished() -> None:
    spec = {**HEAD["spec"], "seeds": 3}
    tuned = [replace(run, phase="tuning") for run in TORCH]
    text = summary_of([*SERIAL, *SYNC[:1], *tuned], spec=spec)
    assert "This study is unfinished: it lacks 5 of the 9 measured runs of the methods that it has begun." in text
    assert "it lacks 3 of the 3 measured runs" in summary_of(tuned, spec=spec)
    assert "unfinished" not in summary_of([*SERIAL, *SYNC], spec=spec)


def test_code_that_differed_is_told_of_the_runs_that_it_made() -> None:
    made = [replace(run, commit="abc") for run in SYNC]
    assert "differed from the commit" not in summary_of(made, commit="def-dirty")
    assert "differed from the commit" in summary_of([*made, replace(SERIAL[0], commit="abc-dirty")], commit="def")


def test_virtual_hosts_are_named_as_such() -> None:
    linked = [replace(run, cell=replace(run.cell, network="1gbit")) for run in SYNC]
    text = summary_of([*SERIAL, *linked])
    assert "on one machine, with 3 seeds" in text
    assert (
        "1 of 2 methods ran on virtual hosts, network namespaces of this machine, with links limited to 1gbit." in text
    )
    assert "virtual" not in summary_of([*SERIAL, *SYNC])


def test_the_summary_says_what_larger_batches_still_save(study: Study) -> None:
    fit = Fit(
        s_min=200.0,
        b_crit=300.0,
        s_min_range=(180.0, 220.0),
        b_crit_range=(250.0, 350.0),
        residual=0.1,
        n=35,
        missed=0,
        batches=(16, 1024),
        draws=np.empty((0, 2)),
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


def test_what_the_curves_of_the_course_come_to() -> None:
    def curve(figure: str, series: str, y: list[float | None]) -> dict[str, Any]:
        titles = {"lr": "Loss by rate", "epoch_time": "Time of an epoch", "noise_ball": "Noise ball"}
        return {"figure": figure, "title": titles[figure], "series": series, "x": [16, 1024], "y": y, "y_label": "s"}

    rows = [
        curve("lr", "η = 0.1", [0.5, 0.25]),
        curve("lr", "η = 1", [0.5, None]),
        curve("lr", "η = 0.3", [0.5, 0.125]),
        curve("epoch_time", "1 rank", [2.0, 4.0]),
        curve("epoch_time", "2 ranks", [3.0, 1.5]),
        curve("noise_ball", "subsets", [1.0, 1.0]),
    ]
    assert summarise_record(Record({"benchmark": "course"}, tuple(rows))) == (
        "Loss by rate, at the end: 0.125 with η = 0.3, 0.250 with η = 0.1 and ∞ with η = 1. "
        "Time of an epoch, least s: 1.50 at 1,024 with 2 ranks and 2.00 at 16 with 1 rank. Drawn: Noise ball."
    )


def test_a_profile_alone_tells_what_was_measured() -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "profile", "part": "machine", "ranks": 2, "cores": 2},
        {"kind": "profile", "part": "compute", "workload": "cnn-b16"},
        {"kind": "profile", "part": "compute", "workload": "mlp512-b64"},
    ]
    assert summarise_record(Record({"benchmark": "scaling"}, tuple(rows))) == (
        "Measured, to predict from: computing of cnn-b16 and mlp512-b64, and all-reduces, with 2 ranks on 2 cores."
    )
    assert summarise_record(Record({"benchmark": "scaling"}, tuple(rows[1:]))) == "2 rows; see the section."


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
        {"harm": "kill-rank", "rounds": 3, "resumed": 2, "finished": 1, "slowest_end_seconds": 2.0, "problems": []},
        {"harm": "none", "rounds": 2, "resumed": 1, "finished": 2, "slowest_end_seconds": None, "problems": ["late"]},
    ]
    assert summary_of_record("chaos", harms) == (
        "A training was started 5 times, harmed in 3 of these starts and resumed from a checkpoint in 3; the slowest "
        "ended 2.00 s after the harm. 3 runs came to the end with the parameters of the undisturbed one, bit for bit. "
        "Problems: 1."
    )
    assert summary_of_record("chaos", harms[1:]).startswith(
        "A training was started 2 times, harmed in 0 of these starts and resumed from a checkpoint in 1. 2 runs"
    )
    assert summary_of_record("chaos", harms[:1]).endswith("Problems: none.")
    phases = {"launch": 0.02, "imports": 2.5, "total": 3.0, "help": 0.125, "interpreter": 9.0}
    shared = {"ranks": 2, "rounds": 7, "dataset": "digits"}
    assert summary_of_record("startup", [{**shared, "phase": p, "median_seconds": s} for p, s in phases.items()]) == (
        "2 ranks end their first step on digits 3.00 s after the launch (median of 7 rounds); the longest part is "
        "imports, 2.50 s. --help takes 0.125 s."
    )


def test_sentences_of_strategies_that_are_as_good_as_each_other() -> None:
    cases = {"sync": [0.9, 0.8, 0.7], "local": [0.7, 0.6, 0.5], "easgd": [0.69, 0.6, 0.6], "slowmo": [0.75, 0.7, 0.1]}
    rows = [{"study": "s", "case": case, "test_accuracies": found, "diverged": 0} for case, found in cases.items()]
    assert summary_of_record("strategies", rows).endswith(
        "The range over seeds of “sync” overlaps those of “slowmo” and “local”, so that there is no difference to "
        "report between them."
    )


def test_sentences_of_collectives_name_hosts_and_variants_and_leave_out_what_is_not_sound() -> None:
    shared: dict[str, Any] = {"op": "all_reduce", "ranks": 2, "rounds": 6, "hosts": 1, "bytes": 4096}

    def row(contender: str, milliseconds: float, variant: str = "in_place", **more: Any) -> dict[str, Any]:
        what = {"contender": contender, "ours": contender == "auto", "variant": variant, "wrong": 0, "bypass": False}
        return {**shared, **what, "median_seconds": milliseconds / 1e3, **more}

    rows = [row("auto", 2), row("auto", 1, "shared_result"), row("gloo", 4), row("gloo", 0.5, bytes=1024)]
    told = (
        "An all-reduce of 4 KiB among 2 ranks on one machine takes 1.00 ms with this package (shared result), 2.00 ms "
        "with this package (in place) and 4.00 ms with gloo (in place), in the median of 6 rounds."
    )
    assert summary_of_record("collectives", rows) == told
    unsound = [row("mpi", 0.1, wrong=3), row("nccl", 0.1, bypass=True), row("auto", 0.1, bytes=8192, wrong=1)]
    assert summary_of_record("collectives", [*rows, *unsound]) == (
        f"{told} Left out for wrong results: 2 of 7 rows. Left out as more bytes passed than the links carry: 1 of 7 "
        "rows."
    )
    assert "among 2 ranks on 4 hosts takes" in summary_of_record("collectives", [row("auto", 1, hosts=4)])


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
