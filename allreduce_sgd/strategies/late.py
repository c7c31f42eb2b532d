"""What delayed SGD and distributed mini-batches share: a step that starts a sum of gradients, and applies one later.

The gradient of a step is computed locally, and its sum over ranks is started (`sums.py`); it is waited for some steps
later (`delayed.py`), or after something else has been done in the same step (`dmb.py`). A sum is in units of the loss
scale that its gradient was computed with, and is brought to the present one when it is applied.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import CodecFactory, is_finite
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.buckets import Bucket
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import broadcast_tensors, check_same_model
from allreduce_sgd.strategies.base import Share, Strategy, agree_on_buffers, restored
from allreduce_sgd.strategies.precision import LossScaling
from allreduce_sgd.strategies.resync import Resync
from allreduce_sgd.strategies.sums import Sums

__all__ = ["Late"]


class Late(Strategy):
    """Applies the sum of the gradients of all ranks `delay` steps after they were computed.

    What of `gradients` has a meaning here: bucket sizes, buffers, find_unused_parameters, check_finite,
    sync_batch_norm.
    """

    steps_alike = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        clip_norm: float | None,
        gradients: GradientOptions,
        delay: int = 0,
        compression: CodecFactory | None = None,
        scaling: LossScaling | None = None,
        resync_every: int | None = None,
    ) -> None:
        super().__init__(model, optimizer, comm, clip_norm, scaling)
        if self._needs_closure:
            raise ConfigError(
                f"--optimizer {type(optimizer).__name__}: evaluates the loss several times a step, which --strategy "
                f"{self.name} cannot follow; take sync"
            )
        self.delay = delay
        self._options = gradients
        if comm.size > 1:
            check_same_model(model, comm)
            broadcast_tensors([*model.parameters(), *model.buffers()], comm)
        self._sums = Sums(model, comm, delay, gradients, compression)
        self._resync = None if resync_every is None else Resync(model, comm, resync_every)
        # Where batch statistics are those of all ranks, a gradient holds parts of other ranks' losses.
        self._weigh_losses = gradients.sync_batch_norm and comm.size > 1

    @abstractmethod
    def meanwhile(self, share: Share) -> None:
        """Do what else there is to do in this step, while its sum is in flight."""

    def step(self, share: Share) -> None:
        if self._options.buffers != "leave":
            agree_on_buffers(self.model, self.comm, self._options.buffers)
        self.optimizer.zero_grad(set_to_none=True)
        weight = share.weight
        if self._weigh_losses:
            loss_weight, weight = share.weight * self.comm.size, 1.0 / self.comm.size
        for compute in share.losses:
            loss = compute(self.model)
            self._backward(loss * loss_weight if self._weigh_losses else loss)
        all_expected = bool(share.losses) and not self._options.find_unused_parameters
        self._sums.launch(weight, 1.0 if self.scaling is None else self.scaling.scale, all_expected)
        self.meanwhile(share)
        if self._sums.outstanding > self.delay:
            self._apply_oldest()
        else:
            # A schedule warns where its first step comes before the optimizer's: here that is meant.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        if self._resync is not None:
            self._resync.after_step()

    def message_bytes(self) -> list[int]:
        return self._sums.bucket_bytes if self.comm.size > 1 else []

    @contextmanager
    def consensus(self) -> Iterator[None]:
        with restored([*self.model.parameters(), *self.model.buffers()]):
            put_back = self._keep_state() if self._sums.outstanding else None
            try:
                self.finish()
                yield
            finally:
                if put_back is not None:
                    put_back()

    def finish(self) -> None:
        while self._sums.outstanding:
            self._apply_oldest()
        if self._ahead is not None:
            self._ahead.look_back_()
        agree_on_buffers(self.model, self.comm, self._options.buffers)

    def state_dict(self) -> dict[str, Any]:
        # The consensus model that a checkpoint has is ahead of this one by the outstanding sums.
        ahead = self._sums.outstanding > 0
        parameters = {name: value.detach() for name, value in self.model.named_parameters()} if ahead else None
        return {
            **super().state_dict(),
            "parameters": parameters,
            "sums": self._sums.state_dict(),
            "resync": None if self._resync is None else self._resync.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        outstanding = len(state["sums"]["outstanding"])
        if outstanding > self.delay:
            raise ConfigError(f"--delay {self.delay}: the checkpoint has {outstanding} sums outstanding; take as many")
        if state["parameters"] is not None:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(state["parameters"][name])
        self._sums.load_state_dict(state["sums"])
        if self._resync is not None and state["resync"] is not None:
            self._resync.load_state_dict(state["resync"])

    def _apply_oldest(self) -> None:
        """Clip the oldest sum and take the optimizer's step with it."""
        scale, buckets = self._sums.hand_out()
        if self.scaling is not None and scale != self.scaling.scale and not self._rescale(scale, buckets):
            return
        if self.clip_norm is not None:
            self._clip(self.clip_norm * (1.0 if self.scaling is None else self.scaling.scale))
        self._update()

    def _rescale(self, scale: float, buckets: list[Bucket]) -> bool:
        """Bring gradients from the loss scale they were computed with to the present one; say whether they can be used.

        An overflow under a scale that has been lowered since says nothing about the present one.
        """
        assert self.scaling is not None
        factor = self.scaling.scale / scale
        if factor < 1 and not all(is_finite(bucket.buffer) for bucket in buckets):
            self.scaling.skipped_steps += 1
            return False
        for bucket in buckets:
            bucket.buffer.mul_(factor)
        return True

    def _keep_state(self) -> Callable[[], None]:
        """Keep what `finish` uses up beside the model, and return what puts it back."""
        sums, optimizer = tree_map_only(Tensor, Tensor.clone, (self._sums.state_dict(), self.optimizer.state_dict()))
        scaling = None if self.scaling is None else dict(self.scaling.state_dict())

        def put_back() -> None:
            self._sums.load_state_dict(sums)
            self.optimizer.load_state_dict(optimizer)
            if self.scaling is not None and scaling is not None:
                self.scaling.load_state_dict(scaling)

        return put_back
