"""Training on some of the samples only: `--train-samples`, as for experiments with overfitting.

They are the first of a fixed permutation, so every run has the same ones, and more of them include fewer.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allreduce_sgd.data.split import Dataset, Samples, Split
from allreduce_sgd.errors import ConfigError

__all__ = ["with_train_samples"]

_SEED = 20_153


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Those of `samples` that `indices` (n,) int64 name, made when they are asked for."""

    samples: Samples
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.samples.batch(self.indices[indices])


def with_train_samples(dataset: Dataset, count: int) -> Dataset:
    """`dataset` with `count` of its training samples, in the order they had. Samples in memory are copied.

    Raises:
        ConfigError: there are fewer.
    """
    samples = len(dataset.train)
    if count > samples:
        raise ConfigError(f"--train-samples {count}: {dataset.name} has {samples}; allowed are 1 to {samples}")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(_SEED))
    chosen = order[:count].sort().values
    train = dataset.train
    return replace(dataset, train=Split(*train.batch(chosen)) if isinstance(train, Split) else _Chosen(train, chosen))
