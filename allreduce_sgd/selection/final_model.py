"""The model that a run is judged by and ends with: the consensus of its ranks, or an average of models on the way."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from allreduce_sgd.strategies.base import Strategy

__all__ = ["FinalModel"]


class FinalModel:
    """The consensus of all ranks as it is; `ema.py` and `swa.py` have others. All ranks must call all methods."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    @property
    def kind(self) -> str:
        """What the model is, for the summary."""
        return "consensus"

    def after_step(self) -> None:
        """Be told that this rank has taken an optimizer step."""

    def after_epoch(self, step: int) -> None:
        """Be told that all ranks have ended an epoch, at this step of the run."""

    def consensus(self) -> AbstractContextManager[None]:
        """Return a context within which the strategy's model is the one to evaluate."""
        return self.strategy.consensus()

    def finish(self) -> None:
        """Leave the strategy's model with the final one for good: the end of training."""
        self.strategy.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return what all ranks share."""
        return {}

    def own_state_dict(self) -> dict[str, Any]:
        """Return what only this rank has."""
        return {}

    def load_state_dict(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint, after the strategy has; `own` None: it was written by other ranks."""
