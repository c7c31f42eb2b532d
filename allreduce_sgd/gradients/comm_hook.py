"""Communication hooks with the signature of torch's DDP: the user's own way of reducing a bucket.

`hook(state, bucket)` gets the undivided gradients of this rank and returns a future, torch's or one of our works, of
what is to become of the bucket: the hook divides by the number of ranks itself. Hooks of torch that talk to a process
group work with a state that names one (torch.distributed.algorithms.ddp_comm_hooks). A hook whose future starts
further collectives in callbacks, as PowerSGD's does, needs one bucket over Gloo, here as under torch's own wrapper:
callbacks of several buckets run in threads, in another order on every rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator, Work
from allreduce_sgd.gradients.buckets import Bucket
from allreduce_sgd.gradients.exchange import Exchange, Rounds

__all__ = ["CommHook", "GradBucket", "Hooked"]


class GradBucket:
    """What a hook sees of a bucket: the methods of torch.distributed.GradBucket."""

    def __init__(self, index: int, bucket: Bucket, last: bool) -> None:
        self._index = index
        self._bucket = bucket
        self._buffer = bucket.buffer
        self._last = last

    def index(self) -> int:
        return self._index

    def buffer(self) -> Tensor:
        """The gradients of the bucket side by side, flat."""
        return self._buffer

    def gradients(self) -> list[Tensor]:
        """Views of the buffer in the parameters' shapes."""
        if self._buffer is self._bucket.buffer:
            return list(self._bucket.slots)
        return Bucket(self._bucket.parameters, self._buffer).slots

    def parameters(self) -> list[nn.Parameter]:
        return list(self._bucket.parameters)

    def is_last(self) -> bool:
        """Whether this is the last bucket of the backward pass."""
        return self._last

    def set_buffer(self, buffer: Tensor) -> None:
        self._buffer = buffer


CommHook = Callable[[Any, GradBucket], "torch.futures.Future[Any] | Work"]


class Hooked(Exchange):
    """What the user's hook makes of a bucket."""

    stateful = True

    def __init__(self, comm: Communicator, state: Any, hook: CommHook) -> None:
        super().__init__(comm)
        self._state = state
        self._hook = hook
        self._last = 0

    def factor(self, weight: float) -> float:
        # The hook divides by the number of ranks: 1 where all ranks weigh the same.
        return weight * self.comm.size

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        self._last = len(buckets) - 1

    def start(self, index: int, bucket: Bucket, message: Tensor) -> Rounds:
        future = self._hook(self._state, GradBucket(index, bucket, index == self._last))
        yield future
        outcome = future.value() if isinstance(future, torch.futures.Future) else future.wait()
        parts = outcome if isinstance(outcome, list | tuple) else [outcome]
        flat = parts[0].reshape(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
        if flat.numel() != bucket.buffer.numel():
            raise ValueError(
                f"the communication hook returned {flat.numel()} elements for a bucket of {bucket.buffer.numel()}"
            )
        if flat.data_ptr() != bucket.buffer.data_ptr():
            bucket.buffer.copy_(flat)
