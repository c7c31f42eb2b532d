"""Synchronous SGD whose result does not depend on the number of ranks: a mini-batch is V shards, whoever computes them.

After the virtual nodes of VirtualFlow (Or, Zhang and Freedman, MLSys 2022, arXiv 2009.09523) and the threads of
EasyScale (Li et al., SC 2023, arXiv 2208.14228). Rank r of P computes the r-th V/P of the shards, one after another.
Whatever depends on ranks elsewhere follows the shard here:

- gradients, weighed by samples, are added up in a tree over V leaves (`gradients/fixed_tree.py`);
- random numbers of a forward pass (dropout, augmentation) come from torch's, Python's and numpy's generators, seeded
  with (seed, step, shard); between two steps these are what they would be without;
- batch normalisation normalises within a shard, and statistics are averaged over shards (`gradients/shard_buffers.py`);
- clipping takes the norm of the whole gradient, which every rank has, and every rank takes the optimizer's whole step;
- where the optimizer asks for the loss (LBFGS), it gets the sum over shards in their order.

So 1, 2, 4, ... ranks that divide V come to the same bits, also where a run is resumed on others, as long as each rank
computes with as many threads on the same kind of processor, by kernels that are deterministic.

Signal: the gradient; H = 1; no delay; exchange: the tree; outer step: the optimizer. Bytes per rank and step: those of
a ring where V/P is a power of two, else more (see the tree). Memory: gradients of log2 (V/P) + 1 nodes.

Differences from the papers: the number of ranks changes at a resume, not while training; shards are not fitted to the
memory or speed of a device.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.fixed_tree import FixedTree
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import broadcast_tensors, check_same_model
from allreduce_sgd.gradients.shard_buffers import ShardBuffers
from allreduce_sgd.gradients.shard_sums import ShardSums
from allreduce_sgd.random_state import random_state, restore_random_state, seed_generators
from allreduce_sgd.strategies.base import Share, Strategy
from allreduce_sgd.strategies.precision import LossScaling

__all__ = ["VirtualRanks"]


class VirtualRanks(Strategy):
    """Averages the gradients of `shards` shards of every mini-batch, of which all ranks have equally many.

    A share must have its `shards`. What of `gradients` has a meaning here: bucket sizes, find_unused_parameters,
    check_finite. Raises ConfigError where the shards cannot be shared out evenly to the ranks of `comm`, or the back
    end has no messages.
    """

    name = "sync"
    steps_alike = True
    consensus_kind = "every rank's model (equal on all); buffers averaged over virtual ranks"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        clip_norm: float | None,
        gradients: GradientOptions,
        shards: int,
        seed: int = 0,
        scaling: LossScaling | None = None,
    ) -> None:
        super().__init__(model, optimizer, comm, clip_norm, scaling)
        try:
            self._tree = FixedTree(shards, comm)
        except ValueError as problem:
            raise ConfigError(f"--virtual-ranks {shards}: {problem}") from problem
        if comm.size > 1:
            check_same_model(model, comm)
            broadcast_tensors([*model.parameters(), *model.buffers()], comm)
        self._sums = ShardSums(model, self._tree, gradients)
        self._buffers = ShardBuffers(model, self._tree) if any(True for _ in model.buffers()) else None
        self._device = next(model.parameters()).device
        self._seed = seed
        self._steps = 0

    def step(self, share: Share) -> None:
        with self._random_state_kept():
            self._apply(lambda: self._gradients(share))
        self._steps += 1

    @contextmanager
    def consensus(self) -> Iterator[None]:
        with self._looking_back():
            yield

    def finish(self) -> None:
        if self._ahead is not None:
            self._ahead.look_back_()

    def summary(self) -> dict[str, Any]:
        return {"virtual_ranks": self._tree.root.stop}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps = state["steps"]

    def restart(self, step: int) -> None:
        super().restart(step)
        self._steps = step

    def _gradients(self, share: Share) -> Tensor:
        """Fill `.grad` with the gradient of the whole mini-batch, and return its loss, if the optimizer asks for it."""
        losses = torch.zeros(self._tree.root.stop, dtype=torch.float64, device=self._device)
        if self._buffers is not None:
            self._buffers.begin()
        for leaf, shard in zip(self._tree.own, share.shards, strict=True):
            seed_generators(self._seed, self._steps, leaf)
            loss = self._own_gradients(shard, check=False)
            if self._needs_closure:
                losses[leaf] = shard.weight * float(loss)
            self._sums.take(shard.weight if shard.samples else None)
            if self._buffers is not None:
                self._buffers.take(shard.weight)
        self._sums.hand_out()
        if self._buffers is not None:
            self._buffers.end()
        if self._needs_closure:
            self.comm.all_gather(losses).wait()
        return losses.sum()

    @contextmanager
    def _random_state_kept(self) -> Iterator[None]:
        before = random_state(self._device)
        try:
            yield
        finally:
            restore_random_state(before, self._device)
