"""Mixed precision: forward passes in half precision, and the scaling of losses that float16 needs.

Micikevicius et al., "Mixed precision training", ICLR 2018, arXiv 1710.03740. Parameters and gradients stay float32, as
do the buckets in which gradients are summed; torch.autocast chooses the operations that run in half precision. float16
has 5 bits of exponent, so small gradients would vanish: the loss is multiplied by a scale before the backward pass, and
gradients are divided by it before the optimizer's step. Where a gradient is not finite the step is skipped and the
scale halved; after 2000 steps without that it is doubled (torch.amp.GradScaler's rule).

Where ranks step by the same sum of gradients, a NaN or infinity of one is in the sum of all, so that all skip together
without a word. Where gradients are sharded, the ranks agree by an all-reduce of 4 bytes. Where each rank steps alone
(local SGD), each has its own scale and skips by itself.

Skipped steps count as steps: the learning rate follows the samples, and is the same on every rank, whoever skipped.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from allreduce_sgd.comm.base import Communicator, ReduceOp
from allreduce_sgd.errors import NonFiniteError
from allreduce_sgd.gradients.sharded import ShardedOptimizer

__all__ = ["LossScaling", "autocast"]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# float16's smallest normal number: a loss that must be scaled down further overflows by itself.
_LEAST_SCALE = 2.0**-14


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context for forward passes in this precision: fp32, bf16 or fp16."""
    dtype = _HALF.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class LossScaling:
    """Scales losses on `device`, and skips optimizer steps whose gradients are not finite; counts `skipped_steps`."""

    def __init__(self, device: torch.device) -> None:
        self.skipped_steps = 0
        self._device = device
        self._scaler = GradScaler(device.type)
        # It makes its scale when it first scales something, which a rank without samples does not do.
        self._scaler.scale(torch.zeros((), device=device))

    @property
    def scale(self) -> float:
        """What losses are multiplied by now, and with them gradients until `step`."""
        return self._scaler.get_scale()

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> float:
        """Divide the gradients by the scale, take the optimizer's step or skip it, and adapt the scale.

        Returns the factor by which the scale has changed. Raises NonFiniteError where no scale helps.
        """
        return self._step(optimizer, optimizer)

    def step_sharded(self, optimizer: ShardedOptimizer, comm: Communicator) -> float:
        """Do as `step` with the shards' gradients, where all ranks skip if one must. All ranks must call."""
        return self._step(optimizer, _Shards(optimizer), comm)

    def _step(self, optimizer: torch.optim.Optimizer, holder: Any, comm: Communicator | None = None) -> float:
        before = self.scale
        self._scaler.unscale_(holder)
        if comm is not None:
            self._agree(holder, comm)
        self._scaler.step(holder)
        self._scaler.update()
        factor = self.scale / before
        if factor < 1:
            self.skipped_steps += 1
            # A schedule warns where its first step comes before the optimizer's: here that is meant.
            optimizer._opt_called = True  # type: ignore[attr-defined]
            if self.scale < _LEAST_SCALE:
                raise NonFiniteError(
                    f"gradients hold NaN or Inf although losses are scaled by only {before:g}: float16 is not the "
                    f"cause; --precision fp32 --check-finite tells the parameter and the rank"
                )
        return factor

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": self._scaler.state_dict(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scaler.load_state_dict(state["scaler"])
        self.skipped_steps = state["skipped_steps"]

    def _agree(self, holder: Any, comm: Communicator) -> None:
        # torch offers no public way to tell a scaler what other ranks found; its own sharded scalers do the same.
        found: dict[Any, Tensor] = self._scaler._found_inf_per_device(holder)
        overflow = torch.zeros(1)
        for each in found.values():
            overflow += each.cpu()
        comm.all_reduce(overflow, ReduceOp.MAX, blocking=True).wait()
        found[self._device] = overflow.reshape(()).to(self._device)


class _Shards:
    """A sharded optimizer as a scaler sees it: with this rank's part of the gradients as those of its parameters."""

    def __init__(self, optimizer: ShardedOptimizer) -> None:
        parts = []
        for gradient in optimizer.gradients():
            part = gradient.detach()
            part.grad = gradient
            parts.append(part)
        self.param_groups = [{"params": parts}]
        self.step = optimizer.step
