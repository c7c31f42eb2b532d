"""Samples held out of the training set: which, how many, and of every kind of data set."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allreduce_sgd.data.holdout import hold_out_validation
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.split import Dataset, MapSplit, Samples, Split, Subset
from allreduce_sgd.errors import ConfigError


def everything(samples: Samples | None) -> list[list[float]]:
    assert samples is not None
    inputs, targets = samples.batch(torch.arange(len(samples)))
    return torch.cat([inputs.flatten(1).double(), targets.reshape(len(targets), -1).double()], 1).tolist()


def of_tensors() -> Dataset:
    train = Split(torch.arange(40.0).view(20, 2), torch.arange(20) % 3)
    return Dataset("tensors", train, train, (2,), 3)


def of_map_style() -> Dataset:
    train = MapSplit("map", [(torch.tensor([float(i)]), float(i)) for i in range(20)], None)
    return Dataset("map", train, train, (1,), None)


def of_sparse() -> Dataset:
    return load_dataset(DataOptions(dataset="synthetic-sparse:25,10,2", density=0.3), 0)


@pytest.mark.parametrize("make", [of_tensors, of_map_style, of_sparse])
def test_every_training_sample_is_in_one_of_the_parts_in_order(make: Callable[[], Dataset]) -> None:
    whole = make()
    before = everything(whole.train)
    divided = hold_out_validation(whole, 0.25)
    train, validation = everything(divided.train), everything(divided.validation)
    assert (len(train), len(validation)) == (15, 5)
    assert sorted(train + validation) == sorted(before)
    places = [before.index(sample) for sample in validation]
    assert places == sorted(places) != list(range(15, 20))
    assert [before.index(sample) for sample in train] == sorted(set(range(20)) - set(places))
    assert everything(divided.test) == everything(whole.test)
    assert divided.sparse_features == whole.sparse_features
    # The same another time.
    assert everything(hold_out_validation(whole, 0.25).validation) == validation
    assert isinstance(divided.validation, Subset if isinstance(whole.train, MapSplit) else Split)


def test_of_a_text_it_is_the_last_part(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("abcdefghijklmnopqrstuvwxyz" * 4)
    options = {"dataset": f"text:{file}", "block_length": 8}
    whole = load_dataset(DataOptions(**options), 0)  # type: ignore[arg-type]
    divided = load_dataset(DataOptions(**options, validation_fraction=0.3), 0)  # type: ignore[arg-type]
    assert everything(divided.train) + everything(divided.validation) == everything(whole.train)
    assert len(everything(divided.validation)) == 3


def test_seeds_do_not_matter_and_only_training_samples_are_standardised_by() -> None:
    divided = [load_dataset(DataOptions(validation_fraction=0.2), seed) for seed in (0, 7)]
    assert everything(divided[0].validation) == everything(divided[1].validation)
    assert (len(divided[0].train), len(everything(divided[0].validation))) == (1150, 288)
    train = divided[0].train
    assert isinstance(train, Split)
    assert abs(float(train.inputs.mean())) < 1e-5
    assert abs(float(train.inputs.std()) - 1) < 1e-3


@pytest.mark.parametrize(("fraction", "held"), [(0.01, 0), (0.99, 20)])
def test_neither_part_may_be_empty(fraction: float, held: int) -> None:
    with pytest.raises(ConfigError, match=f"--validation-fraction {fraction}: of the 20 .* it holds out {held}; "):
        hold_out_validation(of_tensors(), fraction)
