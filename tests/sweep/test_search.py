"""Which trials a search makes, and which of them go on."""

import math
from pathlib import Path

import pytest

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.sweep.places import places
from allreduce_sgd.sweep.search import all_trials, promoted, rungs
from allreduce_sgd.sweep.spec import Halving, Parameter, parse_spec

RANGE = {"low": 0.001, "high": 1.0, "log": True}


def trials_of(**values: object) -> list[dict[str, object]]:
    return [dict(trial.parameters) for trial in all_trials(parse_spec(Path("spec.toml"), values))]


def test_a_grid_has_all_combinations_and_its_last_parameter_changes_fastest() -> None:
    found = trials_of(method="grid", parameters={"lr": [0.1, 0.2], "epochs": {"low": 1, "high": 3, "points": 3}})
    assert found == [{"lr": lr, "epochs": epochs} for lr in (0.1, 0.2) for epochs in (1, 2, 3)]
    spaced = Parameter("lr", (), 0.001, 1.0, log=True).spaced(4)
    assert spaced == (0.001, 0.01, 0.1, 1.0)
    assert Parameter("lr", (), 0.0, 1.0).spaced(3) == (0.0, 0.5, 1.0)


def test_random_trials_follow_from_the_seed_and_differ() -> None:
    parameters = {"lr": RANGE, "momentum": [0.0, 0.9], "hidden": ["8", "16"], "batch-size": {"low": 8, "high": 64}}
    spec = {"method": "random", "trials": 50, "parameters": parameters}
    first = trials_of(**spec, seed=1)
    assert first == trials_of(**spec, seed=1)
    assert first != trials_of(**spec, seed=2)
    # More trials of the same seed begin with the same ones.
    assert trials_of(**{**spec, "trials": 60}, seed=1)[:50] == first
    assert len({tuple(each.items()) for each in first}) == 50
    # Every combination of a finite search, once.
    few = trials_of(method="random", trials=6, parameters={"momentum": [0.0, 0.5, 0.9], "lr": [0.1, 0.2]})
    assert len({tuple(each.items()) for each in few}) == 6


def test_draws_are_uniform_over_the_range_or_its_logarithm() -> None:
    spec = {"method": "random", "trials": 2000}
    lrs = [float(str(each["lr"])) for each in trials_of(**spec, parameters={"lr": RANGE})]
    assert all(0.001 <= lr <= 1 for lr in lrs)
    # A third of them in each decade: within four standard deviations.
    for decade in (-3, -2, -1):
        count = sum(decade <= math.log10(lr) < decade + 1 for lr in lrs)
        assert abs(count - 2000 / 3) < 4 * math.sqrt(2000 * 2 / 9)
    means = [float(str(each["lr"])) for each in trials_of(**spec, parameters={"lr": {"low": 2, "high": 4}})]
    assert abs(sum(means) / 2000 - 3) < 4 * 2 / math.sqrt(12 * 2000)


def test_whole_numbers_come_from_both_ends_and_between() -> None:
    for log in (False, True):
        parameter = Parameter("batch-size", (), 2, 5, log=log, integer=True)
        values = [parameter.at(position / 1000) for position in range(1000)]
        assert sorted(set(values)) == [2, 3, 4, 5]
        assert all(type(value) is int for value in values)
        # [v, v + 1) of [2, 6), or of its logarithm.
        share = math.log(3 / 2) / math.log(3) if log else 1 / 4
        assert abs(values.count(2) / 1000 - share) < 0.002


def test_halving_goes_up_by_eta_and_keeps_one_in_eta_rounded_up() -> None:
    assert rungs(Halving(1, 27)) == (1, 3, 9, 27)
    assert rungs(Halving(2, 10, eta=2)) == (2, 4, 8, 10)
    values = {number: float(number % 5) for number in range(10)}
    assert promoted(values, 3, "max") == [4, 9, 3, 8]
    assert promoted(values, 4, "min") == [0, 5, 1]
    assert promoted({0: 1.0, 1: None, 2: None, 3: None}, 2, "max") == [0]
    assert promoted({0: None}, 3, "min") == []


def test_values_that_cannot_differ_are_told() -> None:
    with pytest.raises(ConfigError, match="no more than 1 different"):
        trials_of(method="random", trials=9, parameters={"lr": {"low": 0.1, "high": 0.1 + 1e-15}})


def test_trials_at_the_same_time_have_cores_and_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2, 3, 4, 5, 6, 7, 9})
    found = places(8, 2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
    assert [place.cores for place in found] == [(0, 2), (3, 4), (5, 6), (7, 9)]
    assert [place.gpus for place in found] == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7")]
    assert {place.threads_per_rank for place in found} == {1}
    assert [(place.cores, place.threads_per_rank) for place in places(2, 1, {"CUDA_VISIBLE_DEVICES": ""})] == [
        ((0, 2, 3, 4), 4),
        ((5, 6, 7, 9), 4),
    ]
    # One rank for each core where nothing is said; of ten trials on eight cores two share one.
    assert len(places(None, 3, {})) == 2
    assert [place.cores for place in places(10, 1, {})][7:] == [(9,), (0,), (2,)]
    with pytest.raises(ConfigError, match="--ranks 7: not a multiple of --ranks-per-trial 2"):
        places(7, 2, {})
