"""In which order samples are visited, and which of them fall to which rank.

An epoch is one permutation of all samples, the same on every rank; step s of an epoch takes the s-th stretch of
`global_batch_size` of it, and each rank a contiguous part of that stretch. So the samples of a step do not depend on
the number of ranks, every sample is visited exactly once an epoch, and nothing is padded: where torch's
DistributedSampler repeats or drops samples, the last step is shorter here, and a rank's part of it may be empty.
"""

import hashlib

import torch
from torch import Tensor

from allreduce_sgd.errors import ConfigError

__all__ = ["EpochSampler", "evaluation_share", "share", "shares"]


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


class EpochSampler:
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
        self._epoch: int | None = None
        self._permutation = torch.empty(0, dtype=torch.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch; the last may be shorter."""
        return -(-self.length // self.global_batch_size)

    def global_count(self, step: int) -> int:
        """How many samples all ranks together take in `step` of an epoch."""
        stretch = self._stretch(step)
        return int(stretch.stop - stretch.start)

    def indices(self, epoch: int, step: int, rank: int, size: int) -> Tensor:
        """The indices (k,) int64 that `rank` of `size` takes in `step` of `epoch`; k may be 0."""
        stretch = self._stretch(step)
        part = share(stretch.stop - stretch.start, rank, size)
        return self.permutation(epoch)[stretch.start + part.start : stretch.start + part.stop]

    def permutation(self, epoch: int) -> Tensor:
        """All indices (length,) int64 in the order of `epoch`; kept until another epoch is asked for."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_epoch_seed(self.seed, epoch))
            self._permutation = torch.randperm(self.length, generator=generator)
            self._epoch = epoch
        return self._permutation

    def _stretch(self, step: int) -> slice:
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"no step {step} in an epoch of {self.steps_per_epoch}")
        start = step * self.global_batch_size
        return slice(start, min(start + self.global_batch_size, self.length))
