"""Stochastic weight averaging: the equal average of the weights at the ends of the last epochs.

Izmailov, Podoprikhin, Garipov, Vetrov and Wilson, "Averaging weights leads to wider optima and better generalization",
UAI 2018, arXiv 1803.05407. At the end of each epoch from a fraction of the run on, the consensus of all ranks is taken
into the average: x̄ ← x̄ + (x − x̄) / (n + 1). Until then the consensus itself is evaluated. The statistics of batch
normalisation are recomputed for the averaged weights by passes over the training data (`batch_statistics.py`), whenever
they are to be evaluated for the first time.

Difference from the paper: the learning rate is that of --lr-schedule, cyclical or high and constant ones included only
as far as that has them; a cycle is an epoch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.errors import counted
from allreduce_sgd.selection.average import Average, holding
from allreduce_sgd.selection.final_model import FinalModel
from allreduce_sgd.strategies.base import Strategy, restored

__all__ = ["StochasticWeightAverage"]


class StochasticWeightAverage(FinalModel):
    """Averages the consensus models at the ends of epochs from step `first` on.

    `recompute` makes the statistics of batch normalisation in the model those of its present parameters over the
    training data, the same on all ranks; all call it together.
    """

    def __init__(self, strategy: Strategy, first: float, recompute: Callable[[nn.Module], None]) -> None:
        super().__init__(strategy)
        self._first = first
        self._recompute = recompute
        # That of all ranks is averaged, so that all average the same.
        self._average = Average(strategy.model, strategy.comm, replicated=True)
        self._statistics: list[Tensor] | None = None

    @property
    def kind(self) -> str:
        updates = self._average.updates
        return f"average of {counted(updates, 'epoch')}" if updates else super().kind

    def after_epoch(self, step: int) -> None:
        if step >= self._first:
            with self.strategy.consensus():
                self._average.update_(1 / (1 + self._average.updates))
            self._statistics = None

    @contextmanager
    def consensus(self) -> Iterator[None]:
        with self.strategy.consensus():
            if not self._average.updates:
                yield
                return
            with holding(self._average.gathered()), restored(self.strategy.model.buffers()):
                self._install_statistics()
                yield

    def finish(self) -> None:
        self.strategy.finish()
        if self._average.updates:
            for parameter, value in self._average.gathered():
                parameter.data = value
            self._install_statistics()

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average.state_dict(), "updates": self._average.updates}

    def load_state_dict(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        self._average.load_state_dict(shared["average"], shared["updates"])
        self._statistics = None

    @torch.no_grad()
    def _install_statistics(self) -> None:
        """Make the model's buffers fit the average that its parameters are now."""
        buffers = list(self.strategy.model.buffers())
        if self._statistics is None:
            self._recompute(self.strategy.model)
            self._statistics = [buffer.detach().clone() for buffer in buffers]
        for buffer, value in zip(buffers, self._statistics, strict=True):
            buffer.copy_(value)
