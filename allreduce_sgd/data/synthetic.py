"""Data made up on the spot: `synthetic[:SAMPLES,SHAPE,CLASSES]`, for benchmarks and tests of any size and shape.

Classification: one Gaussian cloud of unit deviation per class, with centres at random and about six deviations apart,
so that a good classifier reaches a few percent of errors and none reaches zero. Regression (CLASSES 0): a random
linear function of Gaussian inputs, of unit variance, plus noise of deviation 0.1.
"""

import math
import re

import torch

from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.split import Dataset, Split
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.user_code import refusing

__all__ = ["DEFAULT_SPECIFICATION", "load_synthetic"]

DEFAULT_SPECIFICATION = "4096,1x28x28,10"

_SEPARATION = 6.0
_NOISE = 0.1


def _parse(specification: str) -> tuple[int, tuple[int, ...], int]:
    match = re.fullmatch(r"(\d{1,12}),(\d{1,9}(?:x\d{1,9})*),(\d{1,9})", specification, re.ASCII)
    if match:
        samples, classes = int(match[1]), int(match[3])
        shape = tuple(int(size) for size in match[2].split("x"))
        if samples >= 2 and min(shape) >= 1 and classes != 1:
            return samples, shape, classes
    raise ConfigError(
        f"--dataset synthetic:{specification}: expected synthetic:SAMPLES,SHAPE,CLASSES as in "
        f"synthetic:{DEFAULT_SPECIFICATION}, with at least 2 samples, and CLASSES 0 (regression) or at least 2"
    )


def load_synthetic(options: DataOptions, specification: str, seed: int) -> Dataset:
    """SAMPLES samples of which the last `test_fraction` are the test split: inputs (n, *SHAPE) float32.

    Targets are labels (n,) int64, equally frequent, or values (n,) float32 for a regression. All follow from `seed`.

    Raises:
        ConfigError: the specification is malformed, or asks for more than memory holds.
    """
    samples, shape, classes = _parse(specification)
    name = f"synthetic:{specification}"
    features = math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    with refusing(f"--dataset {name}: cannot be made"):
        inputs = torch.randn(samples, features, generator=generator)
        if classes:
            targets = torch.randperm(samples, generator=generator) % classes
            # Two centres drawn with deviation s per feature are about s * sqrt(2 * features) apart.
            deviation = _SEPARATION / math.sqrt(2 * features)
            inputs += (torch.randn(classes, features, generator=generator) * deviation)[targets]
        else:
            weights = torch.randn(features, generator=generator) / math.sqrt(features)
            targets = inputs @ weights + _NOISE * torch.randn(samples, generator=generator)
        inputs = inputs.reshape(samples, *shape)
    train = samples - max(1, round(samples * options.test_fraction))
    return Dataset(
        name,
        Split(inputs[:train], targets[:train]),
        Split(inputs[train:], targets[train:]),
        shape,
        classes or None,
    )
