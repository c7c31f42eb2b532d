"""From the options to a worker's strategy, or to a server, and what cannot be served."""

import torch
from torch import nn

from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import check_same_model
from allreduce_sgd.gradients.sharded import Groups, is_elementwise
from allreduce_sgd.optim.build import build_optimizer, needs_closure
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.options import StrategyOptions
from allreduce_sgd.strategies.precision import LossScaling
from allreduce_sgd.strategies.server.elastic import Centre, ElasticWorker
from allreduce_sgd.strategies.server.gradient_worker import GradientWorker
from allreduce_sgd.strategies.server.loop import GradientServer, Server
from allreduce_sgd.strategies.server.roles import Role, server_count
from allreduce_sgd.strategies.server.rules import Immediate, Lockstep, Rule, Softsync
from allreduce_sgd.strategies.server.shards import Master, Vectors
from allreduce_sgd.strategies.server.tree import Leaf, Relay
from allreduce_sgd.strategies.server.wire import make_wires
from allreduce_sgd.strategies.server.worker import Served

__all__ = ["build_server", "build_worker", "check_served"]


def check_served(
    options: StrategyOptions,
    gradients: GradientOptions,
    optimizer: OptimizerOptions,
    model: nn.Module,
    size: int,
    compression: CompressionOptions,
) -> None:
    """Raise ConfigError, in one line, where the method cannot be served by some of `size` ranks as the options say."""
    servers = server_count(options, size)
    workers, flag = size - servers, f"--strategy {options.strategy}"
    made = build_optimizer(optimizer, model.parameters())
    name = type(made).__name__
    if needs_closure(made):
        raise ConfigError(f"{flag}: {name} evaluates the loss several times a step, which servers cannot follow")
    if isinstance(made, torch.optim.SparseAdam):
        raise ConfigError(f"{flag}: {name} takes sparse gradients only, and servers hold dense ones")
    elastic = options.strategy == "easgd"
    if servers > 1 and options.server_tree is None and not elastic and not is_elementwise(made):
        raise ConfigError(
            f"--servers {servers}: {name} updates whole parameters, which several servers cut; choose --servers 1, or "
            f"another --optimizer"
        )
    if gradients.shard_optimizer:
        raise ConfigError(f"--shard-optimizer: with {flag} the servers have the optimizer's state; leave it out")
    if gradients.sync_batch_norm and options.asynchronous:
        raise ConfigError(f"--sync-batch-norm: ranks of {flag} do not step together")
    if options.softsync is not None and options.softsync > workers:
        raise ConfigError(
            f"--softsync {options.softsync}: there {'is' if workers == 1 else 'are'} {workers} "
            f"worker{'' if workers == 1 else 's'}; choose 1 to {workers}"
        )
    for flag, value, only in (
        ("--period-schedule", options.period_schedule, "constant"),
        ("--inner-state", options.inner_state, "keep"),
    ):
        if elastic and value != only:
            raise ConfigError(f"{flag} {value}: workers of easgd with servers meet the centre alone; choose {only}")
    if elastic and compression.compression != "none":
        raise ConfigError(
            f"--compression {compression.compression}: easgd with servers sends parameters, not gradients; choose none"
        )
    vectors = Vectors(model, 1)
    make_wires(compression, vectors, 0, 0, 0)


def build_worker(
    options: StrategyOptions,
    gradients: GradientOptions,
    optimizer: OptimizerOptions,
    model: nn.Module,
    role: Role,
    *,
    compression: CompressionOptions | None = None,
    precision: str = "fp32",
    seed: int = 0,
) -> Served:
    """Build a worker's strategy. All workers must call it while all servers call `build_server`, of equal options."""
    compression = compression or CompressionOptions()
    check_served(options, gradients, optimizer, model, role.world.size, compression)
    check_same_model(model, role.world)
    made = build_optimizer(optimizer, [{"params": list(model.parameters())}])
    scaling = LossScaling(next(model.parameters()).device) if precision == "fp16" else None
    clip_norm = optimizer.clip_norm
    if options.strategy == "easgd":
        return ElasticWorker(model, made, role, clip_norm, options.steps_between, gradients, scaling)
    downpour = options.strategy == "server-async"
    push, fetch = (options.push, options.fetch) if downpour else (1, 1)
    return GradientWorker(
        options.strategy, model, made, role, clip_norm, gradients, compression, seed, scaling, push, fetch
    )


def build_server(
    options: StrategyOptions,
    gradients: GradientOptions,
    optimizer: OptimizerOptions,
    model: nn.Module,
    role: Role,
    *,
    compression: CompressionOptions | None = None,
    seed: int = 0,
) -> Server:
    """Build a server, with its part of the optimizer. `model` tells shapes only; workers give the values."""
    compression = compression or CompressionOptions()
    check_served(options, gradients, optimizer, model, role.world.size, compression)
    check_same_model(model, role.world)
    vectors = Vectors(model, len(role.holders))
    shard = 0 if role.is_leaf else role.holders.index(role.world.rank)

    def make(groups: Groups) -> torch.optim.Optimizer:
        return build_optimizer(optimizer, groups)

    if options.strategy == "easgd":
        return Centre(role, vectors.piece_memory(shard), options.elastic_beta / role.workers)
    # Leaves send plain sums.
    wires = None if role.fan_out is not None and not role.is_leaf else make_wires(compression, vectors, shard, seed, 0)
    lockstep = options.strategy == "server-sync"
    if role.is_leaf:
        gradient = vectors.piece_memory(shard)
        rule: Rule = Lockstep(gradient, role.clients) if lockstep else Relay(gradient)
        return Leaf(role, vectors.piece_memory(shard), rule, wires)
    master = Master(vectors, shard, make)
    if lockstep:
        rule = Lockstep(master.gradient, role.clients)
    elif options.strategy == "server-async":
        rule = Immediate(master.gradient)
    else:
        rule = Softsync(master.gradient, role.workers // (options.softsync or role.workers), options.staleness_lr)
    return GradientServer(role, master, rule, wires, optimizer.clip_norm if lockstep else None)
