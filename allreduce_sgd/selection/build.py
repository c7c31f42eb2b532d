"""From the options to the model that a run is judged by."""

from collections.abc import Callable

from torch import nn

from allreduce_sgd.selection.ema import ExponentialAverage
from allreduce_sgd.selection.final_model import FinalModel
from allreduce_sgd.selection.options import SelectionOptions
from allreduce_sgd.selection.swa import StochasticWeightAverage
from allreduce_sgd.strategies.base import Strategy

__all__ = ["build_final_model"]


def build_final_model(
    options: SelectionOptions, strategy: Strategy, total_steps: int, recompute_statistics: Callable[[nn.Module], None]
) -> FinalModel:
    """Build what the options ask for, for a run of so many steps. All ranks that train must call.

    `recompute_statistics` makes the statistics of batch normalisation in a model those of its present parameters.
    """
    if options.ema is not None:
        return ExponentialAverage(strategy, options.ema)
    if options.swa is not None:
        return StochasticWeightAverage(strategy, options.swa * total_steps, recompute_statistics)
    return FinalModel(strategy)
