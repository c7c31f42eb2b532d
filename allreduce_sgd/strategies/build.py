"""From the options to a strategy, and whether its optimizer is sharded."""

import torch
from torch import nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.build import build_codec
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.sharded import Groups, is_elementwise
from allreduce_sgd.optim.build import build_optimizer, needs_closure
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.base import Strategy
from allreduce_sgd.strategies.local import LocalSgd
from allreduce_sgd.strategies.options import StrategyOptions
from allreduce_sgd.strategies.precision import LossScaling
from allreduce_sgd.strategies.synchronous import Synchronous

__all__ = ["build_strategy", "check_optimizer"]


def build_strategy(
    options: StrategyOptions,
    gradients: GradientOptions,
    optimizer: OptimizerOptions,
    model: nn.Module,
    comm: Communicator,
    *,
    compression: CompressionOptions | None = None,
    precision: str = "fp32",
    seed: int = 0,
) -> Strategy:
    """Build the strategy, with its optimizer. All ranks must call, with the same model and options.

    `seed` is that of codecs which draw random numbers. Raises ConfigError where the optimizer does not fit.
    """

    def make(groups: Groups) -> torch.optim.Optimizer:
        return build_optimizer(optimizer, groups)

    made = make([{"params": list(model.parameters())}])
    check_optimizer(made, gradients, precision)
    codecs = build_codec(compression or CompressionOptions(), seed=seed, rank=comm.rank, size=comm.size)
    device = next(model.parameters()).device
    scaling = LossScaling(device) if precision == "fp16" else None
    if options.strategy == "local":
        return LocalSgd(model, made, comm, optimizer.clip_norm, options.period, gradients, codecs, scaling)
    shard = gradients.shard_optimizer
    if shard and _has_sparse_gradients(model):
        raise ConfigError("--shard-optimizer: the model has embeddings with sparse gradients, which cannot be sharded")
    if shard is None:
        suits = codecs is None and is_elementwise(made) and not _has_sparse_gradients(model)
        shard = suits and _shares_memory(comm, device)
    return Synchronous(model, make, comm, optimizer.clip_norm, gradients, shard, codecs, scaling)


def check_optimizer(optimizer: torch.optim.Optimizer, gradients: GradientOptions, precision: str) -> None:
    """Raise ConfigError where an optimizer that evaluates the loss several times a step meets what cannot follow it."""
    if not needs_closure(optimizer):
        return
    name = type(optimizer).__name__
    if precision == "fp16":
        raise ConfigError(
            f"--precision fp16: {name} evaluates the loss several times a step, which loss scaling cannot follow; "
            f"take bf16 or fp32"
        )
    if gradients.shard_optimizer:
        raise ConfigError(f"--shard-optimizer: {name} decides by the whole gradient, and cannot be sharded")


def _has_sparse_gradients(model: nn.Module) -> bool:
    return any(getattr(layer, "sparse", False) for layer in model.modules())


def _shares_memory(comm: Communicator, device: torch.device) -> bool:
    """Say whether ranks can have one memory for the parameters, where sharding costs nothing. All ranks must call.

    Not where the user chose another way for their messages, which shards would not go.
    """
    if comm.size == 1 or comm.algorithm != "shared-memory":
        return False
    return comm.allocate_shared(1, torch.float32, device) is not None
