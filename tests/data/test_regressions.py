"""The regression data sets: diabetes, and houses that are made up."""

import numpy as np
import pytest
import torch

from allreduce_sgd.data import housing
from allreduce_sgd.errors import ConfigError
from tests.data.test_data_registry import load, tensors


def explained(inputs: torch.Tensor, targets: torch.Tensor, test: tuple[torch.Tensor, torch.Tensor]) -> float:
    """How much of the variance of the test targets least squares on the training samples explain."""
    columns, test_columns = (torch.cat([each.double(), torch.ones(len(each), 1)], 1) for each in (inputs, test[0]))
    weights = torch.linalg.lstsq(columns, targets.double()).solution
    rest = test[1] - test_columns @ weights
    return 1 - float(rest.square().mean() / test[1].double().var())


def test_diabetes_is_that_of_scikit_learn() -> None:
    from sklearn import datasets

    dataset = load("diabetes", standardize=False)
    train, test = tensors(dataset)
    assert (dataset.classes, dataset.input_shape, len(train), len(test)) == (None, (10,), 354, 88)
    features, targets = datasets.load_diabetes(return_X_y=True)
    ours = torch.cat([torch.cat([split.inputs, split.targets[:, None]], 1) for split in (train, test)])
    theirs = torch.from_numpy(np.column_stack([features, targets])).float()
    # Samples are told apart by all of their values.
    order = [part.double().matmul(torch.arange(1.0, 12.0, dtype=torch.float64)).argsort() for part in (ours, theirs)]
    torch.testing.assert_close(ours[order[0]], theirs[order[1]], rtol=1e-5, atol=1e-6)


def test_diabetes_is_standardised_by_the_training_set() -> None:
    train, test = tensors(load("diabetes"))
    assert float(train.inputs.mean(0).abs().max()) < 1e-5
    assert torch.allclose(train.inputs.std(0, unbiased=False), torch.ones(10), atol=1e-4)
    assert float(train.targets.mean()) == pytest.approx(0, abs=1e-5)
    assert float(train.targets.std(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert 0 < float(test.targets.mean().abs()) < 0.3
    # What regressions of these data are known to explain.
    assert 0.35 < explained(train.inputs, train.targets, (test.inputs, test.targets)) < 0.6


def test_houses_are_skewed_and_not_linear() -> None:
    dataset = load("synthetic-housing", standardize=False)
    train, test = tensors(dataset)
    assert (len(train) + len(test), dataset.input_shape, dataset.classes) == (20_640, (8,), None)
    columns = dict(zip(housing.FEATURES, train.inputs.unbind(1), strict=True))
    skewed = {"median_income", "average_rooms", "population", "average_occupancy"}
    for name, values in columns.items():
        skewness = float(((values - values.mean()) / values.std()).pow(3).mean())
        assert skewness > 0.6 if name in skewed else abs(skewness) < 1.5, name
    assert 3.5 < float(columns["median_income"].mean()) < 4.3
    assert float(columns["house_age"].max()) == 52
    assert 1000 < float(columns["population"].mean()) < 2000
    assert 32 < float(columns["latitude"].min()) < float(columns["latitude"].max()) < 43
    assert -125 < float(columns["longitude"].min()) < float(columns["longitude"].max()) < -114
    assert 1.5 < float(train.targets.mean()) < 2.8
    assert 0.01 < float((train.targets == train.targets.max()).float().mean()) < 0.15
    assert float(train.targets.max()) == 5
    linear = explained(train.inputs, train.targets, (test.inputs, test.targets))
    assert 0.5 < linear < 0.7

    def bent(inputs: torch.Tensor) -> torch.Tensor:
        standard = (inputs - train.inputs.mean(0)) / train.inputs.std(0)
        distances = [((inputs[:, 6:] - torch.tensor(city)).norm(dim=1) / -0.4).exp() for city in _CITIES]
        return torch.cat([standard, standard.square(), inputs[:, :1].log(), torch.stack(distances, 1)], 1)

    assert explained(bent(train.inputs), train.targets, (bent(test.inputs), test.targets)) > linear + 0.1


_CITIES = ((34.0, -118.1), (37.7, -122.1))


def test_houses_follow_from_the_seed_and_are_standardised() -> None:
    first, again, other = (tensors(load("Synthetic-Housing:500", seed=seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.targets, other.targets)
    assert len(first) == 400
    assert torch.allclose(first.inputs.std(0, unbiased=False), torch.ones(8), atol=1e-4)
    assert float(first.targets.std(unbiased=False)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("specification", ["", "1", "-5", "many", "10,2", "٣٣"])
def test_a_malformed_number_of_houses(specification: str) -> None:
    with pytest.raises(ConfigError, match=f"synthetic-housing:{specification}: expected synthetic-housing:SAMPLES"):
        load(f"synthetic-housing:{specification}")


def test_more_houses_than_memory_holds() -> None:
    with pytest.raises(ConfigError, match="--dataset synthetic-housing:999999999999: cannot be made"):
        load("synthetic-housing:999999999999")


def test_regressions_ignore_no_targets() -> None:
    with pytest.raises(ConfigError, match="--ignore-index -1: --dataset diabetes is a regression"):
        load("diabetes", ignore_index=-1)
