import math
from collections.abc import Sequence

import pytest

from benchmarks.speedup import best_serial, by_cell, speed_up, speed_up_range
from benchmarks.study.results import Cell, Run
from tests.benchmarks.study_runs import cell, run

SERIAL_1 = cell("serial", 1)
SERIAL_64 = cell("serial", 64)
PARALLEL = cell("allreduce_sgd", 64, ranks=4)


def runs(cell: Cell, seconds: Sequence[float], samples: Sequence[float]) -> list[Run]:
    pairs = zip(seconds, samples, strict=True)
    return [run(cell, second, sample, seed) for seed, (second, sample) in enumerate(pairs)]


def test_speed_up_is_hardware_times_statistical_efficiency() -> None:
    cells = {
        SERIAL_1: runs(SERIAL_1, [40, 41, 39], [2000, 2050, 1950]),
        SERIAL_64: runs(SERIAL_64, [10, 12, 11], [4000, 4800, 4400]),
    }
    parallel = runs(PARALLEL, [4, 5, 6], [4000, 5500, 6000])
    gain = speed_up(parallel, cells)
    assert gain.accuracy_over_batch_1 == pytest.approx(40 / 5)
    assert gain.accuracy_over_best == pytest.approx(11 / 5)
    assert gain.statistical_efficiency is not None
    assert gain.hardware_efficiency is not None
    assert gain.statistical_efficiency == pytest.approx(4400 / 5500)
    assert gain.hardware_efficiency == pytest.approx((5500 / 5) / (4400 / 11))
    assert gain.hardware_efficiency * gain.statistical_efficiency == pytest.approx(gain.accuracy_over_best)
    assert gain.same_batch == gain.epoch_over_best == pytest.approx(1000 / 400)
    assert gain.epoch_over_batch_1 == pytest.approx(1000 / 50)
    assert best_serial(cells) == SERIAL_64
    extent = speed_up_range(parallel, cells)
    assert extent == pytest.approx((11 / 6, 11 / 4))


def test_a_missed_target_is_infinitely_late() -> None:
    reaching = {SERIAL_64: runs(SERIAL_64, [10, 11, 12], [4000, 4000, 4000])}
    parallel = runs(PARALLEL, [1, math.inf, math.inf], [4000, math.inf, math.inf])
    late = speed_up(parallel, reaching)
    assert late.accuracy_over_best == 0
    assert late.hardware_efficiency is None
    assert late.accuracy_over_batch_1 is None
    assert speed_up_range(parallel, reaching) == (0, 11)
    missing = {SERIAL_64: runs(SERIAL_64, [math.inf] * 3, [math.inf] * 3)}
    assert speed_up(runs(PARALLEL, [1, 1, 1], [4000] * 3), missing).accuracy_over_best is None
    assert best_serial(missing) is None
    assert speed_up_range(parallel, missing) is None


def test_without_a_baseline_nothing_is_claimed() -> None:
    gain = speed_up(runs(PARALLEL, [1, 1, 1], [4000] * 3), {})
    assert set(vars(gain).values()) == {None}


def test_tuning_runs_do_not_count() -> None:
    tuning = run(PARALLEL, 1, 4000, seed=1000, phase="tuning")
    measured = run(PARALLEL, 2, 4000)
    assert by_cell([tuning, measured]) == {PARALLEL: [measured]}
