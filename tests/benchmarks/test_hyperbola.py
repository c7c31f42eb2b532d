from math import inf
from typing import Any

import numpy as np
import pytest

from benchmarks.hyperbola import Fit, fit_hyperbola, points_of
from benchmarks.study.results import Cell, Run, Study

BATCHES = (16, 32, 64, 128, 256, 512, 1024, 2048)
S_MIN, B_CRIT = 150.0, 200.0


def points(seed: int, noise: float, seeds: int = 5, batches: tuple[int, ...] = BATCHES) -> list[tuple[int, float]]:
    generator = np.random.default_rng(seed)
    return [
        (batch, S_MIN * (1 + B_CRIT / batch) * float(np.exp(noise * generator.standard_normal())))
        for batch in batches
        for _ in range(seeds)
    ]


def within(value: float, ends: tuple[float, float]) -> bool:
    return ends[0] <= value <= ends[1]


def test_exact_points_give_the_exact_curve() -> None:
    fit = fit_hyperbola(points(0, 0.0), resamples=10)
    assert (fit.s_min, fit.b_crit) == pytest.approx((S_MIN, B_CRIT), rel=1e-6)
    assert fit.s_min_range == pytest.approx((S_MIN, S_MIN), rel=1e-6)
    assert fit.b_crit_range == pytest.approx((B_CRIT, B_CRIT), rel=1e-6)
    assert fit.residual < 1e-6
    assert (fit.n, fit.missed) == (40, 0)
    assert fit.steps(B_CRIT) == pytest.approx(2 * S_MIN)
    assert fit.samples(B_CRIT) == pytest.approx(2 * fit.e_min)
    assert fit.samples(1e-6) == pytest.approx(fit.e_min)


def test_intervals_cover_the_truth_as_often_as_they_say_and_are_no_wider_than_needed() -> None:
    """38 of 40 are expected to."""
    fits = [fit_hyperbola(points(seed, 0.15), seed, resamples=60) for seed in range(20)]
    covered = [within(S_MIN, fit.s_min_range) for fit in fits] + [within(B_CRIT, fit.b_crit_range) for fit in fits]
    assert sum(covered) >= 34
    assert max(fit.b_crit_range[1] / fit.b_crit_range[0] for fit in fits) < 2.5


def test_one_run_per_batch_has_an_interval_too() -> None:
    fit = fit_hyperbola(points(3, 0.1, seeds=1), resamples=100)
    assert within(B_CRIT, fit.b_crit_range)
    assert 1.05 < fit.b_crit_range[1] / fit.b_crit_range[0] < 5


def test_a_wild_run_hardly_counts() -> None:
    wild = [*points(0, 0.02), (256, 100 * S_MIN)]
    fit = fit_hyperbola(wild, resamples=2)
    assert (fit.s_min, fit.b_crit) == pytest.approx((S_MIN, B_CRIT), rel=0.1)


def test_the_same_seed_gives_the_same_intervals_whatever_the_order() -> None:
    noisy = points(1, 0.2)
    fit = fit_hyperbola(noisy, seed=4, resamples=20)
    assert fit_hyperbola(noisy[::-1], seed=4, resamples=20) == fit
    assert fit_hyperbola(noisy, seed=5, resamples=20).b_crit_range != fit.b_crit_range


def test_what_small_batches_cannot_tell_stays_open() -> None:
    """Far below the critical batch steps are just inversely proportional to it."""
    fit = fit_hyperbola(
        [(batch, 1e6 / batch * factor) for batch in (1, 2, 4) for factor in (0.9, 1.0, 1.1)], resamples=80
    )
    assert fit.b_crit_range[1] == inf
    assert fit.s_min_range[0] == 0.0
    assert fit.samples(2) == pytest.approx(1e6, rel=0.05)
    assert "–∞]" in fit.describe()["B_crit, samples"]


def test_what_large_batches_cannot_tell_stays_open() -> None:
    fit = fit_hyperbola(
        [(batch, 100.0 * factor) for batch in (256, 512, 1024) for factor in (0.9, 1.0, 1.1)], resamples=80
    )
    assert fit.b_crit_range[0] == 0.0
    assert fit.steps(512) == pytest.approx(100, rel=0.05)


def test_runs_that_missed_the_target_are_left_out_and_counted() -> None:
    noisy = points(2, 0.1)
    fit = fit_hyperbola(noisy, resamples=10)
    with_missed = fit_hyperbola([*noisy, (4096, inf), (4096, inf), (16, inf)], resamples=10)
    assert (with_missed.n, with_missed.missed) == (40, 3)
    assert (with_missed.s_min, with_missed.b_crit) == (fit.s_min, fit.b_crit)


def test_a_table_has_all_there_is_to_tell() -> None:
    fit = Fit(150.0, 200.0, (140.0, 165.0), (180.0, inf), 0.034, 40, 2, (16, 256), np.empty((0, 2)))
    assert fit.describe() == {
        "S_min, steps": "150 [140–165]",
        "B_crit, samples": "200 [180–∞]",
        "E_min, samples": "30,000",
        "median error, %": "3.40",
        "runs": "40",
        "missed": "2",
    }


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([], "at 3 batches, not at 0"),
        ([(16, 10.0), (32, 5.0), (32, 6.0), (64, inf)], "at 3 batches, not at 2"),
        ([(16, 10.0), (32, 5.0), (64, 0.0)], "above zero"),
        ([(0, 10.0), (32, 5.0), (64, 1.0)], "above zero"),
        ([(16, float("nan")), (32, 5.0), (64, 1.0)], "above zero"),
    ],
)
def test_points_that_cannot_be_fitted(found: list[tuple[int, float]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit_hyperbola(found)


def run_of(steps: float, phase: Any = "measured", **cell: Any) -> Run:
    known = {"label": "x", "contender": "allreduce_sgd", "strategy": "sync", "ranks": 2, "threads": 1}
    return Run(
        cell=Cell(**{**known, "global_batch_size": 64, **cell}),
        phase=phase,
        lr=0.1,
        seed=0,
        reached=steps < inf,
        seconds=1.0,
        wall_seconds=1.0,
        samples=64 * steps,
        steps=steps,
        bytes=None,
        samples_per_second=1.0,
        communication_seconds=None,
        exposed_communication_seconds=None,
        train_seconds=1.0,
        noise_scale=None,
        folder="runs/x",
        evaluations=(),
    )


def test_the_points_of_a_study_are_its_measured_runs_of_synchronous_sgd() -> None:
    study = Study(
        {},
        (
            run_of(10.0),
            run_of(inf),
            run_of(30.0, contender="serial", strategy="serial", ranks=1, global_batch_size=1),
            run_of(40.0, contender="one_rank_all_cores", threads=2),
            run_of(99.0, phase="tuning"),
            run_of(99.0, strategy="local"),
            run_of(99.0, compression="sign"),
            run_of(99.0, flags=(("momentum", 0.5),)),
            run_of(99.0, contender="torch_ddp_gloo"),
        ),
    )
    assert points_of(study) == [(64, 10.0), (64, inf), (1, 30.0), (64, 40.0)]
