"""The parameters whose gradients are reduced, each with its place in a bucket and what has come of it in this pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.errors import NonFiniteError
from allreduce_sgd.gradients.buckets import Bucket

__all__ = ["Member", "named_briefly", "non_finite", "report_non_finite", "watch"]

_NAMES_SHOWN = 5


class Member:
    """A parameter, where its gradient lies, and what has come of it in this pass.

    `place` is its index in the order in which parameters were given; `bucket` None is that of sparse gradients, which
    lie in no bucket. `expected` arrivals a pass, `left` of them still to come in pass `number`. `used` says whether it
    had a gradient since the last reduction; `kept` is what `.grad` was, in case that no rank had one.
    """

    __slots__ = ("bucket", "expected", "kept", "left", "name", "number", "parameter", "place", "slot", "used")

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name = name
        self.parameter = parameter
        self.place = 0
        self.bucket: int | None = None
        self.slot: Tensor | None = None
        self.number = 0
        self.expected = 1
        self.left = 0
        self.used = False
        self.kept: Tensor | None = None

    def private_gradient(self) -> Tensor | None:
        """Return the parameter's gradient, a copy if it lies in a bucket."""
        gradient, slot = self.parameter.grad, self.slot
        if gradient is None or slot is None or gradient.data_ptr() != slot.data_ptr():
            return gradient
        return gradient.clone()


def watch(parameter: nn.Parameter, act: Callable[[], None]) -> Callable[[], None]:
    """Have `act` called whenever the parameter's gradient has been accumulated; returns what ends that."""
    return parameter.register_post_accumulate_grad_hook(lambda _: act()).remove


def named_briefly(members: list[Member]) -> str:
    names = [member.name for member in members]
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


def non_finite(bucket: Bucket, members: list[Member]) -> list[str]:
    """Return the names of the parameters of whose gradient in the bucket some element is NaN or infinite."""
    # One pass over the memory and one number; NaN and infinity survive it, and what overflows is looked at closely.
    if torch.isfinite(torch.linalg.vector_norm(bucket.buffer)):
        return []
    names = {id(member.parameter): member.name for member in members}
    pairs = zip(bucket.parameters, bucket.slots, strict=True)
    return [names[id(parameter)] for parameter, slot in pairs if not torch.isfinite(slot).all()]


def report_non_finite(mine: list[str], comm: Communicator) -> None:
    """Raise NonFiniteError naming all ranks' parameters. All ranks must call, at least one with a name."""
    everyone: list[list[str]] = all_gather_object(comm, mine)
    told = "; ".join(f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(everyone) if names)
    raise NonFiniteError(f"NaN or Inf in the gradient of {told}")
