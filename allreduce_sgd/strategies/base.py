"""The interface of every way to distribute SGD, and what they have in common.

The methods are one mechanism with different entries: an anchored, possibly late, exchange. Rank i holds parameters x_i
and an anchor z; every H steps it exchanges a signal, and merges the outcome. For signals that are gradients z *is* x
(`synchronous.py`); for signals z - x the mechanism stands in `anchored.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator, ReduceOp
from allreduce_sgd.gradients.clipping import clip_grad_norm_
from allreduce_sgd.gradients.replicate import average_buffers, broadcast_tensors
from allreduce_sgd.gradients.sharded import ShardedOptimizer
from allreduce_sgd.optim.build import needs_closure
from allreduce_sgd.optim.nesterov import Nesterov
from allreduce_sgd.optim.newton import Newton, hessian_of
from allreduce_sgd.strategies.finite import check_finite
from allreduce_sgd.strategies.pace import Pace
from allreduce_sgd.strategies.precision import LossScaling

__all__ = ["Share", "Strategy", "agree_on_buffers", "restored", "zero_loss"]


@dataclass(frozen=True)
class Share:
    """This rank's part of one global mini-batch.

    `losses` holds a function per micro-batch: given the model, it runs the forward pass and returns the micro-batch's
    part of the share's mean loss, so that the parts of one share sum to the mean over its `samples`. It is empty where
    the rank has no samples. `global_samples` counts the samples of all ranks.
    """

    losses: Sequence[Callable[[nn.Module], Tensor]]
    samples: int
    global_samples: int
    predictions: Sequence[Callable[[nn.Module], Tensor]] = ()
    """Forward passes whose losses count in the figures, but from which nothing is learnt (method dmb)."""
    shards: Sequence["Share"] = ()
    """The shares of the virtual ranks that this rank computes, in their order, instead of `losses`."""

    @property
    def weight(self) -> float:
        """The share's part of the global mini-batch: the mean over all samples is the sum of weight times mean."""
        return self.samples / self.global_samples


class Strategy(ABC):
    """Trains `model` together with the same strategy on all other ranks of `comm`.

    All ranks construct it together; `step`, `consensus` and `finish` must be called by all.
    """

    name: str
    """The name of the method, as `--strategy` spells it."""
    signal = "gradients"
    """What ranks exchange in a step, for the figures of communication by cause."""
    consensus_kind: str
    """What the consensus model is, for the summary."""
    sharded: ShardedOptimizer | None = None
    """The optimizer, where every rank has only its share of it."""
    pace: Pace | None = None
    """What hands out mini-batches where every rank takes them at its own speed; None: all ranks step together."""
    servers: int = 0
    """How many ranks beside those of `comm` serve parameters."""
    steps_alike = False
    """Whether all ranks' optimizers take the same steps, so that the consensus has an optimizer state."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        clip_norm: float | None,
        scaling: LossScaling | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.comm = comm
        self.clip_norm = clip_norm
        self.scaling = scaling
        self._needs_closure = needs_closure(optimizer)

    @property
    def in_agreement(self) -> bool:
        """Whether all ranks must have the same parameters now, between two steps."""
        return True

    @property
    def everyone(self) -> Communicator:
        """The communicator of all ranks of the job, those that serve included."""
        return self.comm

    @abstractmethod
    def step(self, share: Share) -> None:
        """Take one optimizer step with this rank's share of a global mini-batch."""

    @abstractmethod
    def consensus(self) -> AbstractContextManager[None]:
        """Return a context within which `model` holds the consensus of all ranks, which evaluation must use."""

    @abstractmethod
    def finish(self) -> None:
        """Leave `model` with the consensus for good: the end of training."""

    def skipped_steps(self) -> int:
        """Return the most steps that a rank skipped since its gradients overflowed. All ranks must call."""
        own = 0 if self.scaling is None else self.scaling.skipped_steps
        return int(self.comm.all_reduce(torch.tensor([own]), ReduceOp.MAX).wait())

    def message_bytes(self) -> list[int]:
        """Return the size of each of the buckets that ranks exchange; none on one rank alone."""
        return []

    def measures(self) -> dict[str, float]:
        """Return this rank's sums since this was called last, the same names on every rank. Called at logged steps."""
        return {}

    def figures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return what metrics.jsonl shows of the `measures`, given their sums over all ranks."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Return the method's own entries of summary.json. All ranks must call."""
        return {}

    def before_checkpoint(self, step: int) -> None:  # noqa: B027 - most methods have nobody to tell
        """Have the ranks of `everyone` that do not train take part in the checkpoint of this step, which comes next."""

    def state_dict(self) -> dict[str, Any]:
        """Return what only this rank has, beside model and optimizer: tensors, numbers, strings, lists, dicts."""
        ahead = None
        if self._ahead is not None:
            # The model that is saved is the consensus. Copied, for they may lie in memory that other ranks read.
            ahead = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        return {"buffers": {name: value.detach() for name, value in self.model.named_buffers()}, "ahead": ahead}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, after model and optimizer have been loaded."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(state["buffers"][name])
            if self._ahead is not None:
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(state["ahead"][name])
                # Ranks may share the memory, where a late one first loads the consensus.
                self.comm.barrier().wait()

    def restart(self, step: int) -> None:
        """Go on from a consensus model just loaded, after so many steps, without a saved state of this rank's own."""
        if self._ahead is not None:
            self._ahead.look_ahead_()

    @property
    def _ahead(self) -> Nesterov | ShardedOptimizer | None:
        """The optimizer, where it trains with parameters ahead of its own point, which is that of the consensus."""
        optimizer = self.optimizer
        if not self.steps_alike:
            return None
        if isinstance(optimizer, Nesterov) or (isinstance(optimizer, ShardedOptimizer) and optimizer.looks_ahead):
            return optimizer
        return None

    @contextmanager
    def _looking_back(self) -> Iterator[None]:
        """Within it the parameters are at the optimizer's own point. All ranks must call."""
        if self._ahead is None:
            yield
            return
        with restored(self.model.parameters()):
            self._ahead.look_back_()
            yield
            # Ranks may share the memory, and others may still be evaluating.
            self.comm.barrier().wait()

    def _apply(self, gradients: Callable[[], Tensor], hessian: Callable[[], Tensor] | None = None) -> None:
        """Run `gradients`, which fills `.grad` and returns the loss, clip, and take the optimizer's step.

        `hessian` returns the second derivatives of the same loss, for optimizers that ask for them.
        """
        if self._needs_closure:

            def closure() -> Tensor:
                self.optimizer.zero_grad(set_to_none=True)
                loss = gradients()
                if self.clip_norm is not None:
                    self._clip(self.clip_norm)
                return loss

            if isinstance(self.optimizer, Newton):
                assert hessian is not None, "check_optimizer refuses Newton elsewhere"
                self.optimizer.step(closure, hessian)
                return
            self.optimizer.step(closure)  # type: ignore[arg-type]  # LBFGS takes a Tensor's value by float()
            return
        self.optimizer.zero_grad(set_to_none=True)
        gradients()
        if self.clip_norm is not None:
            # Scaled gradients have a scaled norm, so they need not be divided first.
            self._clip(self.clip_norm * (1.0 if self.scaling is None else self.scaling.scale))
        self._update()

    def _own_gradients(self, share: Share, check: bool) -> Tensor:
        """Fill `.grad` with the gradient of the share's mean loss, which is returned, without any communication.

        `check`: raise NonFiniteError, on this rank alone, where one of them is not finite.
        """
        loss = zero_loss(self.model)
        for compute in share.losses:
            part = compute(self.model)
            self._backward(part)
            loss += part.detach()
        if check:
            check_finite(self.model, loss, self.comm.rank)
        return loss

    def _own_hessian(self, share: Share) -> Tensor:
        """Return the second derivatives of the share's mean loss, without any communication; float64, (n, n)."""
        assert isinstance(self.optimizer, Newton)
        parameters = self.optimizer.parameters
        count = sum(parameter.numel() for parameter in parameters)
        total = torch.zeros(count, count, dtype=torch.float64, device=parameters[0].device)
        for compute in share.losses:
            total += hessian_of(compute(self.model), parameters)
        return total

    def _backward(self, loss: Tensor) -> None:
        if self.scaling is None:
            loss.backward()
        else:
            self.scaling.backward(loss)

    def _clip(self, max_norm: float) -> None:
        """Scale the gradients down to this global norm if theirs is larger."""
        clip_grad_norm_(self.model.parameters(), max_norm)

    def _update(self) -> None:
        """Take the optimizer's step with the gradients as they are, or skip it where loss scaling says so."""
        if self.scaling is None:
            self.optimizer.step()
        else:
            self.scaling.step(self.optimizer)


def agree_on_buffers(model: nn.Module, comm: Communicator, how: str) -> None:
    """Make buffers equal: those of rank 0 for `how` "broadcast", else the average. All ranks must call."""
    if how == "broadcast":
        broadcast_tensors(model.buffers(), comm)
    else:
        average_buffers(model, comm)


def zero_loss(model: nn.Module) -> Tensor:
    """Return a zero on the model's device: the loss of a rank without samples."""
    return torch.zeros((), device=next(model.parameters()).device)


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give the tensors their present values back when the context ends."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
