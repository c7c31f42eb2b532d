"""A data set in memory: a training and a test split, each giving the batch that belongs to a tensor of indices.

`Split` holds tensors; `MapSplit` has the same interface over a torch map-style data set, whose samples are made when
they are asked for. Neither shuffles nor shards: `sampling.py` decides which indices a rank asks for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from allreduce_sgd.data.checks import check_samples
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.user_code import refusing

__all__ = ["Dataset", "MapSplit", "MapStyle", "Samples", "Split", "Subset", "selected"]


class Samples(Protocol):
    """What training needs of a split."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs (k, *input_shape) and targets (k, ...) of `indices` (k,) int64; k may be 0."""
        ...


class MapStyle(Protocol):
    """A torch map-style data set: `torch.utils.data.Dataset` with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Split:
    """n samples as tensors: `inputs` (n, *input_shape), `targets` (n, ...)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs (k, *input_shape) and targets (k, ...) of `indices` (k,) int64; k may be 0."""
        return self.inputs[indices], self.targets[indices]


def _single(values: Tensor) -> Tensor:
    # Python floats collate to double, which no model here computes in.
    return values.float() if values.dtype == torch.float64 else values


class MapSplit:
    """The samples of a torch map-style data set, each an (input, target) pair, collated and checked per batch."""

    def __init__(self, where: str, samples: MapStyle, classes: int | None, ignore_index: int | None = None) -> None:
        """`where` names data set and split in error texts; the first sample is made at once, to learn the shapes.

        Raises:
            ConfigError: the data set is empty, or its first sample cannot be made or is not a pair.
        """
        self.where = where
        self.samples = samples
        self.classes = classes
        self.ignore_index = ignore_index
        with refusing(f"{where}: its length cannot be taken"):
            self._length = len(samples)
        if self._length == 0:
            raise ConfigError(f"{where}: the split is empty; at least one sample is needed")
        inputs, targets = self._collate([0])
        # A rank whose share is empty still needs tensors of the right shape and type.
        self._none = (inputs[:0], targets[:0])

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs (k, *input_shape) and targets (k, ...) of `indices` (k,) int64; k may be 0.

        Raises:
            ConfigError: the data set raised, or a sample is not finite or its target outside the classes.
        """
        if len(indices) == 0:
            return self._none
        inputs, targets = self._collate(indices.tolist())
        check_samples(self.where, inputs, targets, self.classes, indices, self.ignore_index)
        return inputs, targets

    def _collate(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        samples = []
        for index in indices:
            with refusing(f"{self.where}: sample {index} raised"):
                samples.append(self.samples[index])
        with refusing(f"{self.where}: samples {indices[0]} to {indices[-1]} cannot be made into one batch"):
            batch = default_collate(samples)
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch)):
            raise ConfigError(f"{self.where}: sample {indices[0]} is no pair (input, target) of numbers or tensors")
        return _single(batch[0]), _single(batch[1])


@dataclass(frozen=True, eq=False)
class Subset:
    """Those of `samples` that `indices` (n,) int64 name, in this order, made when they are asked for."""

    samples: Samples
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs (k, *input_shape) and targets (k, ...) of `indices` (k,) int64 into the subset; k may be 0."""
        return self.samples.batch(self.indices[indices])


def selected(samples: Samples, indices: Tensor) -> Samples:
    """Those of `samples` that `indices` (n,) int64 name: copied if they are in memory, else made when asked for."""
    return Split(*samples.batch(indices)) if isinstance(samples, Split) else Subset(samples, indices)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A checked data set. `validation` is what was held out of the training samples, None where nothing was.

    `classes` is None for a regression. `vocabulary` holds the characters of a text, at the positions of their codes.
    `sparse_features` is the number of features of sparse samples, whose inputs (k, 2) are pairs of index and value.
    Targets that are `ignore_index` count for nothing. `augmentation` changes inputs for training: it is called with
    those of a batch, the samples' indices in `train` and their visit (`Sampler.visit`).

    Raises:
        ConfigError: a split is empty, its samples fail `check_samples`, or the shapes do not fit `input_shape`.
    """

    name: str
    train: Samples
    test: Samples
    input_shape: tuple[int, ...]
    classes: int | None
    vocabulary: str | None = None
    sparse_features: int | None = None
    validation: Samples | None = None
    ignore_index: int | None = None
    augmentation: Callable[[Tensor, Tensor, int], Tensor] | None = None

    def __post_init__(self) -> None:
        for part, split in self.splits.items():
            where = f"data set {self.name}, {part} split"
            if not len(split):
                raise ConfigError(f"{where}: the split is empty; at least one sample is needed")
            if isinstance(split, Split):
                check_samples(where, split.inputs, split.targets, self.classes, ignore_index=self.ignore_index)
            shape = tuple(_nothing(split)[0].shape[1:])
            if shape != self.input_shape:
                raise ConfigError(f"{where}: inputs have the shape {shape}; expected {self.input_shape}")
            if 0 in shape:
                raise ConfigError(f"{where}: inputs have the shape {shape}; every dimension must be at least 1")

    @property
    def splits(self) -> dict[str, Samples]:
        """The splits that there are, by name."""
        parts = {"train": self.train, "test": self.test, "validation": self.validation}
        return {part: split for part, split in parts.items() if split is not None}

    @property
    def kind(self) -> Literal["features", "tokens", "sparse"]:
        """Whether inputs are numbers to compute with, integer codes to look up, or pairs of index and value."""
        if self.sparse_features is not None:
            return "sparse"
        return "features" if _nothing(self.train)[0].is_floating_point() else "tokens"

    def with_splits(self, change: Callable[[Samples], Samples]) -> "Dataset":
        """The same data set with `change` applied to all its splits."""
        validation = None if self.validation is None else change(self.validation)
        return replace(self, train=change(self.train), test=change(self.test), validation=validation)


def _nothing(split: Samples) -> tuple[Tensor, Tensor]:
    return split.batch(torch.empty(0, dtype=torch.int64))
