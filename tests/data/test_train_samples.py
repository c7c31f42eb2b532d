"""Training on some of the samples only."""

import pytest
import torch
from torch.utils.data import TensorDataset

from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.split import Dataset, MapSplit, Split
from allreduce_sgd.data.train_samples import with_train_samples
from allreduce_sgd.errors import ConfigError


def numbered(samples: int) -> Split:
    return Split(torch.arange(samples).float()[:, None], torch.arange(samples) % 2)


def chosen(dataset: Dataset) -> list[float]:
    inputs, targets = dataset.train.batch(torch.arange(len(dataset.train)))
    assert torch.equal(targets, inputs[:, 0].long() % 2)
    return inputs[:, 0].tolist()


@pytest.mark.parametrize("in_memory", [True, False])
def test_more_samples_include_fewer(in_memory: bool) -> None:
    split = numbered(50)
    pairs = TensorDataset(split.inputs, split.targets)
    whole = Dataset("numbers", split if in_memory else MapSplit("train", pairs, 2), numbered(5), (1,), 2)
    few, more = (chosen(with_train_samples(whole, count)) for count in (5, 20))
    assert (len(few), len(more)) == (5, 20)
    assert set(few) < set(more)
    assert more == sorted(more) != list(range(20))
    assert chosen(with_train_samples(whole, 50)) == chosen(whole)
    assert len(with_train_samples(whole, 5).test) == 5


def test_inputs_are_standardised_by_the_samples_that_are_trained_on() -> None:
    dataset = load_dataset(DataOptions(train_samples=100), 0)
    inputs, _ = dataset.train.batch(torch.arange(100))
    assert inputs.shape == (100, 1, 8, 8)
    assert float(inputs.mean().abs()) < 1e-5
    assert len(dataset.test) == len(load_dataset(DataOptions(), 0).test)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--train-samples 9: numbers has 8; allowed are 1 to 8$"):
        with_train_samples(Dataset("numbers", numbered(8), numbered(2), (1,), 2), 9)
