"""Training on some of the samples only: `--train-samples`, as for experiments with overfitting.

They are the first of a fixed permutation, so every run has the same ones, and more of them include fewer.
"""

from dataclasses import replace

import torch

from allreduce_sgd.data.split import Dataset, selected
from allreduce_sgd.errors import ConfigError

__all__ = ["with_train_samples"]

_SEED = 20_153


def with_train_samples(dataset: Dataset, count: int) -> Dataset:
    """`dataset` with `count` of its training samples, in the order they had. Samples in memory are copied.

    Raises:
        ConfigError: there are fewer.
    """
    samples = len(dataset.train)
    if count > samples:
        raise ConfigError(f"--train-samples {count}: {dataset.name} has {samples}; allowed are 1 to {samples}")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(_SEED))
    return replace(dataset, train=selected(dataset.train, order[:count].sort().values))
