"""From the options to a strategy, and whether its optimizer is sharded."""

from collections.abc import Callable

import torch
from torch import nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import CodecFactory
from allreduce_sgd.compression.build import build_codec
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.sharded import Groups, is_elementwise
from allreduce_sgd.gradients.sparse import has_sparse_gradients
from allreduce_sgd.optim.build import build_optimizer, check_takes_sparse, needs_closure
from allreduce_sgd.optim.newton import Newton
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.adasum import Adasum
from allreduce_sgd.strategies.anchored import Anchored
from allreduce_sgd.strategies.base import Strategy
from allreduce_sgd.strategies.bmuf import Bmuf
from allreduce_sgd.strategies.delayed import Delayed
from allreduce_sgd.strategies.diloco import DiLoCo
from allreduce_sgd.strategies.dmb import DistributedMiniBatch
from allreduce_sgd.strategies.elastic import Elastic
from allreduce_sgd.strategies.gossip import Gossip
from allreduce_sgd.strategies.hogwild import Hogwild, check_hogwild_optimizer
from allreduce_sgd.strategies.local import Local, PostLocal
from allreduce_sgd.strategies.method import Method
from allreduce_sgd.strategies.options import LOCAL, StrategyOptions
from allreduce_sgd.strategies.period import Period
from allreduce_sgd.strategies.precision import LossScaling
from allreduce_sgd.strategies.server.build import build_worker
from allreduce_sgd.strategies.server.roles import Role
from allreduce_sgd.strategies.slowmo import SlowMo
from allreduce_sgd.strategies.synchronous import Synchronous
from allreduce_sgd.strategies.virtual import VirtualRanks

__all__ = ["build_strategy", "check_optimizer"]

_DENSE = ("delayed", "dmb")
"""The strategies that hand dense gradients to the optimizer, whatever the model's are; so do servers, virtual ranks."""


def build_strategy(
    options: StrategyOptions,
    gradients: GradientOptions,
    optimizer: OptimizerOptions,
    model: nn.Module,
    comm: Communicator,
    *,
    period: Period | None = None,
    role: Role | None = None,
    compression: CompressionOptions | None = None,
    precision: str = "fp32",
    seed: int = 0,
) -> Strategy:
    """Build the strategy, with its optimizer. All ranks of `comm` must call, with the same model and options.

    `period` says when ranks that step alone exchange, None: every `--period` steps. `role` is that of a worker whose
    parameters others serve. `seed` is that of codecs which draw random numbers. Raises ConfigError where the optimizer
    does not fit.
    """
    compression = compression or CompressionOptions()
    if role is not None:
        return build_worker(
            options, gradients, optimizer, model, role, compression=compression, precision=precision, seed=seed
        )

    def make(groups: Groups) -> torch.optim.Optimizer:
        return build_optimizer(optimizer, groups)

    made = make([{"params": list(model.parameters())}])
    check_optimizer(made, options, gradients, precision, model)
    codecs = build_codec(compression, seed=seed, rank=comm.rank, size=comm.size)
    device = next(model.parameters()).device
    scaling = LossScaling(device) if precision == "fp16" else None
    clip, resync = optimizer.clip_norm, options.resync_every
    name = options.strategy
    if name in LOCAL:
        return Anchored(
            _method(options, comm.size),
            model,
            made,
            comm,
            clip,
            period or Period(options.steps_between),
            gradients,
            codecs,
            scaling,
            delay=options.late,
            fragments=options.fragments,
            inner_state=options.inner_state,
        )
    if name == "delayed":
        return Delayed(model, made, comm, clip, gradients, options.late, codecs, scaling, resync)
    if name == "dmb":
        return DistributedMiniBatch(model, made, comm, clip, gradients, 0, codecs, scaling, resync)
    if name == "adasum":
        return Adasum(model, make, comm, clip, gradients, scaling, resync)
    if name == "gossip":
        return Gossip(model, made, comm, clip, gradients, options.gossip, options.late, scaling)
    if name == "hogwild":
        return Hogwild(model, made, comm, clip, gradients, scaling)
    if options.virtual_ranks is not None:
        return VirtualRanks(model, made, comm, clip, gradients, options.virtual_ranks, seed, scaling)
    shard = _shards(gradients, made, model, comm, codecs)
    return Synchronous(model, make, comm, clip, gradients, shard, codecs, scaling, resync, options.noise_scale)


def check_optimizer(
    optimizer: torch.optim.Optimizer,
    options: StrategyOptions,
    gradients: GradientOptions,
    precision: str,
    model: nn.Module,
) -> None:
    """Raise ConfigError where the optimizer meets what it cannot do: sparse gradients, loss scaling, shards, races."""
    sparse = has_sparse_gradients(model)
    if sparse and options.strategy not in _DENSE and not options.served and options.virtual_ranks is None:
        check_takes_sparse(optimizer)
    if options.strategy == "hogwild":
        check_hogwild_optimizer(optimizer, sparse)
    if not needs_closure(optimizer):
        return
    name = type(optimizer).__name__
    if isinstance(optimizer, Newton):
        _check_newton(options, gradients)
    if precision == "fp16":
        raise ConfigError(
            f"--precision fp16: {name} evaluates the loss several times a step, which loss scaling cannot follow; "
            f"take bf16 or fp32"
        )
    if gradients.shard_optimizer:
        raise ConfigError(f"--shard-optimizer: {name} decides by the whole gradient, and cannot be sharded")


def _check_newton(options: StrategyOptions, gradients: GradientOptions) -> None:
    """Raise ConfigError where there is no one Hessian of what the gradients are those of."""
    if options.strategy != "sync" and options.strategy not in LOCAL:
        raise ConfigError(
            f"--optimizer newton: evaluates the loss several times a step, which --strategy {options.strategy} cannot "
            f"follow; take sync"
        )
    if options.virtual_ranks is not None:
        raise ConfigError(
            f"--optimizer newton: the sum of Hessians depends on the ranks started, which --virtual-ranks "
            f"{options.virtual_ranks} rules out; leave one of the two out"
        )
    if gradients.sync_batch_norm:
        raise ConfigError("--sync-batch-norm: it cannot be differentiated twice, as --optimizer newton needs it")


def _method(options: StrategyOptions, ranks: int) -> Method:
    lr, momentum = options.outer_lr, options.outer_momentum
    methods: dict[str, Callable[[], Method]] = {
        "local": Local,
        "post-local": PostLocal,
        "slowmo": lambda: SlowMo(1.0 if lr is None else lr, 0.6 if momentum is None else momentum),
        "bmuf": lambda: Bmuf(ranks, 1.0 if lr is None else lr, momentum),
        "diloco": lambda: DiLoCo(0.7 if lr is None else lr, 0.9 if momentum is None else momentum, options.mixing),
        "easgd": lambda: Elastic(ranks, options.elastic_beta),
    }
    return methods[options.strategy]()


def _shards(
    gradients: GradientOptions,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    comm: Communicator,
    codecs: CodecFactory | None,
) -> bool:
    """Say whether the optimizer is to be sharded: as the options want it, else where it costs nothing."""
    sparse = has_sparse_gradients(model)
    if gradients.shard_optimizer is not None:
        if gradients.shard_optimizer and sparse:
            raise ConfigError(
                "--shard-optimizer: the model has embeddings with sparse gradients, which cannot be sharded"
            )
        return gradients.shard_optimizer
    suits = codecs is None and is_elementwise(optimizer) and not sparse
    return suits and _shares_memory(comm, next(model.parameters()).device)


def _shares_memory(comm: Communicator, device: torch.device) -> bool:
    """Say whether ranks can have one memory for the parameters, where sharding costs nothing. All ranks must call.

    Not where the user chose another way for their messages, which shards would not go.
    """
    if comm.size == 1 or comm.algorithm != "shared-memory":
        return False
    return comm.allocate_shared(1, torch.float32, device) is not None
