"""The period as a function of the step, and the switch of post-local SGD."""

from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.optim.schedule import factor
from allreduce_sgd.strategies.options import PERIOD_SCHEDULES, StrategyOptions
from allreduce_sgd.strategies.period import Period, build_period, switch_step


def exchanges(period: Period, steps: int) -> list[int]:
    """The steps, counted from 1, at which a run of so many exchanges."""
    found = [0]
    while found[-1] <= steps:
        found.append(found[-1] + period.at(found[-1]))
    return found[1:-1]


def constant(step: int) -> float:
    return 1.0


def test_a_constant_period_comes_first_exactly_at_its_step() -> None:
    assert exchanges(Period(7), 30) == [7, 14, 21, 28]
    assert exchanges(Period(1), 4) == [1, 2, 3, 4]


def test_a_rising_period_grows_linearly_from_one() -> None:
    period = Period(5, "rising", total_steps=100)
    assert [period.at(step) for step in (0, 12, 13, 37, 38, 62, 63, 87, 88, 100, 400)] == [
        *(1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5),
    ]
    gaps = [after - before for before, after in pairwise(exchanges(period, 100))]
    assert gaps == sorted(gaps)


def test_a_falling_period_shrinks_linearly_to_one() -> None:
    period = Period(5, "falling", total_steps=100)
    assert [period.at(step) for step in (0, 12, 13, 37, 38, 62, 63, 87, 88, 100, 400)] == [
        *(5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 1),
    ]
    assert exchanges(period, 100)[0] == 5


def test_post_local_is_synchronous_up_to_the_switch() -> None:
    assert exchanges(Period(4, switch=3), 16) == [1, 2, 3, 7, 11, 15]
    assert exchanges(Period(4, switch=0), 16) == [4, 8, 12, 16]
    rising = Period(3, "rising", total_steps=50, switch=10)
    assert [rising.at(step) for step in (0, 9, 10, 30, 50)] == [1, 1, 1, 2, 3]


def test_the_shortest_period_bounds_a_delay() -> None:
    assert Period(6).shortest == 6
    assert Period(6, switch=1).shortest == 1
    assert Period(6, "rising", 10).shortest == Period(6, "falling", 10).shortest == 1


@given(
    longest=st.integers(1, 40),
    schedule=st.sampled_from(PERIOD_SCHEDULES),
    total=st.integers(1, 300),
    switch=st.integers(0, 300),
    step=st.integers(0, 400),
)
def test_a_period_lies_between_one_and_its_longest(
    longest: int, schedule: str, total: int, switch: int, step: int
) -> None:
    period = Period(longest, schedule, total, switch)
    assert period.shortest <= period.at(step) <= longest


@pytest.mark.parametrize(("longest", "schedule"), [(0, "constant"), (-3, "rising"), (4, "wavy")])
def test_a_period_that_is_none_is_refused(longest: int, schedule: str) -> None:
    with pytest.raises(ValueError, match=f"is '?{longest if longest < 1 else schedule}'?, allowed are"):
        Period(longest, schedule)


def test_options_make_a_period() -> None:
    assert build_period(StrategyOptions("local"), 40, 10, constant) == Period(8, "constant", 40)
    options = StrategyOptions("slowmo", period=5, period_schedule="falling")
    assert build_period(options, 40, 10, constant) == Period(5, "falling", 40)
    assert build_period(StrategyOptions("post-local"), 40, 10, constant) == Period(16, "constant", 40, switch=20)
    assert build_period(StrategyOptions("post-local", switch="epoch:3"), 40, 10, constant).switch == 30


def test_a_period_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--period 500: the run has only 40 steps; choose 1 to 40"):
        build_period(StrategyOptions("diloco"), 40, 10, constant)
    with pytest.raises(ConfigError, match=r"^--period 2: the run has only 1 step; choose 1 to 1"):
        build_period(StrategyOptions("local", period=2), 1, 10, constant)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, 50), ("step:0", 0), ("step:37", 37), ("Step:100", 100), ("epoch:2", 40), ("epoch:5", 100)],
)
def test_a_switch_is_a_step(text: str | None, expected: int) -> None:
    assert switch_step(text, 100, 20, constant) == expected


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"), [("step", 0, 50), ("step", 10, 55), ("cosine", 10, 11), ("linear", 0, 1)]
)
def test_a_switch_at_the_first_fall_of_the_rate(schedule: str, warmup: int, expected: int) -> None:
    rate = partial(factor, OptimizerOptions(lr_schedule=schedule, warmup_steps=warmup), total_steps=100)
    assert switch_step("lr-drop", 100, 20, lambda step: rate(step=step)) == expected
    # Steps up to the switch have a rate that has not fallen, the next has.
    assert rate(step=expected) < rate(step=expected - 1) == max(rate(step=step) for step in range(100))


@pytest.mark.parametrize("text", ["half", "step", "step:", "step:-1", "step:1.5", "epoch:x", "steps:3", "step:3:4"])
def test_a_switch_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^--switch {text}: not a switch; choose step:N, epoch:N .* or lr-drop"):
        switch_step(text, 100, 20, constant)


def test_a_switch_outside_of_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--switch epoch:6: this is step 120, and the run has only 100"):
        switch_step("epoch:6", 100, 20, constant)
    with pytest.raises(ConfigError, match=r"^--switch lr-drop: the learning rate never falls in the 100 steps"):
        switch_step("lr-drop", 100, 20, constant)
