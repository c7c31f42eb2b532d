"""Uneven inputs: ranks that have run out of samples go on taking part in the collectives of the others.

As torch's `DistributedDataParallel.join` (Join context, torch.distributed.algorithms.join): before every forward pass
in training the ranks tell, in one all-reduce of 3 + size numbers, who still has input; a rank that has left the loop
answers for itself, with empty hands, until nobody has any. Then everyone takes the model of the last rank that had, of
several the highest, and while the loop lasts buffers come from the highest rank that still has input, as torch's do.
Within the context there is one backward pass for every forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from allreduce_sgd.gradients.replicate import broadcast_tensors, ranks_text

if TYPE_CHECKING:
    from allreduce_sgd.gradients.ddp import DistributedDataParallel

__all__ = ["Joining", "joined"]


class Joining:
    """What a rank says before every forward pass while the context lasts, and what it concludes from the others."""

    def __init__(
        self, replica: "DistributedDataParallel", by_initial_size: bool, throw_early: bool, by_samples: bool
    ) -> None:
        self._replica = replica
        self._by_initial_size = by_initial_size
        self._throw_early = throw_early
        self._by_samples = by_samples
        self.samples: int | None = None
        self.present: list[int] = []

    def announce(self, active: bool, synchronised: bool) -> int:
        """Tell the others, and set this rank's weight; returns how many ranks still have input. All ranks must call."""
        replica, comm = self._replica, self._replica.comm
        assert comm is not None
        samples = (self.samples or 0) if active else 0
        votes = torch.zeros(3 + comm.size, dtype=torch.int64)
        votes[:3] = torch.tensor([active and synchronised, samples, active and self.samples is None])
        votes[3 + comm.rank] = active
        syncing, all_samples, silent, *those = comm.all_reduce(votes).wait().tolist()
        self.present = [rank for rank, has_input in enumerate(those) if has_input]
        present = len(self.present)
        if present and syncing not in (0, present):
            raise RuntimeError("join: some ranks are within no_sync() and some are not; all must be, or none")
        if present < comm.size and self._throw_early:
            gone = [rank for rank in range(comm.size) if rank not in self.present]
            raise RuntimeError(f"join: {ranks_text(gone)} ran out of input")
        self.syncing = syncing > 0
        if present and self._by_samples:
            if silent:
                raise RuntimeError("join(weight_by_samples=True): call set_samples(n) before every forward pass")
            replica.set_gradient_weight(samples / all_samples if all_samples else 0.0)
        elif present:
            replica.set_gradient_weight(1.0 / (comm.size if self._by_initial_size else present))
        self.samples = None
        return present


@contextmanager
def joined(
    replica: "DistributedDataParallel", by_initial_size: bool, throw_early: bool, by_samples: bool
) -> Iterator[None]:
    """The body of `DistributedDataParallel.join` on more than one rank."""
    joining = Joining(replica, by_initial_size, throw_early, by_samples)
    replica.joining = joining
    try:
        yield
        _shadow(replica, joining)
    finally:
        replica.joining = None
        if replica.comm is not None:
            replica.set_gradient_weight(1.0 / replica.comm.size)


def _shadow(replica: "DistributedDataParallel", joining: Joining) -> None:
    comm = replica.comm
    assert comm is not None
    last = True
    while True:
        had_input = joining.announce(False, False)
        if had_input == 0:
            break
        last = False
        if joining.syncing:
            replica.zero_grad(set_to_none=True)
            replica.reduce_without_backward()
    lasts = torch.zeros(comm.size, dtype=torch.int64)
    lasts[comm.rank] = last
    comm.all_gather(lasts).wait()
    root = int(lasts.nonzero().max())
    broadcast_tensors([*replica.module.parameters(), *replica.module.buffers()], comm, root)
