"""Synthetic sparse samples, for linear models of many features, of which each sample has few.

The samples are like those of categorical data coded one-hot (as in predicting clicks): the features fall into k equal
fields, and each sample has one feature of every field, drawn uniformly, with a Gaussian value. So the share of features
that a sample has, the density, is that with which each feature occurs. Labels are those of the largest score of a
linear model drawn at random, but for one in twenty, which is another; so a good model comes near 5 % of errors, given
many samples per feature.

Encoding: a sample is a tensor (k, 2) float32 of pairs (index, value), since batches are dense tensors. float32 counts
exactly up to 2^24, which limits the number of features.
"""

import re

import torch
from torch import Tensor

from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.split import Dataset, Split
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.user_code import refusing

__all__ = ["DEFAULT_SPARSE_SPECIFICATION", "load_synthetic_sparse"]

DEFAULT_SPARSE_SPECIFICATION = "20000,1000,2"

_MOST_FEATURES = 2**24
_NOISE = 0.05
# Rows of weights are gathered for so many samples at once.
_CHUNK = 4096


def _parse(specification: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d{1,12}),(\d{1,9}),(\d{1,9})", specification, re.ASCII)
    if match:
        samples, features, classes = (int(number) for number in match.groups())
        if samples >= 2 and 1 <= features <= _MOST_FEATURES and classes >= 2:
            return samples, features, classes
    raise ConfigError(
        f"--dataset synthetic-sparse:{specification}: expected synthetic-sparse:SAMPLES,FEATURES,CLASSES as in "
        f"synthetic-sparse:{DEFAULT_SPARSE_SPECIFICATION}, with at least 2 samples and 2 classes, and 1 to "
        f"{_MOST_FEATURES} features"
    )


def load_synthetic_sparse(options: DataOptions, specification: str, seed: int) -> Dataset:
    """SAMPLES samples of which the last `test_fraction` are the test split: inputs (n, k, 2) float32, targets (n,).

    k is `density` times FEATURES, rounded, at least 1; indices ascend. All follows from `seed`.

    Raises:
        ConfigError: the specification is malformed, or asks for more than memory holds.
    """
    samples, features, classes = _parse(specification)
    name = f"synthetic-sparse:{specification}"
    fields = max(1, round(options.density * features))
    generator = torch.Generator().manual_seed(seed)
    with refusing(f"--dataset {name} --density {options.density:g}: cannot be made"):
        edges = torch.arange(fields + 1) * features // fields
        widths = edges.diff()
        # In double precision, so that the last feature of a wide field is drawn, and none beyond.
        drawn = torch.rand(samples, fields, generator=generator, dtype=torch.float64)
        indices = edges[:-1] + (drawn * widths).long()
        values = torch.randn(samples, fields, generator=generator)
        weights = torch.randn(features, classes, generator=generator)
        targets = _labels(indices, values, weights)
        noisy = torch.rand(samples, generator=generator) < _NOISE * classes / (classes - 1)
        targets = torch.where(noisy, torch.randint(classes, (samples,), generator=generator), targets)
        inputs = torch.stack([indices.float(), values], dim=2)
    train = samples - max(1, round(samples * options.test_fraction))
    return Dataset(
        name,
        Split(inputs[:train], targets[:train]),
        Split(inputs[train:], targets[train:]),
        (fields, 2),
        classes,
        sparse_features=features,
    )


def _labels(indices: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    chunks = zip(indices.split(_CHUNK), values.split(_CHUNK), strict=True)
    return torch.cat([torch.einsum("nk,nkc->nc", part, weights[rows]).argmax(1) for rows, part in chunks])
