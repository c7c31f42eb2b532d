import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from benchmarks.runs import Cell, Evaluation, Outcome
from benchmarks.speedup import at_best_rate, by_cell, speed_up

SERIAL_1 = Cell("serial", "sync", 1, 1, 1, 0.01)
SERIAL_64 = Cell("serial", "sync", 1, 1, 64, 0.1)
PARALLEL = Cell("allreduce_sgd", "sync", 4, 1, 64, 0.1)


def runs(cell: Cell, seconds: Sequence[float], samples: Sequence[float], accuracy: float = 0.9) -> list[Outcome]:
    """Runs that compute as many samples per second as the median run; a missed target still has a speed."""
    return [
        Outcome(
            cell=cell,
            seed=seed,
            reached=not math.isinf(second),
            seconds=second,
            wall_seconds=second + 1,
            samples=sample,
            steps=sample / cell.global_batch_size,
            sent_bytes=0.0,
            samples_per_second=100.0 if math.isinf(second) else sample / second,
            evaluations=(Evaluation(1, 1, 1.0, 1.0, accuracy),),
        )
        for seed, (second, sample) in enumerate(zip(seconds, samples, strict=True))
    ]


def test_speed_up_is_hardware_times_statistical_efficiency() -> None:
    cells = {
        SERIAL_1: runs(SERIAL_1, [40, 41, 39], [2000, 2050, 1950]),
        SERIAL_64: runs(SERIAL_64, [10, 12, 11], [4000, 4800, 4400]),
    }
    gain = speed_up(runs(PARALLEL, [4, 5, 6], [4000, 5500, 6000]), cells)
    assert gain.accuracy_over_batch_1 == pytest.approx(40 / 5)
    assert gain.accuracy_over_best == pytest.approx(11 / 5)
    assert gain.statistical_efficiency is not None
    assert gain.hardware_efficiency is not None
    assert gain.statistical_efficiency == pytest.approx(4400 / 5500)
    assert gain.hardware_efficiency == pytest.approx((5500 / 5) / (4400 / 11))
    assert gain.hardware_efficiency * gain.statistical_efficiency == pytest.approx(gain.accuracy_over_best)
    assert gain.same_batch == gain.epoch_over_best == pytest.approx(1000 / 400)
    assert gain.epoch_over_batch_1 == pytest.approx(1000 / 50)


def test_a_missed_target_is_infinitely_late() -> None:
    reaching = {SERIAL_64: runs(SERIAL_64, [10, 11, 12], [4000, 4000, 4000])}
    late = speed_up(runs(PARALLEL, [1, math.inf, math.inf], [4000, math.inf, math.inf]), reaching)
    assert late.accuracy_over_best == 0
    assert late.hardware_efficiency is None
    assert late.accuracy_over_batch_1 is None
    missing = {SERIAL_64: runs(SERIAL_64, [math.inf] * 3, [math.inf] * 3)}
    assert speed_up(runs(PARALLEL, [1, 1, 1], [4000] * 3), missing).accuracy_over_best is None


def test_without_a_baseline_nothing_is_claimed() -> None:
    gain = speed_up(runs(PARALLEL, [1, 1, 1], [4000] * 3), {})
    assert set(vars(gain).values()) == {None}


def test_the_best_learning_rate_counts() -> None:
    slow, fast, failing = PARALLEL, replace(PARALLEL, lr=0.2), replace(PARALLEL, lr=0.4)
    everything = runs(slow, [9, 9], [1, 1]) + runs(fast, [5, 6], [1, 1]) + runs(failing, [1, math.inf], [1, math.inf])
    assert list(at_best_rate(by_cell(everything))) == [fast]


def test_where_none_reaches_the_target_the_most_accurate_rate_counts() -> None:
    worse = runs(PARALLEL, [math.inf], [math.inf], accuracy=0.5)
    better = runs(replace(PARALLEL, lr=0.2), [math.inf], [math.inf], accuracy=0.8)
    assert list(at_best_rate(by_cell(worse + better))) == [better[0].cell]
