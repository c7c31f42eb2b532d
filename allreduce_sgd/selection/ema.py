"""The exponential moving average of the parameters over the steps.

After Polyak and Juditsky 1992, who average all iterates alike; with exponential weights as in Tarvainen and Valpola,
"Mean teachers are better role models", NIPS 2017, arXiv 1703.01780. After optimizer step t = 0, 1, ...

    x̄ ← d x̄ + (1 − d) x,   d = min(decay, (1 + t) / (10 + t)),   x̄ = x after the first,

where the second term of the minimum (TensorFlow's rule) has the average follow the model at first, rather than remember
how it was initialised. Buffers that are floating-point numbers (statistics of batch normalisation) are averaged alike,
others are those of the model. Each update reads the parameters and reads and writes their average: of all ranks
together once where these have the same parameters, see `average.py`.

Where ranks have models of their own, each averages its own over its own steps, and the final model is the mean of these
over ranks. Of `easgd`, whose consensus is the centre, it is thus the average of the ranks, not of the centre. With
`hogwild` each rank averages what it sees of the shared parameters after each of its updates.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from allreduce_sgd.selection.average import Average, holding
from allreduce_sgd.selection.final_model import FinalModel
from allreduce_sgd.strategies.base import Strategy, restored

__all__ = ["ExponentialAverage", "decay_at"]


def decay_at(decay: float, updates: int) -> float:
    """Return what the average is multiplied by in its next update, after so many."""
    return min(decay, (1 + updates) / (10 + updates))


class ExponentialAverage(FinalModel):
    """Averages with this `decay` after every step of this rank."""

    def __init__(self, strategy: Strategy, decay: float) -> None:
        super().__init__(strategy)
        self._decay = decay
        self._average = Average(strategy.model, strategy.comm, strategy.replicated)
        # Also where parameters are equal, ranks normalise by batches of their own.
        self._buffers = {name: buffer.detach().clone() for name, buffer in self._model_buffers().items()}

    @property
    def kind(self) -> str:
        return f"exponential moving average, decay {self._decay:g}"

    @torch.no_grad()
    def after_step(self) -> None:
        first, decay = self._average.updates == 0, decay_at(self._decay, self._average.updates)
        self._average.update_(1 - decay)
        for name, buffer in self._model_buffers().items():
            self._buffers[name].lerp_(buffer, 1.0 if first else 1 - decay)

    @contextmanager
    def consensus(self) -> Iterator[None]:
        with restored(self.strategy.model.buffers()):
            # Before, so that they agree as the strategy has it.
            self._install_buffers()
            with self.strategy.consensus(), holding(self._average.gathered()):
                yield

    def finish(self) -> None:
        self._install_buffers()
        self.strategy.finish()
        for parameter, value in self._average.gathered():
            parameter.data = value

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average.state_dict(), "updates": self._average.updates}

    def own_state_dict(self) -> dict[str, Any]:
        average = self._average.own_state_dict()
        return {"average": average, "updates": self._average.updates, "buffers": self._buffers}

    def load_state_dict(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        if own is None:
            self._average.load_state_dict(shared["average"], shared["updates"])
            self._buffers = {name: buffer.detach().clone() for name, buffer in self._model_buffers().items()}
            return
        self._average.load_state_dict(own["average"] or shared["average"], own["updates"])
        for name, buffer in self._buffers.items():
            buffer.copy_(own["buffers"][name])

    def _model_buffers(self) -> dict[str, Tensor]:
        return {name: one for name, one in self.strategy.model.named_buffers() if one.is_floating_point()}

    @torch.no_grad()
    def _install_buffers(self) -> None:
        for name, buffer in self._model_buffers().items():
            buffer.copy_(self._buffers[name])
