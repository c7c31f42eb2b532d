"""Standardising inputs: subtract the mean, divide by the standard deviation, both of the training set.

Per channel of inputs (channels, ...), per feature of inputs (features,); what does not vary is only shifted. The sums
are taken in double precision and in a fixed order, so that every rank computes the same bits.
"""

import torch
from torch import Tensor

from allreduce_sgd.data.split import Dataset, Samples, Split
from allreduce_sgd.errors import ConfigError

__all__ = ["mean_and_deviation", "standardized", "standardized_targets"]

_CHUNK = 4096


def mean_and_deviation(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of `inputs` (n, c, ...) per c, each (c,) float64."""
    columns = inputs.reshape(len(inputs), inputs.shape[1], -1)
    count = columns.shape[0] * columns.shape[2]
    # In chunks, since a copy of the whole in double precision may be gigabytes.
    chunks = columns.split(_CHUNK)
    mean = torch.stack([chunk.double().sum((0, 2)) for chunk in chunks]).sum(0) / count
    squares = [(chunk.double() - mean[:, None]).square_().sum((0, 2)) for chunk in chunks]
    return mean, (torch.stack(squares).sum(0) / count).sqrt()


def standardized(dataset: Dataset) -> Dataset:
    """`dataset` with standardised inputs.

    Raises:
        ConfigError: its inputs are tokens or sparse, or are made sample by sample by the user's own data set.
    """
    train = dataset.train
    if dataset.kind != "features":
        what = "integers" if dataset.kind == "tokens" else "pairs of index and value"
        raise ConfigError(f"--standardize with --dataset {dataset.name}: inputs are {what}; allowed is no")
    if not isinstance(train, Split) or not isinstance(dataset.test, Split):
        raise ConfigError(f"--standardize with --dataset {dataset.name}: a map-style data set must do this itself")
    if not dataset.input_shape:
        raise ConfigError(f"--standardize with --dataset {dataset.name}: inputs need at least one dimension")
    mean, deviation = mean_and_deviation(train.inputs)
    # Below this, what looks like variation is rounding of a constant.
    constant = deviation <= 1e-7 * mean.abs().clamp(min=1e-30)
    shape = (-1, *(1,) * (len(dataset.input_shape) - 1))
    shift = mean.float().reshape(shape)
    scale = deviation.masked_fill(constant, 1.0).reciprocal().float().reshape(shape)

    def change(split: Samples) -> Samples:
        assert isinstance(split, Split)
        return Split((split.inputs - shift).mul_(scale), split.targets)

    return dataset.with_splits(change)


def standardized_targets(dataset: Dataset) -> Dataset:
    """`dataset` with standardised targets (n,) of a regression, both splits by the training set's.

    So a mean squared error is the share of the variance that a model leaves unexplained, and steps of one size suit
    targets of any unit.
    """
    assert isinstance(dataset.train, Split)
    mean, deviation = mean_and_deviation(dataset.train.targets[:, None])

    def change(split: Samples) -> Samples:
        assert isinstance(split, Split)
        return Split(split.inputs, ((split.targets - mean) / deviation).float())

    return dataset.with_splits(change)
