"""From the options to a strategy."""

import torch
from torch import nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.strategies.base import Strategy
from allreduce_sgd.strategies.local import LocalSgd
from allreduce_sgd.strategies.options import StrategyOptions
from allreduce_sgd.strategies.synchronous import Synchronous

__all__ = ["build_strategy"]


def build_strategy(
    options: StrategyOptions,
    gradients: GradientOptions,
    clip_norm: float | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    comm: Communicator,
) -> Strategy:
    """Build the strategy. All ranks must call, with the same model and options."""
    if options.strategy == "local":
        return LocalSgd(model, optimizer, comm, clip_norm, options.period, gradients.bucket_mb)
    return Synchronous(model, optimizer, comm, clip_norm, gradients)
