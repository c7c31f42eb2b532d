"""Which samples make the mini-batch of a step, and which of them fall to which rank.

The mini-batch of a step follows from the seed, the epoch and the step, and each rank takes a contiguous part of it; so
the samples of a step do not depend on the number of ranks.

- epoch: an epoch is one permutation of all samples; step s of it takes the s-th stretch of `global_batch_size`. Every
  sample is visited exactly once an epoch, and nothing is padded: where torch's DistributedSampler repeats or drops
  samples, the last step is shorter here, and a rank's part of it may be empty.
- uniform: every mini-batch is a subset of all N samples, drawn uniformly and independently of the others. The variance
  of its mean is (N - b) / (b (N - 1)) times that of a sample.
- replacement: every sample of every mini-batch is drawn uniformly and independently: 1 / b times.

The last two are what theory mostly supposes. Their epochs have as many steps as those of the first, all of them whole.
"""

import hashlib
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from allreduce_sgd.data.options import SAMPLINGS
from allreduce_sgd.errors import ConfigError

__all__ = [
    "EpochSampler",
    "ReplacementSampler",
    "Sampler",
    "UniformSampler",
    "build_sampler",
    "evaluation_share",
    "share",
    "shares",
]


def share(length: int, part: int, parts: int) -> slice:
    """The slice of 0..length-1 that belongs to `part` of `parts`: contiguous, sizes differing by at most one.

    The first (length mod parts) parts have one more; a share may be empty.
    """
    if length < 0 or not 0 <= part < parts:
        raise ValueError(f"no part {part} of {parts} for {length} samples")
    quotient, remainder = divmod(length, parts)
    start = part * quotient + min(part, remainder)
    return slice(start, start + quotient + (part < remainder))


def shares(length: int, parts: int) -> list[slice]:
    """All `parts` shares of 0..length-1, in order; together they cover it without overlap."""
    return [share(length, part, parts) for part in range(parts)]


def evaluation_share(length: int, rank: int, size: int) -> slice:
    """The samples that `rank` of `size` evaluates: a contiguous share of 0..length-1, unpadded, perhaps empty."""
    return share(length, rank, size)


def _epoch_seed(seed: int, epoch: int) -> int:
    # Hashed, so that (seed, epoch + 1) and (seed + 1, epoch) are unrelated, as a sum of both would not be.
    return int.from_bytes(hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=8).digest(), "big")


class Sampler(ABC):
    """The indices of every epoch, step and rank; any of them may be asked for, in any order."""

    def __init__(self, length: int, global_batch_size: int, seed: int) -> None:
        """For `length` samples, of which every step takes `global_batch_size` over all ranks.

        Raises:
            ConfigError: the batch size is not at least 1.
            ValueError: there are no samples.
        """
        if global_batch_size < 1:
            raise ConfigError(f"--global-batch-size {global_batch_size}: must be at least 1")
        if length < 1:
            raise ValueError(f"{length} samples cannot be sampled")
        self.length = length
        self.global_batch_size = global_batch_size
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch: as many as it takes to visit `length` samples."""
        return -(-self.length // self.global_batch_size)

    def global_count(self, step: int) -> int:
        """How many samples all ranks together take in `step` of an epoch."""
        self._check_step(step)
        return self._count(step)

    def indices(self, epoch: int, step: int, rank: int, size: int) -> Tensor:
        """The indices (k,) int64 that `rank` of `size` takes in `step` of `epoch`; k may be 0."""
        self._check_step(step)
        return self._batch(epoch, step)[share(self._count(step), rank, size)]

    def visit(self, epoch: int, step: int) -> int:
        """A number that tells this use of a sample in `step` of `epoch` from its other uses."""
        return epoch * self.steps_per_epoch + step

    @abstractmethod
    def _count(self, step: int) -> int:
        """How many samples the mini-batch of a step has."""

    @abstractmethod
    def _batch(self, epoch: int, step: int) -> Tensor:
        """The indices (count,) int64 of a mini-batch, in an order that favours no part of it."""

    def _check_step(self, step: int) -> None:
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"no step {step} in an epoch of {self.steps_per_epoch}")


class EpochSampler(Sampler):
    """Every sample once an epoch, in an order of its own."""

    def __init__(self, length: int, global_batch_size: int, seed: int) -> None:
        super().__init__(length, global_batch_size, seed)
        self._epoch: int | None = None
        self._permutation = torch.empty(0, dtype=torch.int64)

    def permutation(self, epoch: int) -> Tensor:
        """All indices (length,) int64 in the order of `epoch`; kept until another epoch is asked for."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_epoch_seed(self.seed, epoch))
            self._permutation = torch.randperm(self.length, generator=generator)
            self._epoch = epoch
        return self._permutation

    def visit(self, epoch: int, step: int) -> int:
        """The epoch, whatever the mini-batches: it uses every sample once."""
        return epoch

    def _count(self, step: int) -> int:
        return min(self.global_batch_size, self.length - step * self.global_batch_size)

    def _batch(self, epoch: int, step: int) -> Tensor:
        start = step * self.global_batch_size
        return self.permutation(epoch)[start : start + self.global_batch_size]


class UniformSampler(Sampler):
    """A subset of all samples for every step, whatever the other steps have; all of them if there are no more."""

    def _count(self, step: int) -> int:
        return min(self.global_batch_size, self.length)

    def _batch(self, epoch: int, step: int) -> Tensor:
        generator = np.random.default_rng([self.seed, epoch, step])
        return torch.from_numpy(generator.choice(self.length, self._count(step), replace=False))


class ReplacementSampler(Sampler):
    """Samples drawn one by one from all of them, so that a mini-batch may have the same one twice."""

    def _count(self, step: int) -> int:
        return self.global_batch_size

    def _batch(self, epoch: int, step: int) -> Tensor:
        generator = np.random.default_rng([self.seed, epoch, step])
        return torch.from_numpy(generator.integers(self.length, size=self.global_batch_size))


def build_sampler(sampling: str, length: int, global_batch_size: int, seed: int) -> Sampler:
    """The sampler that `--sampling` names.

    Raises:
        ConfigError: the batch size is not at least 1.
        ValueError: there are no samples.
    """
    kinds: tuple[type[Sampler], ...] = (EpochSampler, UniformSampler, ReplacementSampler)
    return dict(zip(SAMPLINGS, kinds, strict=True))[sampling](length, global_batch_size, seed)
