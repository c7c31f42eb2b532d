"""Early stopping: training ends when the validation loss has not become lower for a while.

Prechelt, "Early stopping – but when?", in Neural Networks: Tricks of the Trade, 1998: his third class of criteria, with
evaluations in place of strips of epochs. The model to keep is the one with the lowest loss.

Losses are sums over all ranks, of which the communicator gives every rank the same bits, so that each comes to the
same decision by itself.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["EarlyStopping"]


class EarlyStopping:
    """Asks to `stop` after `patience` losses in a row of which none was lower, by more than `min_delta`, than those
    before. A loss that is NaN is never lower."""

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self._patience = patience
        self._min_delta = min_delta
        self._lowest: float | None = None
        # What the next losses must be below: the lowest when patience last started anew.
        self._reference: float | None = None
        self._waited = 0

    @property
    def stop(self) -> bool:
        return self._waited >= self._patience

    def look(self, loss: float) -> bool:
        """Take in the loss of an evaluation, and say whether it is the lowest so far."""
        if loss == loss and (self._reference is None or loss < self._reference - self._min_delta):
            self._reference, self._waited = loss, 0
        else:
            self._waited += 1
        lowest = loss == loss and (self._lowest is None or loss < self._lowest)
        if lowest:
            self._lowest = loss
        return lowest

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self._lowest, "reference": self._reference, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._lowest, self._reference, self._waited = state["lowest"], state["reference"], state["waited"]
