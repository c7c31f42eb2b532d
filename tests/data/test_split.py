from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from allreduce_sgd.data.holdout import hold_out
from allreduce_sgd.data.split import Dataset, MapSplit, Split
from allreduce_sgd.data.standardize import mean_and_deviation, standardized
from allreduce_sgd.errors import ConfigError


def split(count: int = 6, classes: int = 3) -> Split:
    return Split(torch.randn(count, 4), torch.arange(count) % classes)


def dataset(train: Split, classes: int | None = 3, test: Split | None = None) -> Dataset:
    return Dataset("mine", train, test or split(), (4,), classes)


class Squares(TorchDataset[Any]):
    def __init__(self, count: int, bad: int | None = None) -> None:
        self.count = count
        self.bad = bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index == self.bad:
            raise OSError("disk on\nfire")
        return np.full(2, index, np.float64), index % 3


def test_batches() -> None:
    samples = split()
    inputs, targets = samples.batch(torch.tensor([4, 1]))
    assert torch.equal(inputs, samples.inputs[[4, 1]])
    assert targets.tolist() == [1, 1]
    nothing = samples.batch(torch.empty(0, dtype=torch.int64))
    assert [tuple(part.shape) for part in nothing] == [(0, 4), (0,)]
    assert len(samples) == 6


def with_value(value: float) -> Split:
    bad = split()
    bad.inputs[2, 1] = value
    bad.inputs[4, 1] = value
    return bad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_inputs_that_are_not_finite(value: float) -> None:
    with pytest.raises(ConfigError, match="mine, train split: sample 2 has NaN or Inf in its inputs"):
        dataset(with_value(value))
    with pytest.raises(ConfigError, match="mine, test split: sample 2"):
        dataset(split(), test=with_value(value))


def test_infinities_that_cancel_are_found_and_large_numbers_are_not() -> None:
    cancelling = split()
    cancelling.inputs[1, 0], cancelling.inputs[3, 0] = float("inf"), float("-inf")
    with pytest.raises(ConfigError, match="sample 1 has NaN or Inf"):
        dataset(cancelling)
    dataset(Split(torch.full((6, 4), 3e38), torch.zeros(6, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("train", "classes", "problem"),
    [
        (Split(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), 3, "the split is empty"),
        (Split(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)), 3, "differ in length"),
        (Split(torch.zeros(3, 4), torch.tensor([0, 3, 1])), 3, r"sample 1 has target 3; allowed are 0\.\.2"),
        (Split(torch.zeros(3, 4), torch.tensor([0, 1, -1])), 3, "sample 2 has target -1"),
        (Split(torch.zeros(2, 4), torch.tensor([[0, 1], [1, 7]])), 3, "sample 1 has target 7"),
        (Split(torch.zeros(2, 4), torch.tensor([0.0, float("nan")])), None, "sample 1 has NaN or Inf in its targets"),
        (Split(torch.zeros(2, 4), torch.zeros(2)), 3, "3 classes need integer targets"),
        (Split(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)), None, "needs floating targets"),
        (Split(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)), 3, r"shape \(5,\); expected \(4,\)"),
    ],
)
def test_unfit_samples(train: Split, classes: int | None, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^data set mine, train split: .*{problem}"):
        dataset(train, classes)


def test_map_style() -> None:
    samples = MapSplit("here", Squares(5), 3)
    assert len(samples) == 5
    inputs, targets = samples.batch(torch.tensor([4, 2]))
    assert torch.equal(inputs, torch.tensor([[4.0, 4.0], [2.0, 2.0]]))
    assert inputs.dtype == torch.float32
    assert targets.tolist() == [1, 2]
    nothing = samples.batch(torch.empty(0, dtype=torch.int64))
    assert [tuple(part.shape) for part in nothing] == [(0, 2), (0,)]
    assert Dataset("mine", samples, samples, (2,), 3).kind == "features"


def test_map_style_mistakes() -> None:
    with pytest.raises(ConfigError, match="here: the split is empty"):
        MapSplit("here", Squares(0), 3)
    with pytest.raises(ConfigError, match="here: sample 3 raised: OSError: disk on fire") as caught:
        MapSplit("here", Squares(5, bad=3), 3).batch(torch.tensor([1, 3]))
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(ConfigError, match="here: sample 2 has target 2"):
        MapSplit("here", Squares(5), 2).batch(torch.tensor([4, 2]))
    with pytest.raises(ConfigError, match="no pair"):
        MapSplit("here", [1, 2], 2)
    with pytest.raises(ConfigError, match="cannot be made into one batch"):
        MapSplit("here", [(object(), 1)], 2)


def test_hold_out_is_stratified_fixed_and_complete() -> None:
    targets = torch.tensor([0] * 50 + [1] * 20)
    inputs = torch.arange(70.0)[:, None]
    train, test = hold_out(Split(inputs, targets), 0.2)
    assert torch.bincount(test.targets).tolist() == [10, 4]
    assert sorted(torch.cat([train.inputs, test.inputs]).flatten().tolist()) == list(range(70))
    again = hold_out(Split(inputs, targets), 0.2)[1]
    assert torch.equal(test.inputs, again.inputs)
    assert len(hold_out(Split(inputs, torch.rand(70)), 0.1)[1]) == 7


@pytest.mark.parametrize("shape", [(5000, 3), (5000, 2, 4, 3)])
def test_mean_and_deviation(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape) * 3 + 7
    mean, deviation = mean_and_deviation(values)
    channels: Tensor = values.double().transpose(0, 1).flatten(1)
    assert torch.allclose(mean, channels.mean(1))
    assert torch.allclose(deviation, channels.std(1, correction=0))


def test_a_constant_feature_is_only_shifted() -> None:
    train = split()
    train.inputs[:, 1] = 0.1
    before = train.inputs.clone()
    changed = standardized(dataset(train)).train
    assert isinstance(changed, Split)
    assert torch.allclose(changed.inputs[:, 1], torch.zeros(6), atol=1e-6)
    assert torch.allclose(changed.inputs[:, 0].std(correction=0), torch.tensor(1.0), atol=1e-5)
    assert torch.equal(train.inputs, before)
